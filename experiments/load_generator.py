"""An open-loop HTTP load generator: requests go out by a plan, whatever the answers do.

A closed loop waits for an answer before it sends the next request, so a server that stalls also
stops the clock that would have shown it ("coordinated omission"). Here every request has a planned
moment, is sent then on any free connection, and its latency counts from the plan: what waits for a
connection, or behind a stalled server, waits on the record. The latency from the actual send is
kept beside it, because on a machine shared with the server the generator itself is sometimes late.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.load_connection import Connection, OnAnswer, Outcome
from experiments.load_timer import Alarm

Floats = npt.NDArray[np.float64]

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999, "max": 1.0}
_OPENING_S = 2.0  # what the first connections may take


def fixed_rate(rate: float, seconds: float) -> Floats:
    """Return ``[rate * seconds]`` moments, in seconds from the start, evenly spaced."""
    return np.arange(max(1, round(rate * seconds))) / rate


def poisson(rate: float, seconds: float, seed: int = 0) -> Floats:
    """Return as many moments as `fixed_rate` with exponential gaps, as of independent users."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, size=max(1, round(rate * seconds)))
    return np.cumsum(gaps)


def at_once(count: int) -> Floats:
    """Return ``[count]`` zeros: every request as soon as a connection is free (a closed loop)."""
    return np.zeros(count)


def http_request(
    target: tuple[str, int],
    path: str,
    body: bytes = b"",
    *,
    method: str = "POST",
    headers: Sequence[tuple[str, str]] = (("Content-Type", "application/json"),),
) -> bytes:
    """Return a whole HTTP/1.1 request, head and body, ready to be sent many times."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {target[0]}:{target[1]}"]
    lines += [f"{name}: {value}" for name, value in headers]
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What became of N requests; moments are in seconds from the start of the plan."""

    planned: Floats  # [N]
    sent: Floats  # [N], NaN where never sent
    ended: Floats  # [N]
    outcomes: npt.NDArray[np.int8]  # [N], of `Outcome`
    statuses: npt.NDArray[np.int16]  # [N], 0 without an answer
    connections: int  # the most that were open at once
    processor_s: float  # processor time of the generator's process

    def count(self, status: int) -> int:
        """Return how many were answered with ``status``."""
        return int((self.statuses == status).sum())

    def failures(self, *outcomes: Outcome) -> int:
        """Return how many ended as one of ``outcomes``; without any: all that were not answered."""
        if not outcomes:
            return int((self.outcomes != Outcome.ANSWERED).sum())
        return int(np.isin(self.outcomes, outcomes).sum())

    def latency_ms(self, status: int, *, since: str = "planned") -> Floats:
        """Return the latencies in ms of the answers of ``status``, from "planned" or "sent"."""
        rows = self.statuses == status
        return (self.ended[rows] - getattr(self, since)[rows]) * 1e3

    def summary(self) -> dict[str, Any]:
        """Return counts by status and failure, and quantiles in ms, ready for JSON."""
        seconds = max(float(self.planned[-1]), 1e-9)
        elapsed = max(float(np.nanmax(self.ended)), 1e-9)
        statuses = sorted(int(s) for s in np.unique(self.statuses) if s)
        failed = Counter(Outcome(int(o)).name.lower() for o in self.outcomes if o)
        late = (self.sent - self.planned)[~np.isnan(self.sent)] * 1e3
        return {
            "requests": len(self.planned),
            "offered_per_s": (len(self.planned) - 1) / seconds if self.planned[-1] else None,
            "answered_200_per_s": self.count(200) / elapsed,
            "statuses": {str(s): self.count(s) for s in statuses},
            "failures": dict(failed),
            "latency_from_plan_ms": {str(s): quantiles(self.latency_ms(s)) for s in statuses},
            "latency_from_send_ms": {
                str(s): quantiles(self.latency_ms(s, since="sent")) for s in statuses
            },
            "sent_after_plan_ms": quantiles(late),
            "most_connections": self.connections,
            "generator_processor_s": self.processor_s,
            "generator_share_of_a_core": self.processor_s / elapsed,
        }


def quantiles(values: Floats) -> dict[str, float]:
    """Return p50 to p99.9 and the maximum of ``values``; empty without values."""
    if not len(values):
        return {}
    return {name: float(np.quantile(values, q, method="higher")) for name, q in QUANTILES.items()}


@dataclass(slots=True, kw_only=True)
class LoadGenerator:
    """Offers prepared requests to one server.

    Args:
        target: host (an IPv4 address) and port.
        payloads: whole HTTP requests; request ``i`` is number ``i % len(payloads)``.
        connections: opened before the plan begins, one after another, so that the server's worker
            processes share them; used in turn.
        most_connections: the pool grows to this when no connection is free; beyond it requests
            wait, their latency running.
        grace_s: how long answers may take after the last planned moment.
        on_answer: called with each request's number, status and body.
    """

    target: tuple[str, int]
    payloads: Sequence[bytes]
    connections: int = 64
    most_connections: int = 512
    grace_s: float = 10.0
    on_answer: OnAnswer | None = None
    _planned: Floats = field(default_factory=lambda: np.zeros(0))
    _moments: list[float] = field(default_factory=list)
    _sent: list[float] = field(default_factory=list)
    _ended: list[float] = field(default_factory=list)
    _outcomes: list[int] = field(default_factory=list)
    _statuses: list[int] = field(default_factory=list)
    _carriers: dict[int, Connection] = field(default_factory=dict)
    _next: int = 0
    _left: int = 0
    _most: int = 0
    _start: float = 0.0
    _free: deque[Connection] = field(default_factory=deque)
    _open: set[Connection] = field(default_factory=set)
    _waiting: deque[int] = field(default_factory=deque)
    _alarm: Alarm | None = None
    _done: asyncio.Event = field(default_factory=asyncio.Event)

    async def offer(self, plan: Floats) -> Results:
        """Send a request at each moment of ``plan`` ``[N]``, sorted, and return what became of all.

        May be called again: connections stay open until `close`.
        """
        await self._open_connections()
        self._prepare(plan)
        processor = time.process_time()
        self._alarm = Alarm(self._send_due)
        try:
            self._send_due()
            if self._left:
                waiting = self._moments[-1] - time.perf_counter() + self.grace_s
                await asyncio.wait_for(self._done.wait(), timeout=max(0.0, waiting))
        except TimeoutError:
            self._give_up()
        finally:
            self._alarm.close()
        return self._results(time.process_time() - processor)

    def elapsed(self) -> float:
        """Return the seconds since the plan began."""
        return time.perf_counter() - self._start

    def stop(self) -> None:
        """Send nothing more; `offer` returns once what was sent is answered, without the rest."""
        unsent = len(self._moments) - self._next
        del self._moments[self._next :]
        self._settle(unsent)

    def close(self) -> None:
        """Close every connection."""
        for connection in tuple(self._open):
            connection.abandon()

    @property
    def open_connections(self) -> frozenset[Connection]:
        """The connections that are open now."""
        return frozenset(self._open)

    def carrier(self, request: int) -> Connection:
        """Return the connection that ``request``, not yet counted as ended, was sent on."""
        return self._carriers[request]

    def sent(self, request: int, connection: Connection) -> None:
        """Note when ``request`` is written, and where to (called by its connection)."""
        self._sent[request] = time.perf_counter()
        self._carriers[request] = connection

    def ended(self, request: int, outcome: Outcome, status: int, body: bytes) -> None:
        """Note what became of ``request`` (called by its connection)."""
        self._ended[request] = time.perf_counter()
        self._outcomes[request] = outcome
        self._statuses[request] = status
        if self.on_answer is not None and outcome == Outcome.ANSWERED:
            self.on_answer(request, status, body)
        self._carriers.pop(request, None)
        self._settle(1)

    def free(self, connection: Connection) -> None:
        """Give ``connection`` what waits longest, if anything does."""
        if self._waiting:
            self._send(connection, self._waiting.popleft())
        else:
            self._free.append(connection)

    def closed(self, connection: Connection) -> None:
        """Forget ``connection``, and open another if requests wait."""
        self._open.discard(connection)
        if connection in self._free:
            self._free.remove(connection)
        if self._waiting:
            self._connect_for(self._waiting.popleft())

    async def _open_connections(self) -> None:
        """Open the first connections; a server that does not answer shows in the results."""
        until = time.perf_counter() + _OPENING_S
        while len(self._open) < self.connections and time.perf_counter() < until:
            self._connect()
            while len(self._free) < len(self._open) and time.perf_counter() < until:
                await asyncio.sleep(0.001)
            if not self._open:  # refused
                return

    def _prepare(self, plan: Floats) -> None:
        self._next, self._left, self._most = 0, len(plan), len(self._open)
        self._done.clear()
        self._start = time.perf_counter() + (0.01 if plan[-1] else 0.0)
        self._planned = plan
        self._moments = (plan + self._start).tolist()
        self._sent = [float("nan")] * len(plan)
        self._ended = [float("nan")] * len(plan)
        self._outcomes = [int(Outcome.UNANSWERED)] * len(plan)
        self._statuses = [0] * len(plan)
        self._carriers = {}

    def _send_due(self) -> None:
        now = time.perf_counter()
        while self._next < len(self._moments) and self._moments[self._next] <= now:
            request = self._next
            self._next += 1
            if self._free:
                self._send(self._free.popleft(), request)
            elif len(self._open) < self.most_connections:
                self._connect_for(request)
            else:
                self._waiting.append(request)
        if self._next < len(self._moments) and self._alarm is not None:
            self._alarm.set(self._moments[self._next])

    def _send(self, connection: Connection, request: int) -> None:
        connection.send(request, self.payloads[request % len(self.payloads)])

    def _connect(self) -> Connection:
        connection = Connection(self.target, self)
        self._open.add(connection)
        self._most = max(self._most, len(self._open))
        return connection

    def _connect_for(self, request: int) -> None:
        self._send(self._connect(), request)

    def _settle(self, count: int) -> None:
        self._left -= count
        if self._left <= 0:
            self._done.set()

    def _give_up(self) -> None:
        """Close what is unanswered; what waits for a connection is never sent."""
        self._waiting.clear()
        for connection in self._open - set(self._free):
            connection.abandon()

    def _results(self, processor_s: float) -> Results:
        count = self._next
        return Results(
            planned=self._planned[:count],
            sent=np.array(self._sent[:count]) - self._start,
            ended=np.array(self._ended[:count]) - self._start,
            outcomes=np.array(self._outcomes[:count], dtype=np.int8),
            statuses=np.array(self._statuses[:count], dtype=np.int16),
            connections=self._most,
            processor_s=processor_s,
        )
