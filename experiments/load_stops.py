"""Stopping the service under load: what it accepted, it answers."""

import asyncio
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from experiments.load_checks import Check, Part, at_least, equals
from experiments.load_connection import Outcome
from experiments.load_generator import LoadGenerator, Results, fixed_rate
from experiments.load_rates import lost
from experiments.load_service import Service
from experiments.load_setting import LoadConfig, payloads
from features.console import say

_BEFORE_S = 1.5
_EXIT_S = 30.0
_SHARES = (0.5, 2.0)  # of the saturation rate: below it, and with full queues
_PAUSE_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """What one stop gave; ``answered`` are the request ids of the answers of status 200."""

    results: Results
    stopped_at: float  # seconds from the start of the plan
    exited_at: float
    exit_status: int
    answered: tuple[str, ...]

    def figures(self, exposed: Sequence[str]) -> dict[str, Any]:
        """Return what became of the requests; ``exposed`` are the exposure log's request ids."""
        late = self.results.sent > self.stopped_at
        return {
            "requests": len(self.results.planned),
            "sent_after_the_signal": int(late.sum()),
            "statuses": self.results.summary()["statuses"],
            "never_connected": self.results.failures(Outcome.REFUSED),
            "never_read_by_the_service": self.results.failures(Outcome.UNREAD),
            "lost": lost(self.results),
            "answers_5xx_but_503": int(
                np.sum((self.results.statuses >= 500) & (self.results.statuses != 503))
            ),
            "seconds_to_exit": self.exited_at - self.stopped_at,
            "exit_status": self.exit_status,
            "answers": len(self.answered),
            "exposures": len(exposed),
            "answers_without_exposure": len({*self.answered} - {*exposed}),
        }


async def stop_under_load(service: Service, requests: Sequence[bytes], rate: float) -> Stop:
    """Offer ``rate`` requests per second, send SIGTERM, and go on until the service is gone."""
    answered: list[str] = []

    def note(request: int, status: int, body: bytes) -> None:
        del request
        if status == 200:
            answered.append(json.loads(body)["request_id"])

    generator = LoadGenerator(target=service.target, payloads=requests, on_answer=note)
    offering = asyncio.create_task(generator.offer(fixed_rate(rate, _BEFORE_S + _EXIT_S)))
    await asyncio.sleep(_BEFORE_S)
    stopped_at = generator.elapsed()
    service.stop()
    while service.running and not offering.done():
        await asyncio.sleep(_PAUSE_S)
    exited_at = generator.elapsed()
    generator.stop()
    results = await offering
    generator.close()
    return Stop(
        results=results,
        stopped_at=stopped_at,
        exited_at=exited_at,
        exit_status=service.end(),
        answered=tuple(answered),
    )


def stops(config: LoadConfig, rate: float) -> Part:
    """Start and stop the service ``config.stops`` times; every other time overloaded."""
    folder = config.output / "exposures"
    shutil.rmtree(folder, ignore_errors=True)
    requests = config.requests()
    found = []
    for number in range(config.stops):
        exposures = folder / str(number)
        offered = rate * _SHARES[number % len(_SHARES)]
        say(f"  stop {number + 1} of {config.stops} at {offered:.0f} requests/s")
        with config.service(f"stop-{number}", options=["--exposures", str(exposures)]) as service:
            ready = payloads(service.target, requests)
            stop = uvloop.run(stop_under_load(service, ready, offered))
        exposed = exposed_requests(exposures)
        found.append({"rate_per_s": offered, **stop.figures(exposed)})
    return Part(checks=_checks(found), figures={"stops": found})


def _checks(found: Sequence[dict[str, Any]]) -> tuple[Check, ...]:
    def total(name: str) -> int:
        return sum(stop[name] for stop in found)

    uneven = sum(stop["exposures"] != stop["answers"] for stop in found)
    return (
        at_least("answered 200", total("answers"), 1),
        equals("read by the service and never answered", total("lost"), 0),
        equals("5xx other than 503", total("answers_5xx_but_503"), 0),
        equals("exit statuses", sorted({stop["exit_status"] for stop in found}), [0]),
        equals("answers without their exposure", total("answers_without_exposure"), 0),
        equals("stops with more or fewer exposures than answers", uneven, 0),
    )


def exposed_requests(folder: Path) -> list[str]:
    """Return the request ids of all exposure lines below ``folder``."""
    return [
        json.loads(line)["request_id"]
        for file in sorted(folder.rglob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
