"""The `serve-ranker` process that the load tests start, watch and end."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from features.errors import BadInputError

HOST = "127.0.0.1"
_READY_S = 120.0
_STOP_S = 60.0
_TICKS = os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """Return a port of the loopback address that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class Service:
    """One running service; leaving the block ends it and its workers, by their process ids.

    Args:
        bundle: the exported ranker's folder.
        log: file that takes the service's output.
        workers: its worker processes.
        options: further arguments of `serve-ranker`.

    Raises:
        BadInputError: the service ended, or was not ready in two minutes; names the log.
    """

    def __init__(
        self, bundle: Path, log: Path, *, workers: int = 2, options: Sequence[str] = ()
    ) -> None:
        self.target = (HOST, free_port())
        self._log = log
        self._workers = workers
        self._seen: set[int] = set()
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "serving.serve_cli", "--bundle", str(bundle)]
        command += ["--host", HOST, "--port", str(self.target[1]), "--workers", str(workers)]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for the command that started it
            )

    def __enter__(self) -> "Service":
        try:
            self._wait_until_ready()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()

    @property
    def running(self) -> bool:
        """Whether the service's first process is alive."""
        return self.process.poll() is None

    def workers(self) -> tuple[int, ...]:
        """Return the process ids of the workers: the service's own where it has one worker."""
        workers = tuple(pid for pid in children(self.process.pid) if not _is_helper(pid))
        self._seen.update(workers)
        return workers or (self.process.pid,)

    def stop(self) -> None:
        """Ask the service to stop (SIGTERM) and return at once."""
        self.process.send_signal(signal.SIGTERM)

    def end(self) -> int:
        """Stop the service, kill what does not stop, and return the exit status."""
        left = {*self._seen, *children(self.process.pid)}
        if self.running:
            self.stop()
        try:
            status = self.process.wait(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        for pid in left:
            if _session(pid) == self.process.pid:  # outlived the first process
                os.kill(pid, signal.SIGKILL)
        return status

    def get(self, path: str) -> tuple[int, bytes]:
        """Return status and body of ``GET path`` on a connection of its own.

        Raises:
            OSError: no connection.
        """
        connection = http.client.HTTPConnection(*self.target, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def get_json(self, path: str) -> Any:
        """Return the JSON of ``GET path``, whatever its status."""
        return json.loads(self.get(path)[1])

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + _READY_S
        while time.monotonic() < until:
            if not self.running:
                break
            try:
                if self.get("/readyz")[0] == 200 and self._all_started():
                    return
            except (OSError, http.client.HTTPException):
                pass
            time.sleep(0.1)
        raise BadInputError(f"the service did not come up; its last words are in {self._log}")

    def _all_started(self) -> bool:
        """Return whether all workers are there and rest: none of them still loads its model."""
        workers = self.workers()
        if len(workers) < self._workers:
            return False
        before = [processor_s(pid) for pid in workers]
        time.sleep(0.5)
        return all(processor_s(p) - b < 0.05 for p, b in zip(workers, before, strict=True))


def children(pid: int) -> tuple[int, ...]:
    """Return the process ids of the live children of ``pid``, in order."""
    try:
        tasks = [*Path(f"/proc/{pid}/task").iterdir()]
        found = [(task / "children").read_text() for task in tasks]
    except OSError:
        return ()
    return tuple(sorted(int(child) for text in found for child in text.split()))


def memory(pid: int) -> tuple[int, int]:
    """Return the resident memory of ``pid`` in bytes: all of it, and without mapped files.

    Mapped files, such as the tables that the workers share, are the page cache's; a process that
    touches more of them does not take more memory.
    """
    sizes = {"VmRSS:": 0, "RssAnon:": 0}
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, *value = line.split()
            if name in sizes:
                sizes[name] = int(value[0]) * 1024
    except OSError:  # ended
        pass
    return sizes["VmRSS:"], sizes["RssAnon:"]


def processor_s(pid: int) -> float:
    """Return the processor time that ``pid`` has used, in seconds; 0 once it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _session(pid: int) -> int | None:
    """Return the session of ``pid``, or ``None`` where it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3])
    except OSError:
        return None


def _is_helper(pid: int) -> bool:
    """Return whether ``pid`` is Python's own process beside the workers."""
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True
