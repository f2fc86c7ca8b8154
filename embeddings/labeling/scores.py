"""How well labels agree with those of people, and how sure that is.

All figures come from a table ``[3, 4]``: how many pairs of each human label got each label, or no
grade (the last column). A pair without a grade counts as wrong: in kappas it is a category of its
own, in distances it is as far from any label as the two ends are from each other.

Legend: ``P`` pairs, ``Q`` distinct queries, ``S`` draws of the bootstrap, ``3`` labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embeddings.labeling.grades import LABELS, UNGRADED

DRAWS = 1000
_LEVEL = 95  # per cent
_N = len(LABELS)
_WRONG = np.ones((_N, _N + 1)) - np.eye(_N, _N + 1)
_STEPS = np.abs(np.subtract.outer(np.arange(_N), np.append(np.arange(_N), 0)))
_STEPS[:, _N] = _N - 1
INTERVALS = ("accuracy", "macro_f1", "kappa", "quadratic_kappa")
"""The figures that come with an interval."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """Labels beside those of people.

    Attributes:
        tables: [Q, 3, 4] the counts of each query's pairs.
    """

    tables: np.ndarray

    def figures(self) -> dict[str, Any]:
        """Return all figures, with 95 % intervals by a bootstrap over queries for `INTERVALS`."""
        table = self.tables.sum(0)
        found = {name: value.tolist() for name, value in figures(table).items()}
        drawn = figures(self._drawn())
        return {
            "pairs": int(table.sum()),
            "ungraded": int(table[:, _N].sum()),
            **found,
            "intervals": {name: _interval(drawn[name]) for name in INTERVALS},
            "confusion": table[:, :_N].tolist(),
            "confusion_ungraded": table[:, _N].tolist(),
        }

    def less(self, other: "Scored") -> dict[str, Any]:
        """Return by how much the figures `INTERVALS` exceed those of other labels of these pairs.

        The intervals are of the differences: both are drawn with the same queries.
        """
        ours, theirs = figures(self.tables.sum(0)), figures(other.tables.sum(0))
        drawn, drawn_theirs = figures(self._drawn()), figures(other._drawn())
        return {
            name: {
                "difference": float(ours[name] - theirs[name]),
                "interval": _interval(drawn[name] - drawn_theirs[name]),
            }
            for name in INTERVALS
        }

    def _drawn(self) -> np.ndarray:
        """Return the tables [S, 3, 4] of as many queries, drawn with replacement."""
        queries = len(self.tables)
        times = np.random.default_rng(0).multinomial(queries, np.full(queries, 1 / queries), DRAWS)
        return (times @ self.tables.reshape(queries, -1)).reshape(DRAWS, _N, _N + 1)


def score(human: np.ndarray, label: np.ndarray, queries: Sequence[str]) -> Scored:
    """Put labels beside those of people.

    Args:
        human: [P] int8.
        label: [P] int8; `UNGRADED` where there is none.
        queries: [P] texts; pairs of the same one are not independent of each other.
    """
    column = np.where(label == UNGRADED, _N, label).astype(np.int64)
    distinct, query = np.unique(np.asarray(queries, object), return_inverse=True)
    cell = (query.astype(np.int64) * _N + human) * (_N + 1) + column
    counts = np.bincount(cell, minlength=len(distinct) * _N * (_N + 1))
    return Scored(tables=counts.reshape(len(distinct), _N, _N + 1))


def figures(table: np.ndarray) -> dict[str, np.ndarray]:
    """Return the figures of one or several tables, [..., 3, 4] counts.

    Returns:
        ``accuracy``; ``macro_f1``; ``recall``, ``precision`` and ``f1`` of each label ([..., 3]),
        0 where nothing could be found; Cohen's ``kappa`` and ``quadratic_kappa``, NaN where chance
        alone agrees fully; ``mean_absolute_error`` in labels.
    """
    table = table.astype(np.float64)
    total = table.sum((-2, -1))
    right = np.diagonal(table[..., :_N], axis1=-2, axis2=-1)
    human, given = table.sum(-1), table.sum(-2)[..., :_N]
    f1 = _ratio(2 * right, human + given)
    return {
        "accuracy": right.sum(-1) / total,
        "macro_f1": f1.mean(-1),
        "kappa": _kappa(table, _WRONG),
        "quadratic_kappa": _kappa(table, _STEPS**2),
        "mean_absolute_error": (table * _STEPS).sum((-2, -1)) / total,
        "recall": _ratio(right, human),
        "precision": _ratio(right, given),
        "f1": f1,
    }


def _kappa(table: np.ndarray, distance: np.ndarray) -> np.ndarray:
    total = table.sum((-2, -1))
    by_chance = table.sum(-1)[..., :, None] * table.sum(-2)[..., None, :] / total[..., None, None]
    found, expected = ((distance * counts).sum((-2, -1)) for counts in (table, by_chance))
    nowhere = np.full_like(expected, np.nan)
    return 1 - np.divide(found, expected, out=nowhere, where=expected > 0)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _interval(drawn: np.ndarray) -> list[float]:
    """Return the bounds between which `_LEVEL` of the draws lie; draws without a value are left."""
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return [float("nan")] * 2
    outside = (100 - _LEVEL) / 2
    return np.percentile(drawn, [outside, 100 - outside]).tolist()
