"""A real OpenAI-compatible server, transformers' own, and a proxy before it that injects faults.

The server answers with the tiny model of `tests.tiny_causal`, which labels pairs by its rule. It
does not know of ``response_format`` and ``logprobs``: it ignores them.
"""

import asyncio
import json
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAULTS = (
    "429",
    "429 with Retry-After",
    "500",
    "reset",
    "cut body",
    "cut JSON",
    "page",
    "wrong answer",
    "cut answer",
    "time-out",
)
_START_SECONDS = 240
_RETRY_AFTER = 0.05


@dataclass(frozen=True, slots=True)
class ChatServer:
    """A running server.

    Attributes:
        url: such as ``http://127.0.0.1:8123``.
        model: the name that it knows its one model by.
    """

    url: str
    model: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def missing() -> str:
    """Return why there can be no server, empty where there can."""
    if _command() is None:
        return "the command 'transformers' is not installed"
    from transformers.utils.import_utils import is_serve_available

    return "" if is_serve_available() else "needs: pip install 'transformers[serving]'"


@contextmanager
def transformers_server(model: Path) -> Iterator[ChatServer]:
    """Run a server with the model of a folder in a process of its own."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    log = model.parent / "server.log"
    command = _command()
    assert command is not None
    arguments = ["serve", str(model), "--device", "cpu", "--host", "127.0.0.1"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, command, *arguments, "--port", str(port)], stdout=output, stderr=output
        )
        try:
            _wait_for(f"{url}/health", process, log)
            yield ChatServer(url, str(model))
        finally:
            process.kill()
            process.wait()


def _command() -> str | None:
    beside = Path(sys.executable).with_name("transformers")
    return str(beside) if beside.exists() else shutil.which("transformers")


def _wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(log.read_text())


class FaultyProxy:
    """Hands requests to a server and answers on, or breaks them.

    Args:
        server: that answers.
        fault: which of `FAULTS` befalls the request of a number (from 0); empty for none.
        delay: seconds that each request waits.
        refusals: responses for faults of further names.

    Attributes:
        fault_of_body: which fault befalls a request with a certain body.
        change: what becomes of an answer's content.
        url: base URL for a client.
        model: the name to ask for.
        requests: how many arrived.
        answered: how often each question was answered without a fault.
        bodies: of the requests.
        headers: of the requests, as text.
        times: when they arrived, in seconds.
        most_at_once: requests that were open at the same time.
    """

    def __init__(
        self,
        server: ChatServer,
        fault: Callable[[int], str] = lambda _: "",
        *,
        delay: float = 0.0,
        refusals: Mapping[str, bytes] | None = None,
    ) -> None:
        self.fault_of_body: Callable[[bytes], str] = lambda _: ""
        self.change: Callable[[dict[str, Any]], dict[str, Any]] | None = None
        self.requests = 0
        self.answered: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.most_at_once = 0
        self.times: list[float] = []
        self._open = 0
        self._fault = fault
        self._delay = delay
        self._refusals = _REFUSALS | dict(refusals or {})
        self._upstream = server.url.removeprefix("http://")
        self.model = server.model
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self.url = ""

    def __enter__(self) -> "FaultyProxy":
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        self.most_at_once = max(self.most_at_once, self._open)
        try:
            await self._exchange(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._open -= 1
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        body = await reader.readexactly(_length(head))
        fault = self._fault(self.requests) or self.fault_of_body(body)
        self.requests += 1
        self.times.append(time.monotonic())
        self.bodies.append(json.loads(body) if body else {})
        self.headers.append(head)
        await asyncio.sleep(self._delay)
        if fault == "time-out":
            await asyncio.sleep(600)
        elif fault == "reset":
            linger = struct.pack("ii", 1, 0)  # close sends RST
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
            return
        response = self._refusals.get(fault) or await self._ask(head, body, fault)
        if fault == "cut body":
            response = response[:-40]
        elif not fault:
            self.answered[_asked(body)] += 1
        writer.write(response)
        await writer.drain()

    async def _ask(self, head: str, body: bytes, fault: str) -> bytes:
        host, port = self._upstream.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        line = head.split("\r\n", 1)[0]
        try:
            writer.write(_http(line, {"host": self._upstream}, body))
            content = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
        status = content[0].split(b"\r\n", 1)[0].decode()
        answer = content[2]
        if fault in ("wrong answer", "cut answer"):
            changed = json.loads(answer)
            choice = changed["choices"][0]
            if fault == "wrong answer":
                choice["message"]["content"] = "I would say that it is highly relevant."
            else:
                choice["finish_reason"] = "length"
            answer = json.dumps(changed).encode()
        elif self.change:
            answer = json.dumps(self.change(json.loads(answer))).encode()
        elif fault == "cut JSON":
            answer = answer[: len(answer) // 2]
        elif fault == "page":
            answer = b"<html>Welcome to the network</html>"
        return _http(status, {"content-type": "application/json"}, answer)


def _asked(body: bytes) -> str:
    """Return the question of a chat request: what follows the system's text."""
    messages = json.loads(body).get("messages", [{}, {"content": ""}]) if body else []
    return messages[1]["content"] if len(messages) > 1 else ""


def _length(head: str) -> int:
    for line in head.lower().split("\r\n"):
        if line.startswith("content-length:"):
            return int(line.partition(":")[2])
    return 0


def _http(line: str, headers: dict[str, str], body: bytes) -> bytes:
    headers = {
        "content-type": "application/json",
        **headers,
        "content-length": str(len(body)),
        "connection": "close",
    }
    lines = [line, *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def refusal(status: int, message: str, *, code: str = "", **headers: str) -> bytes:
    """Return a response as OpenAI gives it for an error."""
    error = {"message": message, "type": "error", "param": None, "code": code or None}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return _http(f"HTTP/1.1 {status} Refused", named, json.dumps({"error": error}).encode())


def completion(text: str) -> bytes:
    """Return a response with an answer."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return _http("HTTP/1.1 200 OK", {}, json.dumps({"choices": [choice]}).encode())


_REFUSALS = {
    "429": refusal(429, "Rate limit reached"),
    "429 with Retry-After": refusal(429, "Rate limit reached", retry_after=str(_RETRY_AFTER)),
    "500": refusal(500, "The server had an error"),
}
