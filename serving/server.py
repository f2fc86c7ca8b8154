"""The parent process: binds the socket, keeps the workers alive, and ends them in order.

uvicorn's supervisor with spawned workers that accept from one shared socket. Here it also says when
the service is ready, keeps the old workers where a new one cannot start, and lets go of its own
copy of the socket at the stop: uvicorn keeps it, and who connects during the stop would wait for
workers that do not listen any more.
"""

import logging
import os
import resource
import socket
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead
from uvicorn import Config
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from features.console import stdout
from features.errors import BadInputError
from serving.manifest import Manifest
from serving.server_config import API_KEY_VARIABLE, FAILURE_VARIABLE, ServerConfig, api_key
from serving.server_log import LOG_CONFIG
from serving.server_metrics import FOLDER_VARIABLE

_LOST = "a worker ended before it was ready; its log lines above say more"

_OTHER_FILES = 256  # that a worker has open besides its connections
_BACKLOG = 2048
_KEEP_ALIVE_S = 75  # longer than load balancers keep theirs, so that they close first
_STOP_S = 30
_HANGING_S = 60  # without an answer to the parent; loading a large export keeps Python busy
_TRY_AGAIN_S = 5.0

_log = logging.getLogger("serving.server")


def serve(config: ServerConfig) -> None:
    """Serve until told to stop.

    Raises:
        BadInputError: a setting makes no sense, the address cannot be had, or the workers cannot
            load what they are told to serve.
    """
    config.check()
    for folder in (config.bundle, config.treatment):
        if folder is not None:
            Manifest.load(folder)  # the workers load the rest, and say what is wrong with it
    _allow_open_files(config.max_connections + _OTHER_FILES)
    listening = _bind(config)
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    with tempfile.TemporaryDirectory(prefix="serve-ranker-") as scratch:
        failure = Path(scratch) / "failure"
        os.environ[FOLDER_VARIABLE] = scratch
        os.environ[FAILURE_VARIABLE] = str(failure)
        os.environ["OMP_NUM_THREADS"] = "1"  # a worker a core: threads would only wait for cores
        config.to_environment()
        supervisor = Supervisor(_uvicorn(config), listening, address)
        _log.info("starting %d workers for %s on %s", config.workers, config.bundle, address)
        if not config.loopback and api_key() is None:
            _log.warning("anybody who reaches %s may ask: set %s", address, API_KEY_VARIABLE)
        supervisor.run()
        if supervisor.failed:
            raise BadInputError(failure.read_text(encoding="utf-8") if failure.exists() else _LOST)


def _allow_open_files(needed: int) -> None:
    """Raise this process's limit of open files, which the workers inherit.

    Raises:
        BadInputError: the system does not allow it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise BadInputError(
            f"'max_connections' needs {needed} open files in a process, the system allows {hard}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _bind(config: ServerConfig) -> socket.socket:
    """Return a listening socket.

    It listens from the start, so that no other process can take the port while workers load.
    """
    try:
        found = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        # What is below 0 is about the name and not the system's.
        known = error.errno is not None and error.errno > 0
        reason = os.strerror(error.errno or 0) if known else error.strerror
        raise BadInputError(
            f"cannot listen on {config.host} port {config.port}: {reason}"
        ) from None


def _uvicorn(config: ServerConfig) -> Config:
    return Config(
        "serving.worker:from_environment",
        factory=True,
        workers=config.workers,
        loop="uvloop",
        http="serving.connection:Connection",
        ws="none",
        lifespan="on",
        log_config=LOG_CONFIG,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_STOP_S,
        timeout_worker_healthcheck=_HANGING_S,
    )


class Supervisor(Multiprocess):
    """uvicorn's supervisor, with the changes that this module's docstring names.

    Attributes:
        failed: whether the service never became ready, since a worker could not start.
    """

    def __init__(self, config: Config, listening: socket.socket, address: str) -> None:
        super().__init__(config, [listening])
        self.failed = False
        self._address = address
        self._ready = False
        self._heard: dict[int, _Heard] = {}  # by process id
        self._try_again_at = 0.0

    def keep_subprocess_alive(self) -> None:
        """Replace workers that have ended or hang; returns at once."""
        for place, process in enumerate(self.processes):
            heard = self._hear(process)
            hangs = time.monotonic() - heard.at > self.config.timeout_worker_healthcheck
            if process.exitcode is not None or hangs:
                self._replace(place, process, served=heard.serves)
        self._heard = {p.pid: self._heard[p.pid] for p in self.processes if p.pid in self._heard}
        if not self._ready and len(self._heard) == len(self.processes):
            self._ready = all(heard.serves for heard in self._heard.values())
            if self._ready:
                stdout.print(f"ready: {self._address}", highlight=False, soft_wrap=True)

    def _hear(self, process: Process) -> "_Heard":
        """Take a worker's answers to earlier questions, and ask again.

        uvicorn's own question waits for the answer, for as long as a worker may hang, also where
        the worker ends meanwhile: both ends of the pipe stay open here.
        """
        assert process.pid is not None
        heard = self._heard.setdefault(process.pid, _Heard())
        try:
            while process.parent_conn.poll():
                heard.serves = process.parent_conn.recv()
                heard.at = time.monotonic()
            process.parent_conn.send(b"ping")
        except (OSError, EOFError):
            pass
        return heard

    def _replace(self, place: int, process: Process, *, served: bool) -> None:
        if time.monotonic() < self._try_again_at:
            return
        process.kill()
        process.join()
        if not self._ready:
            self.failed = True
            self.should_exit.set()
            return
        assert process.pid is not None
        mark_process_dead(process.pid)
        _log.error("worker %d ended (status %s); starting another", process.pid, process.exitcode)
        if not served:  # the next one may fare no better
            self._try_again_at = time.monotonic() + _TRY_AGAIN_S
        self.processes[place] = Process(self.config, self.sockets)
        self.processes[place].start()

    def terminate_all(self) -> None:
        """Ask the workers to stop; who connects from now on is refused."""
        for listening in self.sockets:
            listening.close()
        super().terminate_all()


@dataclass(slots=True)
class _Heard:
    """What a worker last said: whether it serves, and when that was."""

    serves: bool = False
    at: float = field(default_factory=time.monotonic)
