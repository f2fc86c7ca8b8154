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
    """Figures of the pairs with two judgements or more.

    Attributes:
        pairs: how many such pairs there are.
        judgements: how many they have.
        agreement: share of pairs of judgements of one pair that are the same; the mean over pairs.
        fleiss_kappa: that, with agreement by chance taken off (Fleiss 1971), for any numbers of
            judgements; NaN where all judgements are the same label.
        quadratic_kappa: Cohen's kappa with quadratic weights of two judgements of one pair, in
            both orders; NaN likewise.
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
    raters = counts.sum(1)
    same = (counts * (counts - 1)).sum(1) / (raters * (raters - 1))
    coincidences = _coincidences(counts)
    n = counts.sum(0)  # the sums of `O` too
    share = n / n.sum()
    chance = (share**2).sum()
    by_chance = np.outer(n, n)
    without_itself = (by_chance - np.diag(n)) / (n.sum() - 1)
    distance = np.subtract.outer(np.arange(len(LABELS)), np.arange(len(LABELS))) ** 2
    found = (distance * coincidences).sum()
    return Agreement(
        pairs=len(counts),
        judgements=int(raters.sum()),
        agreement=float(same.mean()),
        fleiss_kappa=_one_less(1 - same.mean(), 1 - chance),
        quadratic_kappa=_one_less(found, (distance * by_chance).sum() / n.sum()),
        krippendorff_alpha=_one_less(found, (distance * without_itself).sum()),
    )


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
    """Return ``O`` [3, 3] of the judgements of each pair and label ([P, 3])."""
    weight = 1 / (counts.sum(1) - 1)
    return (counts * weight[:, None]).T @ counts - np.diag(weight @ counts)


def _one_less(found: float, expected: float) -> float:
    return float(1 - found / expected) if expected else float("nan")
