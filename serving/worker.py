"""One worker process: loads the rankers, serves until it is told to stop, and leaves in order."""

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from features.errors import BadInputError
from serving.ab_routing import CONTROL, TREATMENT, Bucket
from serving.app import create_app
from serving.exposure_log import ExposureLog
from serving.feature_store import open_store
from serving.gate import Gate, Receive, Scope, Send
from serving.rank_service import RankService
from serving.server_config import FAILURE_VARIABLE, ServerConfig, api_key
from serving.server_metrics import Metrics
from serving.slots import Slot

_log = logging.getLogger("serving.worker")


def from_environment() -> "Worker":
    """Return what uvicorn runs in a worker process."""
    return Worker(ServerConfig.from_environment(), api_key())


class Worker:
    """An ASGI application that loads when it starts.

    Args:
        config: what to serve.
        key: that callers must know; ``None`` for none.

    Attributes:
        service: once it has started.
    """

    def __init__(self, config: ServerConfig, key: str | None) -> None:
        self.service: RankService | None = None
        self._config = config
        self._key = key
        self._gate: Gate | None = None
        self._watch: threading.Thread | None = None
        self._stopped = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or start and stop."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            assert self._gate is not None, "requests come after the start"
            await self._gate(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self._start()
        except Exception as error:
            reason = f"{error}"
            if not isinstance(error, BadInputError | OSError):
                reason = f"a worker cannot start: {type(error).__name__}: {error}"
            _tell_parent(reason)
            await send({"type": "lifespan.startup.failed", "message": reason})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _start(self) -> None:
        torch.set_num_threads(1)
        config = self._config
        slots: dict[Bucket, Slot] = {CONTROL: Slot(CONTROL, config.bundle)}
        if config.treatment is not None:
            slots[TREATMENT] = Slot(TREATMENT, config.treatment)
        store = None
        if config.store is not None:
            manifest = slots[CONTROL].current.manifest
            store = open_store(
                config.store, window_days=manifest.window_days, cap=manifest.history_cap
            )
        exposures = None if config.exposures is None else ExposureLog(config.exposures)
        service = RankService(config, slots, metrics=Metrics(), store=store, exposures=exposures)
        await service.warm_up()
        self.service = service
        app = create_app(service, key=self._key is not None)
        self._gate = Gate(app, service, config, self._key)
        self._watch = threading.Thread(target=self._watch_folders, name="watch", daemon=True)
        self._watch.start()
        self._hear_signals()

    async def _stop(self) -> None:
        assert self.service is not None
        self.service.stopping = True
        self._stopped.set()
        await self.service.close()

    def _watch_folders(self) -> None:
        """Take up new exports, and end when the parent process has gone."""
        torch.set_num_threads(1)
        assert self.service is not None
        parent = multiprocessing.parent_process()
        while not self._stopped.wait(self._config.poll_seconds):
            for slot in self.service.slots.values():
                self._poll(slot, self.service.metrics)
            self.service.count_dropped()
            if parent is not None and not parent.is_alive():
                _log.error("the parent process has gone; stopping")
                os.kill(os.getpid(), signal.SIGTERM)
                return

    @staticmethod
    def _poll(slot: Slot, metrics: Metrics) -> None:
        before = slot.describe()
        try:
            slot.poll()
        except Exception:  # the next poll may fare better, and the old ranker serves
            _log.exception("watching the folder of %s failed", slot.name)
            return
        after = slot.describe()
        if after["swaps"] > before["swaps"]:
            metrics.swaps.labels(slot.name).inc(after["swaps"] - before["swaps"])
            _log.info("%s: serving %s now", slot.name, after["fingerprint"])
        if after["failed_loads"] > before["failed_loads"]:
            metrics.failed_loads.labels(slot.name).inc(
                after["failed_loads"] - before["failed_loads"]
            )
            _log.error("%s: kept the old export: %s", slot.name, after["last_error"])

    def _hear_signals(self) -> None:
        """Turn /readyz to 503 at the signal to stop, and go on listening for a while."""
        if threading.current_thread() is not threading.main_thread():
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            then = signal.getsignal(number)
            if callable(then):
                signal.signal(number, self._stopper(loop, then))

    def _stopper(
        self, loop: asyncio.AbstractEventLoop, then: Callable[[int, FrameType | None], Any]
    ) -> Callable[[int, FrameType | None], None]:
        def stop(number: int, frame: FrameType | None) -> None:
            assert self.service is not None
            if self.service.stopping:  # asked twice: now
                then(number, frame)
                return
            self.service.stopping = True
            wait_s = self._config.drain_seconds
            loop.call_soon_threadsafe(loop.call_later, wait_s, then, number, None)

        return stop


def _tell_parent(reason: str) -> None:
    """Leave the reason why this process cannot start where the parent looks for it."""
    path = os.environ.get(FAILURE_VARIABLE)
    if path is not None:
        Path(path).write_text(reason, encoding="utf-8")
