"""What a run will take, before it starts, and whether to ask its user first."""

from dataclasses import asdict, dataclass
from typing import Any

from embeddings.labeling.grades import Grader, Pairs
from embeddings.labeling.label_run import LabelRun

SAMPLE_PAIRS = 1000
"""Pairs that an endpoint's estimate is made from."""

_SECONDS_AN_HOUR = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What grading is expected to take.

    Attributes:
        pairs: that have no answer yet; those that ask the same count each.
        hours: it will take.
        cost: in the currency of the grader's prices; 0 where nothing is charged.
        input_tokens: that an endpoint will read; 0 elsewhere.
        output_tokens: that it will write.
        basis: what the figures are from.
    """

    pairs: int
    hours: float
    cost: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    basis: str

    def sentence(self) -> str:
        """Return the estimate in one sentence."""
        parts = [f"{self.pairs:,} pairs to grade", duration(self.hours)]
        if self.input_tokens:
            parts.append(f"{self.input_tokens:,} tokens read, {self.output_tokens:,} written")
            parts.append(f"cost {self.cost:,.2f}" if self.cost else "no price is given")
        return f"{', '.join(parts)} ({self.basis})"

    def content(self) -> dict[str, Any]:
        """Return the estimate as it is put into JSON."""
        return asdict(self)


def estimate(run: LabelRun, unknown: int) -> Estimate:
    """Estimate what grading the pairs without an answer takes.

    An endpoint tells it of the requests of a sample: their size, and its limits of requests and
    tokens a minute, or a second an answer. Any other grader grades a few pairs, whose answers
    count.

    Args:
        run: its known answers are taken.
        unknown: number of pairs without an answer, at least 1.
    """
    if is_endpoint(run.grader):
        return _of_endpoint(run.grader, run.sample(SAMPLE_PAIRS), unknown)
    rate = run.measure()
    hours = unknown / rate / _SECONDS_AN_HOUR
    return Estimate(pairs=unknown, hours=hours, basis=f"at {rate:,.0f} pairs/s, measured")


def is_endpoint(grader: Grader) -> bool:
    """Return whether a grader's answers cost money."""
    from embeddings.labeling.endpoint import Endpoint

    return isinstance(grader, Endpoint)


def duration(hours: float) -> str:
    """Return a length of time in the unit that suits it."""
    if hours >= 1:
        return f"{hours:,.1f} hours"
    if hours * 60 >= 1:
        return f"{hours * 60:.0f} minutes"
    return f"{hours * _SECONDS_AN_HOUR:.0f} seconds"


def _of_endpoint(grader: Any, sample: Pairs, unknown: int) -> Estimate:
    usage, more = grader.estimate(sample), unknown / len(sample)
    batch = grader.config.mode == "batch"
    hours = usage.seconds / _SECONDS_AN_HOUR
    rounds = -(-unknown // grader.chunk_pairs)
    return Estimate(
        pairs=unknown,
        hours=hours * (rounds if batch else more),
        cost=usage.cost * more,
        input_tokens=round(usage.input_tokens * more),
        output_tokens=round(usage.output_tokens * more),
        basis=(
            f"at most, by a sample of {len(sample):,}; " if len(sample) < unknown else "at most; "
        )
        + ("a day for each file of requests" if batch else "without retries"),
    )
