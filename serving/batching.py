"""Dynamic batching: what waits while the model is busy is scored together.

One thread scores. The event loop hands it items and goes on; when the model is free, whatever
waits makes the next batch, up to a total size::

    waiting   a 100 │ b 50 │ c 300 │ d 100            most 400
    batches   [a, b]         [c, d]                   b + c would be 450

An optional wait lets a batch grow while nothing else waits. At low load it only adds its length to
every answer, and at high load what waits fills batches by itself, so that it is 0 by default.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")

_log = logging.getLogger("serving.batching")


class BatcherClosedError(RuntimeError):
    """Nothing more is taken."""


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Item, Outcome]):
    item: Item
    size: int
    deadline: float
    future: "asyncio.Future[Outcome]"
    since: float = field(default_factory=time.monotonic)


class Batcher(Generic[Item, Outcome]):
    """Collects items from one event loop into batches for one thread.

    How much waits is bounded by who calls: each item belongs to an accepted request.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Outcome | Exception]],
        *,
        most: Callable[[], int],
        wait_s: float = 0.0,
        prepare: Callable[[], None] | None = None,
        waited: Callable[[float], None] | None = None,
    ) -> None:
        """Start the thread; to be called where an event loop runs.

        Args:
            work: runs in the thread; an outcome for each item, an exception being raised where
                the item was submitted. An exception of its own is raised for each item.
            most: tells the largest total size of a batch; a larger item goes alone.
            wait_s: how long a batch waits for more items than there are.
            prepare: runs in the thread before anything else.
            waited: is told how many seconds each scored item waited.
        """
        self._work = work
        self._most = most
        self._wait_s = wait_s
        self._prepare = prepare
        self._waited = waited
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Waiting[Item, Outcome] | None] = queue.SimpleQueue()
        self._held: _Waiting[Item, Outcome] | None = None  # did not fit into the last batch
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    async def submit(self, item: Item, size: int, deadline: float) -> Outcome:
        """Return the outcome of an item.

        Args:
            item: what ``work`` gets.
            size: counts towards the size of a batch.
            deadline: of `time.monotonic`; an item that is still waiting then is left out.

        Raises:
            TimeoutError: the deadline passed before there was an outcome.
            BatcherClosedError: the batcher is closed.
            Exception: the item's outcome.
        """
        if self._closing:
            raise BatcherClosedError
        waiting = _Waiting(item, size, deadline, self._loop.create_future())
        self._queue.put(waiting)
        async with asyncio.timeout(deadline - time.monotonic()):
            return await waiting.future

    async def close(self) -> None:
        """Finish what was submitted and end the thread."""
        if not self._closing:
            self._closing = True
            self._queue.put(None)
        while self._thread.is_alive():
            await asyncio.sleep(0.01)

    def _run(self) -> None:
        if self._prepare is not None:
            self._prepare()
        while batch := self._collect():
            now = time.monotonic()
            wanted = [w for w in batch if w.deadline > now and not w.future.done()]
            if not wanted:
                continue
            if self._waited is not None:
                for waiting in wanted:
                    self._waited(now - waiting.since)
            self._loop.call_soon_threadsafe(_deliver, wanted, self._outcomes(wanted))

    def _outcomes(self, batch: list[_Waiting[Item, Outcome]]) -> Sequence[Outcome | Exception]:
        try:
            outcomes = self._work([waiting.item for waiting in batch])
            assert len(outcomes) == len(batch)
        except Exception as error:  # the thread serves others, too
            _log.exception("a batch failed")
            return [error] * len(batch)
        return outcomes

    def _collect(self) -> list[_Waiting[Item, Outcome]]:
        """Wait for items and return a batch; an empty one at the end."""
        first = self._held if self._held is not None else self._queue.get()
        self._held = None
        if first is None:
            return []
        batch, size = [first], first.size
        most = self._most()
        until = time.monotonic() + self._wait_s
        while size < most:
            following = self._next(until)
            if following is None:
                break
            if size + following.size > most:
                self._held = following
                break
            batch.append(following)
            size += following.size
        return batch

    def _next(self, until: float) -> _Waiting[Item, Outcome] | None:
        """Return the next item if there is one by ``until``."""
        left = until - time.monotonic()
        try:
            following = self._queue.get(timeout=left) if left > 0 else self._queue.get_nowait()
        except queue.Empty:
            return None
        if following is None:
            self._queue.put(None)  # the end comes after this batch
        return following


def _deliver(
    batch: Sequence[_Waiting[Item, Outcome]], outcomes: Sequence[Outcome | Exception]
) -> None:
    """Give each item its outcome; runs in the event loop."""
    for waiting, outcome in zip(batch, outcomes, strict=True):
        if waiting.future.done():
            continue
        if isinstance(outcome, Exception):
            waiting.future.set_exception(outcome)
        else:
            waiting.future.set_result(outcome)
