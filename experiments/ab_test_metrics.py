"""The metrics of an A/B test, their lifts, and what the reader must be warned of."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.ab_test_data import Observations
from experiments.ab_test_statistics import (
    CONFIDENCE,
    POWER,
    Ratio,
    SampleRatio,
    compare,
    ratio,
    sample_ratio,
    users_needed,
)
from features.errors import BadInputError

_NOT_SHOWN_ABOVE = 0.01  # share of the outcomes that is worth a warning


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A ratio of two sums over users.

    Attributes:
        name: in ``ab_test.json``.
        title: in tables.
        numerator: one of `Observations.totals`.
        denominator: another, or ``users``.
        definition: what it is, and why it is defined so.
    """

    name: str
    title: str
    numerator: str
    denominator: str
    definition: str


METRICS = (
    Metric(
        name="click_through_rate",
        title="Click-through rate",
        numerator="clicks",
        denominator="impressions",
        definition="clicks / impressions; an impression is a product that a request showed",
    ),
    # NOTE[DIFF]: the paper does not say what its conversion rate and its revenue are relative to.
    Metric(
        name="conversion_rate",
        title="Conversion rate",
        numerator="conversions",
        denominator="clicks",
        definition=(
            "conversions / clicks, as advertisers count: what a click that they pay for brings; "
            "with another ranker other users click, so read it beside conversions per impression"
        ),
    ),
    Metric(
        name="conversions_per_impression",
        title="Conversions per impression",
        numerator="conversions",
        denominator="impressions",
        definition="conversions / impressions, click-through rate times conversion rate",
    ),
    Metric(
        name="revenue_per_user",
        title="Revenue per user",
        numerator="revenue",
        denominator="users",
        definition=(
            "revenue / users; users are what was dealt to the buckets, so it grows as the revenue "
            "of all users would"
        ),
    ),
    Metric(
        name="revenue_per_impression",
        title="Revenue per impression",
        numerator="revenue",
        denominator="impressions",
        definition="revenue / impressions",
    ),
)


def evaluate(
    observations: Observations, *, treatment_share: float, plan_lift: float
) -> dict[str, Any]:
    """Return the content of ``ab_test.json``, but for where it came from.

    Args:
        observations: of the test.
        treatment_share: as planned, in (0, 1).
        plan_lift: relative lift that the next test is to show.

    Raises:
        BadInputError: a bucket has no user.
    """
    treated = observations.treated
    users = sample_ratio(int((~treated).sum()), int(treated.sum()), treatment_share)
    for bucket, count in (("control", users.control), ("treatment", users.treatment)):
        if count == 0:
            raise BadInputError(f"the exposures hold no user of {bucket} alone")
    found = [_metric(metric, observations, treatment_share, plan_lift) for metric in METRICS]
    return {
        "period": {"first": observations.period[0], "last": observations.period[1]},
        "models": dict(observations.models),
        "counts": dict(observations.counts),
        "users": {"control": users.control, "treatment": users.treatment},
        "sample_ratio": {
            "planned_share": users.planned_share,
            "share": users.share,
            "p_value": users.p_value,
            "mismatch": users.mismatch,
        },
        "confidence": CONFIDENCE,
        "power": POWER,
        "plan_lift": plan_lift,
        "metrics": [metric for metric in found if metric is not None],
        "warnings": _warnings(observations, users),
    }


def _metric(
    metric: Metric, observations: Observations, treatment_share: float, plan_lift: float
) -> dict[str, Any] | None:
    """Return what is known of a metric; ``None`` where the outcomes do not tell it."""
    totals = {"users": np.ones(len(observations.treated)), **observations.totals}
    if metric.numerator not in totals:
        return None
    above, below = totals[metric.numerator], totals[metric.denominator]
    treated = observations.treated
    control, treatment = (ratio(above[chosen], below[chosen]) for chosen in (~treated, treated))
    document: dict[str, Any] = {
        "name": metric.name,
        "title": metric.title,
        "definition": metric.definition,
        "control": _value(control),
        "treatment": _value(treatment),
    }
    if control is None or treatment is None:
        return document
    lift = compare(control, treatment)
    return document | {
        "absolute_lift": {"value": lift.absolute, "interval": lift.absolute_interval},
        "relative_lift": {"value": lift.relative, "interval": lift.relative_interval},
        "p_value": lift.p_value,
        "detectable_lift": lift.detectable,
        "users_needed": users_needed(control, plan_lift, treatment_share),
    }


def _value(found: Ratio | None) -> dict[str, float] | None:
    if found is None:
        return None
    return {
        "value": found.value,
        "numerator": found.numerator,
        "denominator": found.denominator,
    }


def _warnings(observations: Observations, users: SampleRatio) -> list[str]:
    """Return what the reader must know before believing a lift; the worst first."""
    counts, models = observations.counts, observations.models
    warnings = []
    if users.mismatch:
        warnings.append(
            f"SAMPLE RATIO MISMATCH: {users.share:.2%} of the users are in the treatment, planned "
            f"were {users.planned_share:.2%} (p = {users.p_value:.1e}). Something lost users of "
            "one bucket, or the share was changed: do not trust any lift below."
        )
    if counts["users_in_both"]:
        warnings.append(
            f"{counts['users_in_both']:,} users met both buckets, as they do when the share or the "
            "salt changes during a test; they are left out."
        )
    if counts["outcomes_not_shown"] > _NOT_SHOWN_ABOVE * counts["outcomes"]:
        warnings.append(
            f"{counts['outcomes_not_shown']:,} of {counts['outcomes']:,} outcomes belong to no "
            "exposure; exposures may be missing."
        )
    for bucket, fingerprints in models.items():
        if len(fingerprints) > 1:
            warnings.append(f"{len(fingerprints)} rankers served the {bucket} bucket.")
    if set(models["control"]) & set(models["treatment"]):
        warnings.append("The same ranker served both buckets: this is an A/A test.")
    if counts["torn"]:
        warnings.append(f"{counts['torn']:,} files end in a torn line, which is left out.")
    return warnings
