"""How far people who grade the same pairs agree.

A pair may have any number of judgements, and nobody knows whose they are; pairs with one are left
out. ``O`` [3, 3] counts, over all pairs, how often two of a pair's judgements are ``a`` and ``b``,
each pair weighed by its number of judgements (Krippendorff's coincidences); ``n`` [3] are its sums.

Legend: ``J`` judgements, ``P`` pairs, ``3`` labels.
"""

from dataclasses import dataclass

import numpy as np

from embeddings.labeling.grades import LABELS
from embeddings.labeling.judgements import Judgements


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Figures of the pairs with two judgements or more; NaN where all judgements are one label.

    Attributes:
        pairs: how many such pairs there are.
        judgements: how many they have.
        agreement: share of pairs of judgements of one pair that are the same; the mean over pairs.
        fleiss_kappa: that, with agreement by chance taken off (Fleiss 1971), for any numbers of
            judgements.
        quadratic_kappa: Cohen's kappa with quadratic weights of two judgements of one pair, in
            both orders.
        krippendorff_alpha: for interval data: the same with chance drawn without replacement.
    """

    pairs: int
    judgements: int
    agreement: float
    fleiss_kappa: float
    quadratic_kappa: float
    krippendorff_alpha: float


def rater_agreement(judgements: Judgements) -> Agreement | None:
    """Return how far people agree, ``None`` where no pair has two judgements."""
    counts = label_counts(judgements)
    counts = counts[counts.sum(1) > 1]
    if not len(counts):
        return None
    found = agreement_figures(counts, np.ones(len(counts)))
    return Agreement(
        pairs=len(counts),
        judgements=int(counts.sum()),
        **{name: float(value) for name, value in found.items()},
    )


def agreement_figures(counts: np.ndarray, times: np.ndarray) -> dict[str, np.ndarray]:
    """Return the figures of `Agreement` of one or several collections of pairs, [...] each.

    Args:
        counts: [P, 3] judgements of each label; two or more in a pair.
        times: [..., P] how often a pair of such counts is there; need not be a whole number.
    """
    raters = counts.sum(1)
    same = (counts * (counts - 1)).sum(1) / (raters * (raters - 1))
    same = (times @ same) / times.sum(-1)
    n = times @ counts
    total = n.sum(-1)
    by_chance = n[..., :, None] * n[..., None, :] / total[..., None, None]
    distance = np.subtract.outer(np.arange(len(LABELS)), np.arange(len(LABELS))) ** 2
    apart = (distance * _coincidences(counts)).sum((1, 2))  # of a label and itself: 0
    found, expected = times @ apart, (distance * by_chance).sum((-2, -1))
    return {
        "agreement": same,
        "fleiss_kappa": _one_less(1 - same, 1 - ((n / total[..., None]) ** 2).sum(-1)),
        "quadratic_kappa": _one_less(found, expected),
        "krippendorff_alpha": _one_less(found, expected * total / (total - 1)),
    }


def against_the_others(judgements: Judgements) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what each judgement says beside what the other judgements of its pair say.

    Returns:
        The others' label (their mean, rounded half up) and the judgement's own, [n] int8 each, and
        the pair, [n] int64; of pairs with two judgements or more.
    """
    counts = label_counts(judgements)
    number = counts.sum(1)[judgements.pair] - 1
    total = (counts @ np.arange(len(LABELS)))[judgements.pair] - judgements.given
    several = number > 0
    number, total = number[several], total[several]
    others = ((2 * total + number) // (2 * number)).astype(np.int8)
    return others, judgements.given[several], judgements.pair[several]


def label_counts(judgements: Judgements) -> np.ndarray:
    """Return how many judgements of each pair have each label, [P, 3] int64."""
    cell = judgements.pair * len(LABELS) + judgements.given
    counts = np.bincount(cell, minlength=len(judgements) * len(LABELS))
    return counts.reshape(len(judgements), len(LABELS))


def _coincidences(counts: np.ndarray) -> np.ndarray:
    """Return what each pair of such counts ([P, 3]) adds to ``O``, [P, 3, 3], but its diagonal."""
    return counts[:, :, None] * counts[:, None, :] / (counts.sum(1) - 1)[:, None, None]


def _one_less(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    nowhere = np.full_like(expected, np.nan)
    return 1 - np.divide(found, expected, out=nowhere, where=expected > 1e-12)
