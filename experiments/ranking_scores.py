"""The figures of one variant on one slice of the evaluation rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import average_precision_score

from experiments.paired_test import (
    Estimate,
    auc_estimate,
    log_loss_estimate,
    mean_over_weeks,
)
from experiments.ranking_results import Bools, EvaluationWeek, Floats, Integers, VariantResult
from experiments.ranking_slices import Slice
from ranking.metrics import Predictions, within_request_auc


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SliceScore:
    """What a variant reached on a slice, each figure the mean over its weeks.

    Attributes:
        auc: by seed, with what the test needs.
        loss: normalised log loss by seed, likewise.
        average_precision: mean over seeds.
        within_request_auc: mean over seeds of the mean AUC inside requests that have a click and a
            non-click in the slice; ``None`` where none has.
        calibration: mean over seeds of predicted / observed click rate.
    """

    auc: Estimate
    loss: Estimate
    average_precision: float
    within_request_auc: float | None
    calibration: float


class Scoring:
    """Measures variants on slices of the evaluation weeks.

    Args:
        weeks: all evaluation weeks.
        variants: with probabilities for all of their rows.
    """

    def __init__(self, weeks: Sequence[EvaluationWeek], variants: Sequence[VariantResult]) -> None:
        self._weeks = weeks
        self._variants = variants
        self._users = np.unique(np.concatenate([week.user_id for week in weeks]))
        self._whole_weeks: dict[tuple[int, ...], dict[str, SliceScore]] = {}

    def measure(self, part: Slice) -> dict[str, SliceScore]:
        """Return each variant's figures on a slice, by name; none where its rows are too few."""
        groups = [self._group(part, group) for group in part.groups]
        if not groups:
            return {}
        names = [variant.name for variant in self._variants]
        return {name: _mean([scores[name] for scores in groups]) for name in names}

    def _group(self, part: Slice, group: tuple[int, ...]) -> dict[str, SliceScore]:
        """Return each variant's figures on rows that are measured together.

        Whole weeks are kept, as they are a part of all rows and a slice of their own.
        """
        whole = all(part.rows[week].all() for week in group)
        if whole and group in self._whole_weeks:
            return self._whole_weeks[group]
        rows = _Rows.of(part, [week for week in self._weeks if week.week in group], self._users)
        scores = {variant.name: rows.measure(variant) for variant in self._variants}
        if whole:
            self._whole_weeks[group] = scores
        return scores


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rows:
    """The rows of a slice in weeks that are measured together.

    Attributes:
        masks: by week, bool over its candidates.
        clicked: bool ``[n]``.
        lengths: of what is left of each request; they sum to ``n``.
        user: ``[n]``, positions among all users.
        users: number of all users.
    """

    masks: Mapping[int, Bools]
    clicked: Bools
    lengths: Integers
    user: Integers
    users: int

    @classmethod
    def of(cls, part: Slice, weeks: Sequence[EvaluationWeek], users: Integers) -> "_Rows":
        """Return the rows of ``part`` in ``weeks``; ``users`` are all ids, ascending."""
        masks = {week.week: part.rows[week.week] for week in weeks}
        lengths, user = [], []
        for week in weeks:
            request = np.repeat(np.arange(len(week.lengths)), week.lengths)[masks[week.week]]
            lengths.append(np.bincount(request, minlength=len(week.lengths)))
            user.append(np.searchsorted(users, week.user_id)[request])
        return cls(
            masks=masks,
            clicked=np.concatenate([part.clicked[week.week] for week in weeks]),
            lengths=np.concatenate(lengths),
            user=np.concatenate(user),
            users=len(users),
        )

    def measure(self, variant: VariantResult) -> SliceScore:
        scores = np.concatenate(
            [variant.probability[week][:, mask] for week, mask in self.masks.items()], axis=1
        )
        labels = (self.clicked, scores, self.user, self.users, variant.seeds)
        return SliceScore(
            auc=auc_estimate(*labels),
            loss=log_loss_estimate(*labels),
            average_precision=_over([average_precision_score(self.clicked, s) for s in scores]),
            within_request_auc=_defined([self._within(score) for score in scores]),
            calibration=float(scores.mean(dtype=np.float64) / self.clicked.mean()),
        )

    def _within(self, score: Floats) -> float | None:
        predictions = Predictions(
            clicked=self.clicked,
            probability=score,
            lengths=self.lengths,
            with_history=np.zeros(len(self.lengths), dtype=np.bool_),  # of no use here
        )
        return within_request_auc(predictions)[0]


def _mean(groups: Sequence[SliceScore]) -> SliceScore:
    """Return the mean over the weeks."""
    return SliceScore(
        auc=mean_over_weeks([group.auc for group in groups]),
        loss=mean_over_weeks([group.loss for group in groups]),
        average_precision=_over([group.average_precision for group in groups]),
        within_request_auc=_defined([group.within_request_auc for group in groups]),
        calibration=_over([group.calibration for group in groups]),
    )


def _over(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _defined(values: Sequence[float | None]) -> float | None:
    """Return the mean of those that are defined, ``None`` where none is."""
    found = [value for value in values if value is not None]
    return _over(found) if found else None
