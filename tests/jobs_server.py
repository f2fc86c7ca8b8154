"""Files, batches and fine-tuning jobs as OpenAI publishes them, in front of a real chat server.

No server that offers these can be run here: this one keeps files, lets work go through its
published states, and has a batch's lines answered by `tests.chat_server`. Work moves on by one
state each time that its owner looks at it.
"""

import json
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.chat_server import ChatServer

BATCH_STATES = ("validating", "in_progress", "finalizing", "completed")
JOB_STATES = ("validating_files", "queued", "running", "succeeded")
TUNED = "ft:tiny:shop::abc123"


class JobsServer:
    """The server, in a ``with`` block.

    Args:
        server: that answers the lines of batches; not needed for fine-tuning.

    Attributes:
        url: base URL for a client.
        calls: how often each method and path was called, ids left out.
        files: content by id.
        batches: by id, in the order of their creation.
        jobs: by id, in the order of their creation.
        asked: how often each custom id was answered.
        headers: of all requests, as text.
        fault: given method, path and how often that was called before, says ``lose`` to do the
            work and break the connection, or a status to refuse with.
        outcome: given a custom id, says an answer in the place of the server's, or an error's code.
        end: the state in which batches and jobs end.
        refusal: why they fail.
    """

    def __init__(self, server: ChatServer | None = None) -> None:
        self.calls: Counter[str] = Counter()
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.asked: Counter[str] = Counter()
        self.headers: list[str] = []
        self.fault: Callable[[str, int], str] = lambda _call, _number: ""
        self.outcome: Callable[[str], str] = lambda _custom_id: ""
        self.end = ""
        self.refusal = ""
        self._chat = server
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> "JobsServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def answer(self, method: str, target: str, content: Any) -> tuple[int, Any]:
        """Return status and content of a response."""
        split = urlsplit(target)
        path = split.path.removeprefix("/v1").strip("/").split("/")
        query = {name: values[0] for name, values in parse_qs(split.query).items()}
        with self._lock:
            match method, path:
                case "POST", ["files"]:
                    return 200, self._add_file(content["file"], content["purpose"])
                case "GET", ["files", file, "content"] if file in self.files:
                    return 200, self.files[file]
                case "POST", ["batches"]:
                    return 200, self._add_batch(content)
                case "GET", ["batches", batch] if batch in self.batches:
                    return 200, self._move_batch(self.batches[batch])
                case "GET", ["batches"]:
                    return 200, _page(self.batches, query)
                case "POST", ["fine_tuning", "jobs"]:
                    return 200, self._add_job(content)
                case "GET", ["fine_tuning", "jobs", job, "events"] if job in self.jobs:
                    return 200, {"object": "list", "data": [_event(self.jobs[job])]}
                case "GET", ["fine_tuning", "jobs", job] if job in self.jobs:
                    return 200, self._move_job(self.jobs[job])
                case "GET", ["fine_tuning", "jobs"]:
                    return 200, _page(self.jobs, query)
        return 404, _error(f"no such thing: {method} {split.path}", "not_found")

    def _add_file(self, content: bytes, purpose: str) -> dict[str, Any]:
        identity = f"file-{len(self.files)}"
        self.files[identity] = content
        return {
            "id": identity,
            "object": "file",
            "bytes": len(content),
            "created_at": int(time.time()),
            "filename": "some.jsonl",
            "purpose": purpose,
            "status": "processed",
        }

    def _add_batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        assert asked["completion_window"] == "24h"
        lines = self.files[asked["input_file_id"]].splitlines()
        identity = f"batch_{len(self.batches)}"
        self.batches[identity] = {
            "id": identity,
            "object": "batch",
            "endpoint": asked["endpoint"],
            "errors": None,
            "input_file_id": asked["input_file_id"],
            "completion_window": "24h",
            "status": BATCH_STATES[0],
            "output_file_id": None,
            "error_file_id": None,
            "created_at": int(time.time()),
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
            "metadata": asked.get("metadata"),
        }
        return self.batches[identity]

    def _move_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        if batch["status"] not in BATCH_STATES[:-1]:
            return batch
        if self.end == "failed":
            batch["status"] = "failed"
            error = {"code": "token_limit_exceeded", "message": self.refusal, "line": None}
            batch["errors"] = {"object": "list", "data": [error]}
            return batch
        batch["status"] = BATCH_STATES[BATCH_STATES.index(batch["status"]) + 1]
        if batch["status"] == "completed":
            batch["status"] = self.end or "completed"
            self._finish(batch)
        return batch

    def _finish(self, batch: dict[str, Any]) -> None:
        good, bad = [], []
        for line in self.files[batch["input_file_id"]].splitlines():
            asked = json.loads(line)
            assert (asked["method"], asked["url"]) == ("POST", batch["endpoint"])
            status, body = self._ask(asked)
            told = {"status_code": status, "request_id": "req", "body": body}
            answer = {"id": "batch_req", "custom_id": asked["custom_id"], "response": told}
            (good if status == 200 else bad).append(json.dumps(answer | {"error": None}))
        # In another order than that of the questions, as it may happen.
        for name, lines in (("output_file_id", good[::-1]), ("error_file_id", bad)):
            if lines:
                content = "\n".join(lines).encode() + b"\n"
                batch[name] = self._add_file(content, "batch_output")["id"]
        counts = {"total": len(good) + len(bad), "completed": len(good), "failed": len(bad)}
        batch["request_counts"] = counts

    def _ask(self, asked: dict[str, Any]) -> tuple[int, Any]:
        outcome = self.outcome(asked["custom_id"])
        if outcome.startswith("error: "):
            return 400, _error("it does not like that", outcome.removeprefix("error: "))
        assert self._chat is not None
        request = urllib.request.Request(
            f"{self._chat.url}/v1/chat/completions",
            json.dumps(asked["body"]).encode(),
            {"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request) as response:
                body = json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _error(error.read().decode(), "")
        self.asked[asked["custom_id"]] += 1
        if outcome:
            body["choices"][0]["message"]["content"] = outcome
        return 200, body

    def _add_job(self, asked: dict[str, Any]) -> dict[str, Any]:
        identity = f"ftjob-{len(self.jobs)}"
        self.jobs[identity] = {
            "id": identity,
            "object": "fine_tuning.job",
            "created_at": int(time.time()),
            "error": None,
            "fine_tuned_model": None,
            "finished_at": None,
            "hyperparameters": asked["method"]["supervised"]["hyperparameters"],
            "method": asked["method"],
            "model": asked["model"],
            "organization_id": "org",
            "result_files": [],
            "seed": 0,
            "status": JOB_STATES[0],
            "trained_tokens": None,
            "training_file": asked["training_file"],
            "validation_file": asked["validation_file"],
            "metadata": asked.get("metadata"),
        }
        return self.jobs[identity]

    def _move_job(self, job: dict[str, Any]) -> dict[str, Any]:
        if job["status"] in JOB_STATES[:-1]:
            job["status"] = JOB_STATES[JOB_STATES.index(job["status"]) + 1]
            if job["status"] == "succeeded" and self.end:
                job["status"] = self.end
                job["error"] = {"code": "invalid", "message": self.refusal, "param": None}
            elif job["status"] == "succeeded":
                job |= {"fine_tuned_model": TUNED, "trained_tokens": 12_000}
        return job


class _Handler(BaseHTTPRequestHandler):
    owner: JobsServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._do(None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"] or 0))
        kind = self.headers["content-type"]
        if kind.startswith("multipart/"):
            message = BytesParser(policy=HTTP).parsebytes(
                b"content-type: %b\r\n\r\n%b" % (kind.encode(), body)
            )
            parts = {
                part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
                for part in message.iter_parts()
            }
            self._do({"file": parts["file"], "purpose": parts["purpose"].decode()})
        else:
            self._do(json.loads(body))

    def _do(self, content: Any) -> None:
        owner = self.owner
        path = urlsplit(self.path).path.removeprefix("/v1")
        call = f"{self.command} {path}"
        number = owner.calls[call]
        owner.calls[call] += 1
        owner.headers.append(str(self.headers))
        fault = owner.fault(call, number)
        if fault.isdigit():
            status, answer = int(fault), _error("it does not work now", "")
        else:
            status, answer = owner.answer(self.command, self.path, content)
        self.close_connection = True
        if fault == "lose":
            return
        told = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(told)))
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *_: object) -> None:
        pass


def _page(things: dict[str, dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
    """Return a page of a list, the newest first."""
    newest = list(things.values())[::-1]
    ids = [thing["id"] for thing in newest]
    first = ids.index(query["after"]) + 1 if "after" in query else 0
    some = newest[first : first + int(query.get("limit", 20))]
    return {"object": "list", "data": some, "has_more": first + len(some) < len(newest)}


def _event(job: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": "event",
        "object": "fine_tuning.job.event",
        "created_at": 0,
        "level": "info",
        "message": f"the job is {job['status']}",
    }


def _error(message: str, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "error", "param": None, "code": code or None}}
