"""What the means of three people's grades leave open: bounds, and estimates by two models.

Legend: ``P`` pairs, ``7`` sums of three grades (3 to 9), ``10`` sets of three grades, ``3`` grades
(1 to 3), ``M`` mixtures of the readings of a sum.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import combinations_with_replacement, product
from typing import Any

import numpy as np

from embeddings.labeling.agreement import agreement_figures
from embeddings.labeling.scores import figures
from experiments.home_depot_models import COUNTS, GRADES, PEOPLE, SUM, SUMS, Model

SCORES = ("accuracy", "macro_f1", "kappa", "quadratic_kappa", "mean_absolute_error")
AGREEMENT = ("agreement", "fleiss_kappa", "quadratic_kappa", "krippendorff_alpha")

_MOST_PEOPLE = 10
_DIGITS = 0.0051  # means are given to two digits
_LEAST = 1e-300
_STEPS = 11  # of the share of a reading, its ends among them
_OPEN = [int(total) for total in SUMS if (total == SUM).sum() == 2]
_GIVEN = np.array(GRADES)[None]


def sums_of_three(grades: np.ndarray) -> np.ndarray:
    """Return how many of the means ([P]) are a third of each sum, [7]; others are left out."""
    sums = np.round(PEOPLE * grades)
    is_third = np.abs(sums / PEOPLE - grades) < _DIGITS
    return np.bincount(sums[is_third].astype(np.int64), minlength=10)[3:]


def means(grades: np.ndarray) -> list[dict[str, Any]]:
    """Tell of each mean how often it occurs, and the fewest people (3 or more) that can give it.

    ``readings`` are the sets of grades that these can have given; ``fewest`` is 0, and there is no
    reading, where ten people cannot.
    """
    values, pairs = np.unique(grades, return_counts=True)
    found = []
    for mean, count in zip(values.tolist(), pairs.tolist(), strict=True):
        row: dict[str, Any] = {"mean": mean, "pairs": count, "fewest": 0, "readings": []}
        for people in range(PEOPLE, _MOST_PEOPLE + 1):
            total = round(people * mean)
            if abs(total / people - mean) < _DIGITS:
                sets = combinations_with_replacement(GRADES, people)
                row["fewest"] = people
                row["readings"] = [list(grades) for grades in sets if sum(grades) == total]
                break
        found.append(row)
    return found


class Bounds:
    """What figures can be, over all mixtures of readings, and what they are by models.

    Every figure has ``least`` and ``most``, if the sums bound it, and an estimate by each model.

    Args:
        sums: [7] how many pairs have each sum.
        models: by name; of them, how likely the readings of a sum are.
    """

    def __init__(self, sums: np.ndarray, models: Mapping[str, Model]) -> None:
        self._sums = sums.astype(np.float64)
        self._joint = {name: model.joint() for name, model in models.items()}

    @cached_property
    def _mixtures(self) -> np.ndarray:
        """How many pairs have each set of grades, [M, 10]."""
        share = np.linspace(0, 1, _STEPS)
        mixtures = product(share, repeat=len(_OPEN))
        return np.stack([self._mixture(dict(zip(_OPEN, each, strict=True))) for each in mixtures])

    def _estimated(self, model: str) -> np.ndarray:
        """Return how many pairs have each set of grades by a model, [10]."""
        sets = self._joint[model].sum(1)
        return self._mixture(
            {total: sets[_of(total)[0]] / sets[_of(total)].sum() for total in _OPEN}
        )

    def _mixture(self, share: Mapping[int, float]) -> np.ndarray:
        """Return the pairs of each set where ``share`` of a sum's have the first of its two."""
        times = self._sums[SUM - SUMS[0]]
        for total, part in share.items():
            first, second = _of(total)
            times[first] *= part
            times[second] *= 1 - part
        return times

    def agreement(self) -> dict[str, dict[str, float | None]]:
        """Return the figures of `agreement_figures` of the people who graded the same pair."""
        over = agreement_figures(COUNTS, self._mixtures)
        estimates = {n: agreement_figures(COUNTS, self._estimated(n)) for n in self._joint}
        return _gathered(AGREEMENT, over, estimates)

    def own(self, cuts: tuple[float, float]) -> dict[str, dict[str, float | None]]:
        """Return the scores of a person on the label of the mean that their grade is part of."""
        label = _label(SUM / PEOPLE, cuts)[:, None]
        return self._scored(_tables(label, COUNTS / PEOPLE))

    def rest(self, cuts: tuple[float, float]) -> dict[str, dict[str, float | None]]:
        """Return the scores of a person on the label of the mean of the other two's grades."""
        others = (SUM[:, None] - _GIVEN) / (PEOPLE - 1)
        return self._scored(_tables(_label(others, cuts), COUNTS / PEOPLE))

    def others(self, cuts: tuple[float, float]) -> dict[str, dict[str, float | None]]:
        """Return the scores of a fourth person on the label of the three: estimates only."""
        label = _label(SUMS / PEOPLE, cuts)[:, None]
        found = {}
        for name, joint in self._joint.items():
            of_sum = np.stack([joint[_of(total)].sum(0) for total in SUMS.tolist()])
            share = of_sum / np.maximum(of_sum.sum(1, keepdims=True), _LEAST)
            fourth = share * self._sums[:, None]
            found[name] = figures(_tables(label, fourth).sum(0))
        return {
            score: {name: _number(each[score]) for name, each in found.items()} for score in SCORES
        }

    def _scored(self, of_set: np.ndarray) -> dict[str, dict[str, float | None]]:
        """Return the scores where each set of grades gives the tables [10, 3, 4]."""
        over = figures(np.tensordot(self._mixtures, of_set, axes=1))
        estimates = {
            name: figures(np.tensordot(self._estimated(name), of_set, axes=1))
            for name in self._joint
        }
        return _gathered(SCORES, over, estimates)


def _of(total: int) -> np.ndarray:
    """Return the positions of the sets of a sum, the first and, if there is one, the second."""
    return np.flatnonzero(total == SUM)


def _label(mean: np.ndarray, cuts: tuple[float, float]) -> np.ndarray:
    # As `experiments.datasets.published.mean_labels`.
    return np.searchsorted(cuts, mean.round(6), side="right")


def _tables(label: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Return the tables of `figures` of each row, [N, 3, 4].

    Args:
        label: [N, 1] or [N, 3], what is right where a person gives each grade.
        share: [N, 3] how often a person gives it.
    """
    label, given = np.broadcast_arrays(label, _GIVEN - 1)
    tables = np.zeros((len(share), len(GRADES), len(GRADES) + 1))
    rows = np.broadcast_to(np.arange(len(share))[:, None], share.shape)
    np.add.at(tables, (rows, label, given), share)
    return tables


def _gathered(
    names: Sequence[str],
    over: Mapping[str, np.ndarray],
    estimates: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, dict[str, float | None]]:
    """Return least, most and estimates of each figure; ``None`` where it has no value."""
    gathered: dict[str, dict[str, float | None]] = {}
    for name in names:
        known = over[name][~np.isnan(over[name])]
        bounds = {"least": known.min(), "most": known.max()} if len(known) else {}
        found = bounds | {model: each[name] for model, each in estimates.items()}
        gathered[name] = {key: _number(value) for key, value in found.items()}
    return gathered


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)
