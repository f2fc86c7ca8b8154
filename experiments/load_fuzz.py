"""Malformed requests by the thousand: none may break the service."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from experiments.load_bodies import Request, encode, golden_requests, sized_requests
from experiments.load_checks import Part, equals
from experiments.load_connection import Outcome
from experiments.load_generator import LoadGenerator, at_once, http_request
from experiments.load_malformed import malformed
from experiments.load_schema import BY_DESIGN, exercise, schema_of
from experiments.load_service import Service
from experiments.load_setting import RANK, LoadConfig
from experiments.load_wire import malformed_messages, send_messages
from features.console import say

EXPLAIN = "/v1/explain"
_EXPLAIN_EVERY = 8
_WIRE_SHARE = 0.02
_AT_A_TIME = 2000
_CONNECTIONS = 8
_KEPT = 20
_SAY_S = 20.0


@dataclass(slots=True, kw_only=True)
class Tally:
    """What malformed requests got; ``kept`` holds the first that broke something."""

    statuses: dict[str, Counter[str]] = field(default_factory=dict)
    broken: int = 0
    by_design: Counter[str] = field(default_factory=Counter)
    kept: list[tuple[str, bytes]] = field(default_factory=list)

    def add(self, kind: str, what: str, message: bytes, *, broke: bool) -> None:
        """Count one request of ``kind`` that got ``what``: a status, or how it failed."""
        self.statuses.setdefault(kind, Counter())[what] += 1
        if what in map(str, BY_DESIGN):
            self.by_design[what] += 1
        if broke:
            self.broken += 1
            if len(self.kept) < _KEPT:
                self.kept.append((f"{kind}-{what}", message))


def fuzz(config: LoadConfig) -> Part:
    """Send ``config.malformed`` malformed requests, and what schemathesis makes.

    Raises:
        BadInputError: schemathesis is not installed.
    """
    golden = golden_requests(config.bundle)
    with config.service("fuzz") as service:
        base_url = f"http://{service.target[0]}:{service.target[1]}"
        schema = schema_of(base_url)
        workers = service.workers()
        begun = time.perf_counter()
        tally = uvloop.run(spoil(service, golden, config.malformed))
        took = time.perf_counter() - begun
        say(f"  {config.examples} requests of schemathesis for each operation and mode")
        made = exercise(schema, examples=config.examples, base_url=base_url)
        healthy = service.get("/healthz")[0]
        same = service.workers() == workers
    _keep(config.output / "broken", tally.kept)
    total = sum(sum(counts.values()) for counts in tally.statuses.values())
    checks = (
        equals("malformed requests sent", total, config.malformed),
        equals("5xx, or no answer where one is due", tally.broken, 0),
        equals("5xx to requests of schemathesis", len(made.server_errors), 0),
        equals("health afterwards", healthy, 200),
        equals("same worker processes", same, True),
    )
    figures = {
        "seconds": took,
        "statuses": {kind: dict(counts) for kind, counts in sorted(tally.statuses.items())},
        "busy_by_design": dict(tally.by_design),
        "schemathesis": {
            "requests": made.requests,
            "statuses": made.statuses,
            "server_errors": made.server_errors[:_KEPT],
            "departures_from_the_document": made.breaches,
        },
    }
    return Part(checks=checks, figures=figures)


async def spoil(service: Service, golden: Sequence[Request], count: int) -> Tally:
    """Send ``count`` malformed requests, as fast as they are answered; count what they got."""
    tally = Tally()
    messages = round(count * _WIRE_SHARE)
    told = time.perf_counter()
    for start in range(0, count - messages, _AT_A_TIME):
        size = min(_AT_A_TIME, count - messages - start)
        await send_bodies(service.target, malformed(golden, size, seed=start), tally)
        if time.perf_counter() - told > _SAY_S:
            told = time.perf_counter()
            say(f"  {start + size} of {count} malformed requests")
        if not service.running:
            break
    small = sized_requests(golden, candidates=3, history=4, count=20)
    made = malformed_messages([encode(request) for request in small], messages)
    answers = await send_messages(service.target, [message for _, message in made])
    for (kind, message), statuses in zip(made, answers, strict=True):
        wrong = any(status >= 500 and status not in BY_DESIGN for status in statuses)
        what = " ".join(map(str, statuses)) or "closed"
        tally.add(kind, what, message[0], broke=wrong)
    return tally


async def send_bodies(
    target: tuple[str, int], bodies: Sequence[tuple[str, bytes]], tally: Tally
) -> None:
    """Send malformed bodies, most to the ranking, some to the explanation."""
    paths = [EXPLAIN if i % _EXPLAIN_EVERY == 0 else RANK for i in range(len(bodies))]
    ready = [http_request(target, p, body) for p, (_, body) in zip(paths, bodies, strict=True)]
    generator = LoadGenerator(
        target=target,
        payloads=ready,
        connections=_CONNECTIONS,
        most_connections=_CONNECTIONS,
        grace_s=120.0,
    )
    results = await generator.offer(at_once(len(ready)))
    generator.close()
    for i, (kind, _) in enumerate(bodies):
        status, outcome = int(results.statuses[i]), Outcome(int(results.outcomes[i]))
        what = str(status) if status else outcome.name.lower()
        broke = not status or (status >= 500 and status not in BY_DESIGN)
        tally.add(kind, what, ready[i], broke=broke)


def _keep(folder: Path, kept: Sequence[tuple[str, bytes]]) -> None:
    """Write the first messages that broke something, as they were sent."""
    for number, (name, message) in enumerate(kept):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}-{name}.http").write_bytes(message)
