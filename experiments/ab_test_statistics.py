"""What an A/B test shows: lifts of ratios, clustered by user, with what to trust them by.

Users are what chance dealt to the two buckets, so users are what is independent; the impressions of
one user are not. Each metric is a ratio of two sums over users, such as clicks / impressions. With
``x_u`` and ``y_u`` the numerator and denominator of user ``u``, ``U`` the users of a bucket and
``R = sum x / sum y``, the delta method gives::

    Var(R) = U / (U - 1) * sum over users of (x_u - R y_u)^2  /  (sum y)^2

    Var(R_t - R_c)     = Var(R_t) + Var(R_c)
    Var(R_t / R_c - 1) = Var(R_t) / R_c^2 + R_t^2 Var(R_c) / R_c^4

(Deng, Knoblich & Lu 2018, https://arxiv.org/abs/1803.06336). Quantiles are those of Student's t
with Welch and Satterthwaite's degrees of freedom. A p value is of the absolute lift.

Dimensions: ``U`` users of a bucket.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2, norm
from scipy.stats import t as student

Floats = npt.NDArray[np.floating[Any]]
Interval = tuple[float, float]

CONFIDENCE = 0.95
POWER = 0.8
MISMATCH_BELOW = 0.001  # p value of the sample-ratio check


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A metric of one bucket.

    Attributes:
        numerator: sum over users.
        denominator: sum over users, above 0.
        users: ``U``.
        variance: of `value`; ``None`` with fewer than two users.
    """

    numerator: float
    denominator: float
    users: int
    variance: float | None

    @property
    def value(self) -> float:
        """The metric."""
        return self.numerator / self.denominator

    @property
    def user_variance(self) -> float | None:
        """Variance of `value` times the number of users: what one user brings."""
        return None if self.variance is None else self.variance * self.users


@dataclass(frozen=True, slots=True, kw_only=True)
class Lift:
    """How far a treatment is from its control.

    Attributes:
        absolute: treatment minus control.
        absolute_interval: 95 %; ``None`` where a bucket has fewer than two users.
        relative: treatment / control - 1; ``None`` where the control is not above 0.
        relative_interval: 95 %; ``None`` with any of the two above.
        p_value: two-sided, of no difference; ``None`` with `absolute_interval`.
        detectable: the smallest relative lift that so many users show with a power of 80 % at the
            5 % level; ``None`` with `relative_interval`.
    """

    absolute: float
    absolute_interval: Interval | None
    relative: float | None
    relative_interval: Interval | None
    p_value: float | None
    detectable: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRatio:
    """Are the buckets as large as planned? If not, something lost users and no lift is safe.

    Attributes:
        control: users.
        treatment: users.
        planned_share: of the treatment.
        p_value: of a chi-square test with one degree of freedom.
    """

    control: int
    treatment: int
    planned_share: float
    p_value: float

    @property
    def share(self) -> float:
        """The treatment's share of the users."""
        return self.treatment / (self.control + self.treatment)

    @property
    def mismatch(self) -> bool:
        """Whether the deviation is too large for chance."""
        return self.p_value < MISMATCH_BELOW


def ratio(numerator: Floats, denominator: Floats) -> Ratio | None:
    """Return ``sum(numerator) / sum(denominator)`` with its variance.

    Args:
        numerator: ``[U]``, sum of each user.
        denominator: ``[U]``, the same; not negative.

    Returns:
        The ratio; ``None`` where the denominator is 0.
    """
    users = len(numerator)
    above, below = float(numerator.sum()), float(denominator.sum())
    if below == 0:
        return None
    variance = None
    if users > 1:
        deviation = numerator - above / below * denominator
        variance = users / (users - 1) * float(deviation @ deviation) / below**2
    return Ratio(numerator=above, denominator=below, users=users, variance=variance)


def compare(control: Ratio, treatment: Ratio) -> Lift:
    """Return the lift of the treatment over the control."""
    c, t = control.value, treatment.value
    relative = t / c - 1 if c > 0 else None
    if control.variance is None or treatment.variance is None:
        return Lift(
            absolute=t - c,
            absolute_interval=None,
            relative=relative,
            relative_interval=None,
            p_value=None,
            detectable=None,
        )
    parts = ((treatment.variance, treatment.users - 1), (control.variance, control.users - 1))
    quantile, p_value = _welch(t - c, parts)
    error = math.sqrt(treatment.variance + control.variance)
    interval = detectable = None
    if relative is not None:
        parts = (
            (treatment.variance / c**2, treatment.users - 1),
            (t**2 * control.variance / c**4, control.users - 1),
        )
        relative_error = math.sqrt(sum(variance for variance, _ in parts))
        interval = _around(relative, _welch(relative, parts)[0] * relative_error)
        detectable = _reach() * error / c
    return Lift(
        absolute=t - c,
        absolute_interval=_around(t - c, quantile * error),
        relative=relative,
        relative_interval=interval,
        p_value=p_value,
        detectable=detectable,
    )


def sample_ratio(control: int, treatment: int, planned_share: float) -> SampleRatio:
    """Test the numbers of users in the buckets against the planned share.

    Args:
        control: users.
        treatment: users; one of the two is above 0.
        planned_share: of the treatment, in (0, 1).
    """
    users = control + treatment
    expected = users * planned_share
    square = (treatment - expected) ** 2 / (expected * (1 - planned_share))
    return SampleRatio(
        control=control,
        treatment=treatment,
        planned_share=planned_share,
        p_value=float(chi2.sf(square, 1)),
    )


def users_needed(control: Ratio, lift: float, treatment_share: float) -> int | None:
    """Return how many users, of both buckets together, show a lift with a power of 80 %.

    Users of the test are taken to be like those of ``control``; the treatment multiplies each one's
    numerator, and so their spread too.

    Args:
        control: what is known of the metric.
        lift: relative, not 0.
        treatment_share: in (0, 1).

    Returns:
        The number; ``None`` where the control is not above 0 or has fewer than two users.
    """
    if control.user_variance is None or control.value <= 0:
        return None
    spread = (1 + lift) ** 2 / treatment_share + 1 / (1 - treatment_share)
    effect = lift * control.value
    return math.ceil(_reach() ** 2 * control.user_variance * spread / effect**2)


def _reach() -> float:
    """Return how many standard errors an effect must be away from 0 to be seen."""
    return float(norm.ppf((1 + CONFIDENCE) / 2) + norm.ppf(POWER))


def _around(value: float, margin: float) -> Interval:
    return value - margin, value + margin


def _welch(lift: float, parts: tuple[tuple[float, int], ...]) -> tuple[float, float]:
    """Return the quantile of an interval, and the p value of no lift.

    Args:
        lift: what was found.
        parts: variances that add up to the lift's, each with its degrees of freedom.
    """
    total = sum(variance for variance, _ in parts)
    if total == 0:  # no user differs from the others of the bucket
        return 0.0, 1.0 if lift == 0 else 0.0
    freedom = total**2 / sum(variance**2 / own for variance, own in parts)
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, freedom))
    return quantile, float(2 * student.sf(abs(lift) / math.sqrt(total), freedom))
