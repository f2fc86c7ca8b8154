"""What was shown to whom: one JSON line per ranked request, the raw material of an A/B test.

Each process writes files of its own, so that none needs a lock::

    exposures-20240801T090000Z-5f3a9c01-0001.jsonl     first file of a process
    exposures-20240801T090000Z-5f3a9c01-0002.jsonl     begun when the first one was large enough
    exposures-20240801T090001Z-e07b2d44-0001.jsonl     of another process

`write` only hands an exposure to a thread that writes. What waits for that thread is bounded; when
it falls behind, because the disk is slow or full, exposures are dropped and counted: the service
goes on, and the loss is known. What was taken is on its way to the disk within a moment and is
there after `close`. A process that is killed loses what waited; at worst its last line is torn.
"""

import datetime as dt
import json
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, NotRequired, Self, TypedDict

import numpy as np
import numpy.typing as npt

from serving.ab_routing import Bucket

_ROTATE_BYTES = 128 << 20
_CAPACITY = 500_000  # about 40 MB
_AT_A_TIME = 256
_DECIMALS = 7  # of a probability; float32 has no more near 1


class Exposure(TypedDict):
    """One ranked request, as a line of the log.

    Attributes:
        request_id: a retry of a request carries the same; such lines count once.
        time: when it was ranked; ISO 8601 in UTC, see `now`.
        user_id: ``None`` where the request named no user.
        bucket: ``None`` outside of a test.
        model: fingerprint of the exported ranker that ranked.
        query_hash: tells queries apart without telling what was searched for.
        candidates: product ids in ranked order, best first.
        probabilities: of a click, in the same order; the log keeps 7 decimals.
    """

    request_id: str
    time: str
    user_id: int | None
    bucket: Bucket | None
    model: str
    query_hash: NotRequired[str]
    candidates: Sequence[int] | npt.NDArray[np.int64]
    probabilities: Sequence[float] | npt.NDArray[np.floating[Any]]


def now() -> str:
    """Return the time as lines of the log carry it, such as ``2024-08-01T09:00:00.123+00:00``."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")


class ExposureLog:
    """A log of exposures that one process writes.

    Attributes:
        folder: of the files; made where missing.
        written: exposures that were handed to the operating system.
        dropped: exposures that were lost, because too many waited, a file could not be written or
            the log was closed.
        last_error: what went wrong the last time that a file could not be written; ``None`` where
            nothing did.
    """

    def __init__(
        self, folder: Path, *, rotate_bytes: int = _ROTATE_BYTES, capacity: int = _CAPACITY
    ) -> None:
        """Start the thread that writes; a file is made at the first exposure.

        Args:
            folder: of the files.
            rotate_bytes: a file of this size or more is followed by a new one.
            capacity: bound on what waits to be written, in exposures plus candidates.

        Raises:
            OSError: ``folder`` cannot be made.
        """
        assert rotate_bytes > 0
        assert capacity > 0
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.written = 0
        self.dropped = 0
        self.last_error: str | None = None
        self._capacity = capacity
        self._files = _Files(folder, rotate_bytes)
        self._waiting: deque[Exposure] = deque()
        self._load = 0  # of what waits and what is being written
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="exposure-log", daemon=True)
        self._thread.start()

    def write(self, exposure: Exposure) -> None:
        """Take an exposure to be written; never waits for the disk.

        The exposure must not change afterwards.
        """
        with self._changed:
            load = self._load + _load(exposure)
            if self._closed or load > self._capacity:
                self.dropped += 1
                return
            self._load = load
            self._waiting.append(exposure)
            self._changed.notify()

    def close(self) -> None:
        """Write all that was taken, to the disk itself, and stop; may be called again."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        while taken := self._take():
            lines = [line for exposure in taken if (line := self._line(exposure)) is not None]
            written = len(lines) if self._attempt(partial(self._files.append, lines)) else 0
            with self._changed:
                self._load -= sum(map(_load, taken))
                self.written += written
                self.dropped += len(taken) - written
        self._attempt(self._files.close)

    def _line(self, exposure: Exposure) -> bytes | None:
        """Return the line of an exposure, if it can be said in JSON."""
        try:
            text = json.dumps(_plain(exposure), separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError) as error:
            self.last_error = f"exposure {exposure['request_id']!r}: {error}"
            return None
        return text.encode() + b"\n"

    def _attempt(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except OSError as error:
            self.last_error = str(error)
            return False
        return True

    def _take(self) -> list[Exposure]:
        """Wait for exposures and return some; none once the log is closed and all are taken."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            return [self._waiting.popleft() for _ in range(min(len(self._waiting), _AT_A_TIME))]


def _load(exposure: Exposure) -> int:
    return 1 + len(exposure["candidates"])


def _plain(exposure: Exposure) -> dict[str, Any]:
    """Return what JSON knows; short decimals make lines a third shorter, and faster to write."""
    candidates = np.asarray(exposure["candidates"], np.int64)
    probabilities = np.asarray(exposure["probabilities"], np.float64)
    if len(candidates) != len(probabilities):
        raise ValueError(f"{len(candidates)} candidates and {len(probabilities)} probabilities")
    rounded = probabilities.round(_DECIMALS).tolist()
    return {**exposure, "candidates": candidates.tolist(), "probabilities": rounded}


class _Files:
    """The files of one process; used by one thread."""

    def __init__(self, folder: Path, rotate_bytes: int) -> None:
        start = dt.datetime.now(dt.UTC)
        self._stem = f"exposures-{start:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
        self._folder = folder
        self._rotate_bytes = rotate_bytes
        self._number = 0
        self._file: FileIO | None = None
        self._size = 0

    def append(self, lines: Iterable[bytes]) -> None:
        """Write all lines or none.

        Raises:
            OSError: they could not be written.
        """
        block = b"".join(lines)
        if not block:
            return
        file = self._file or self._begin()
        try:
            rest = memoryview(block)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            self._take_back()
            raise
        self._size += len(block)
        if self._size >= self._rotate_bytes:
            self.close()

    def close(self) -> None:
        """Bring the file to the disk and end it; the next lines go to a new one."""
        file, self._file = self._file, None
        if file is not None:
            with file:
                os.fsync(file.fileno())

    def _begin(self) -> FileIO:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._number += 1
        path = self._folder / f"{self._stem}-{self._number:04d}.jsonl"
        self._file = FileIO(path, "x")
        self._size = 0
        return self._file

    def _take_back(self) -> None:
        """Cut off what a failed write left behind, and end the file."""
        file, self._file = self._file, None
        assert file is not None
        with file:
            file.truncate(self._size)
