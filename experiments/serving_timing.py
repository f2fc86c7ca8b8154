"""Latencies of a served model: one request after the other, or arriving at random.

A server here is a function that answers the i-th request and returns the moments (nanoseconds) at
which its stages ended.
"""

import ctypes
import gc
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Server = Callable[[int], list[int]]

PERCENTILES = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99, "p999_ms": 0.999}

_WARM_UP = 100  # requests
_WARM_UP_SECONDS = 2.0
_SPIN_NS = 300_000  # before an arrival: asleep until then, a wake-up may come late


def closed_loop(
    serve: Server, stages: tuple[str, ...], *, different: int, requests: int, seconds: float
) -> dict[str, Any]:
    """Send one request after the other and return what that took.

    ``preempted`` is how often other work took the core away.

    Args:
        serve: answers the i-th of the different requests.
        stages: names of its stages.
        different: how many requests there are to go through again and again.
        requests: to time.
        seconds: end earlier when this much time has passed.
    """
    warm_up = _warm_up(serve, different)
    marks: npt.NDArray[np.int64] = np.zeros((requests, len(stages) + 1), np.int64)
    done = 0
    clock = time.perf_counter_ns
    with quiet():
        preempted = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        cpu = time.process_time()
        end = clock() + int(seconds * 1e9)
        while done < requests and (start := clock()) < end:
            marks[done] = [start, *serve(done % different)]
            done += 1
        cpu = time.process_time() - cpu
        preempted = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - preempted
    marks = marks[:done]
    spent = np.diff(marks, axis=1) / 1e6
    return {
        **latencies((marks[:, -1] - marks[:, 0]) / 1e6),
        "cpu_ms": cpu * 1e3 / done,
        "preempted": preempted,
        "warm_up": warm_up,
        "stages_ms": {
            name: {"mean": float(column.mean()), "p50": float(np.median(column))}
            for name, column in zip(stages, spent.T, strict=True)
        },
    }


def open_loop(
    serve: Server, *, different: int, rate: float, seconds: float, seed: int
) -> dict[str, Any]:
    """Let requests arrive at random at a fixed mean rate, whether or not the last is answered.

    The waits between arrivals are exponential. The latency of a request counts from the moment at
    which it was to arrive, so that those that queue behind a slow one count what they waited.

    Args:
        serve: see `closed_loop`.
        different: see `closed_loop`.
        rate: requests a second.
        seconds: over which they arrive.
        seed: of the arrivals.
    """
    warm_up = _warm_up(serve, different)
    rng = np.random.default_rng(seed)
    waits = rng.exponential(1e9 / rate, max(int(rate * seconds), 1))
    clock = time.perf_counter_ns
    found = np.zeros(len(waits))
    with quiet():
        begin = clock()
        arrivals = (begin + np.cumsum(waits)).astype(np.int64).tolist()
        for number, due in enumerate(arrivals):
            _wait_until(due)
            found[number] = serve(number % different)[-1] - due
        took = (clock() - begin) / 1e9
    return {
        **latencies(found / 1e6),
        "offered_per_second": rate,
        "served_per_second": len(found) / took,
        "warm_up": warm_up,
    }


def latencies(milliseconds: npt.NDArray[np.floating[Any]]) -> dict[str, Any]:
    """Return percentiles, each of them a latency that occurred, with mean, most and number."""
    found = np.quantile(milliseconds, list(PERCENTILES.values()), method="inverted_cdf")
    return {
        **dict(zip(PERCENTILES, found.tolist(), strict=True)),
        "mean_ms": float(milliseconds.mean()),
        "max_ms": float(milliseconds.max()),
        "requests": len(milliseconds),
    }


def _warm_up(serve: Server, different: int) -> int:
    """Let a runtime specialise itself, and caches fill; returns the requests that took."""
    end = time.monotonic() + _WARM_UP_SECONDS
    for number in range(_WARM_UP):
        serve(number % different)
        if time.monotonic() > end:
            return number + 1
    return _WARM_UP


def _wait_until(due: int) -> None:
    """Return at a moment of `time.perf_counter_ns`, or at once where that is past."""
    left = due - time.perf_counter_ns() - _SPIN_NS
    if left > 0:
        time.sleep(left / 1e9)
    while time.perf_counter_ns() < due:
        pass


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Python's collector of cycles from running within, as a server would between requests."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def resident_mb() -> float | None:
    """Return the memory of this process in megabytes, where Linux tells it.

    What freed blocks still hold is given back to the system first.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except (OSError, AttributeError):
        return None
    return next(int(s.split()[1]) * 1024 / 1e6 for s in lines if s.startswith("VmRSS"))


def own_cores() -> tuple[int | None, int | None]:
    """Return the core for the model and the one for Redis, None where they cannot be chosen.

    They are the last and the first that this process may use: one and the same where it has one.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None, None
    cores = sorted(os.sched_getaffinity(0))
    return cores[-1], cores[0]
