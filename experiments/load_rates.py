"""How much the service takes, how it answers below that, and what it does far above it."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import uvloop

from experiments.load_checks import Check, Part, at_least, at_most, equals, holds
from experiments.load_connection import Outcome
from experiments.load_generator import LoadGenerator, Results, fixed_rate, poisson
from experiments.load_memory import MemoryWatch
from experiments.load_service import Service
from experiments.load_setting import LoadConfig, payloads
from features.console import say
from features.errors import BadInputError

HELD_P99_MS = 100.0
HALF_P99_MS = 10.0
REFUSAL_MS = 50.0
GROWTH = 0.05
OVERLOAD = 3
_FIRST_RATE = 20.0
_LOWEST_RATE = 0.5
_STEP = 1.5
_HALVINGS = 4
_NEARLY = 0.95  # of the rate that was held
_RECOVERED = 0.95  # share of what was answered before that must be answered afterwards


def rates(
    config: LoadConfig,
    names: Sequence[str],
    rate: float | None,
    keep: Callable[[str, Part], None],
) -> float:
    """Run those of the parts "saturation", "half" and "overload" that ``names`` holds.

    All of them meet one service, so that what one leaves behind shows in the next.

    Args:
        config: of the load tests.
        names: of the parts.
        rate: the saturation rate, where it is known.
        keep: takes each part's name and what it found.

    Raises:
        BadInputError: the saturation rate is not known and is not to be found.
    """
    requests = config.requests()
    with config.service("rates") as service:
        ready = payloads(service.target, requests)
        if "saturation" in names:
            say("saturation ...")
            found = uvloop.run(
                saturation(service.target, ready, seconds=max(5.0, config.seconds / 6))
            )
            rate = found.figures["rate_per_s"]
            keep("saturation", found)
        if not rate:
            raise BadInputError("no saturation rate is known yet: run the part 'saturation' first")
        parts = {"half": half, "overload": overload}
        for name, part in parts.items():
            if name in names:
                say(f"{name} ...")
                keep(name, uvloop.run(part(service, ready, rate, seconds=config.seconds)))
    return rate


async def watched(
    service: Service, generator: LoadGenerator, plan: Any
) -> tuple[Results, MemoryWatch]:
    """Offer ``plan`` and sample the workers meanwhile."""
    watch = MemoryWatch(pids=service.workers())
    sampling = asyncio.create_task(watch.run())
    try:
        results = await generator.offer(plan)
    finally:
        sampling.cancel()
    return results, watch


def held(results: Results) -> bool:
    """Return whether every request was answered 200 and 99 % of them within `HELD_P99_MS`."""
    if results.count(200) < len(results.planned):
        return False
    return float(np.quantile(results.latency_ms(200), 0.99)) <= HELD_P99_MS


async def saturation(target: tuple[str, int], ready: Sequence[bytes], *, seconds: float) -> Part:
    """Find the highest fixed rate that the service holds (`held`), within 3 %.

    Rates rise by half until one is not held; the gap is halved four times; the rate found is held
    once more for ``seconds``, a twentieth lower until it is.
    """
    steps: list[dict[str, Any]] = []

    async def holds_at(rate: float, duration: float) -> bool:
        generator = LoadGenerator(target=target, payloads=ready)
        results = await generator.offer(fixed_rate(rate, duration))
        generator.close()
        steps.append({"rate": rate, "held": held(results), **results.summary()})
        say(
            f"  {rate:.0f} requests/s for {duration:g} s: {'held' if held(results) else 'not held'}"
        )
        return held(results)

    low, high = 0.0, _FIRST_RATE
    while await holds_at(high, seconds / 5):
        low, high = high, high * _STEP
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if await holds_at(middle, seconds / 2):
            low = middle
        else:
            high = middle
    while low > _LOWEST_RATE and not await holds_at(low, seconds):
        low *= 0.95
    checks = (at_least("requests per second held", low, _LOWEST_RATE),)
    return Part(checks=checks, figures={"rate_per_s": low, "steps": steps})


async def half(service: Service, ready: Sequence[bytes], rate: float, *, seconds: float) -> Part:
    """Offer half of ``rate``, evenly spaced, then a third as long at random (Poisson) moments."""
    generator = LoadGenerator(target=service.target, payloads=ready)
    say(f"  {rate / 2:.0f} requests/s, evenly spaced, for {seconds:g} s")
    even, watch = await watched(service, generator, fixed_rate(rate / 2, seconds))
    say(f"  {rate / 2:.0f} requests/s at random moments for {seconds / 3:g} s")
    random = await generator.offer(poisson(rate / 2, seconds / 3))
    generator.close()
    figures = {
        "rate_per_s": rate / 2,
        "even": even.summary(),
        "poisson": random.summary(),
        "service": watch.figures(),
    }
    checks = (
        equals("answers other than 200", len(even.planned) - even.count(200), 0),
        at_most("p99 from the planned moment, ms", _p99(even, 200), HALF_P99_MS),
    )
    return Part(checks=checks, figures=figures)


async def overload(
    service: Service, ready: Sequence[bytes], rate: float, *, seconds: float
) -> Part:
    """Offer nearly ``rate``, three times ``rate``, and nearly ``rate`` again."""
    workers = service.workers()
    before = await _nearly(service, ready, rate, seconds)
    generator = LoadGenerator(target=service.target, payloads=ready)
    say(f"  {OVERLOAD * rate:.0f} requests/s for {seconds:g} s")
    results, watch = await watched(service, generator, fixed_rate(OVERLOAD * rate, seconds))
    same = service.workers() == workers
    generator.close()
    after = await _nearly(service, ready, rate, seconds)
    figures = {
        "rate_per_s": OVERLOAD * rate,
        "load": results.summary(),
        "service": watch.figures(),
        "before": before.summary(),
        "afterwards": after.summary(),
        "share_of_429_within_bound": {
            "from_plan": _share_within(results, since="planned"),
            "from_send": _share_within(results, since="sent"),
        },
    }
    return Part(
        checks=(*_overload_checks(results, watch, same, rate), _recovered(before, after)),
        figures=figures,
    )


async def _nearly(service: Service, ready: Sequence[bytes], rate: float, seconds: float) -> Results:
    say(f"  {_NEARLY * rate:.0f} requests/s")
    generator = LoadGenerator(target=service.target, payloads=ready)
    results = await generator.offer(fixed_rate(_NEARLY * rate, min(10.0, seconds)))
    generator.close()
    return results


def _overload_checks(
    results: Results, watch: MemoryWatch, same_workers: bool, rate: float
) -> tuple[Check, ...]:
    other = len(results.planned) - results.count(200) - results.count(429)
    useful = results.count(200) / max(float(np.nanmax(results.ended)), 1e-9)
    return (
        holds("same worker processes", same_workers),
        equals("ended otherwise than 200 or 429", other, 0),
        at_least("refused with 429", results.count(429), 1),
        at_most("p99 of a 429 from the send, ms", _p99(results, 429, since="sent"), REFUSAL_MS),
        at_most("p99 of a 429 from the plan, ms", _p99(results, 429), REFUSAL_MS),
        at_least("answered 200 per second meanwhile", useful, rate / 2),
        at_most("growth of the workers' memory", watch.growth(), GROWTH),
    )


def _recovered(before: Results, after: Results) -> Check:
    """Compare what was answered under the same load before and after, by the same processes."""
    share = after.count(200) / max(before.count(200), 1)
    return at_least("answered afterwards, share of before", share, _RECOVERED)


def lost(results: Results) -> int:
    """Return how many requests the service had read and never wholly answered."""
    return results.failures(Outcome.DROPPED, Outcome.CUT, Outcome.UNANSWERED)


def _p99(results: Results, status: int, *, since: str = "planned") -> float:
    values = results.latency_ms(status, since=since)
    return float(np.quantile(values, 0.99)) if len(values) else float("nan")


def _share_within(results: Results, *, since: str) -> float:
    values = results.latency_ms(429, since=since)
    return float(np.mean(values <= REFUSAL_MS)) if len(values) else float("nan")
