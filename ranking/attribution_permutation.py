"""Importance by permutation: how much worse the ranking gets when a feature comes from elsewhere.

The paper's Section 4.2.3 reports Captum's Feature Permutation, which takes one row a sample and
one column a scalar. A request here has a history of any length and candidates that share it, so
Captum is given the *positions* that features are taken from in place of the features::

    request features           candidate features
    store  query embedding     price  product embedding
    0      0                   0      0
    1      1                   1      1        row r: taken from row r, nothing moved
    2      2                   2      2
                               3      3

and permutes those. So what belongs to a request moves between requests, to all candidates of it
alike, and what belongs to a candidate between candidates.

Legend: ``B`` requests, ``C`` candidates, ``U`` users, ``M`` features of one level.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from captum.attr import FeaturePermutation
from torch import Tensor

from features.schema import LEVELS
from ranking.attribution_groups import FeatureGroup
from ranking.attribution_inputs import SampleInputs
from ranking.attribution_metrics import METRICS, Floats, metrics_by_user, with_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class PermutationImportance:
    """What permuting one group costs; intervals are of 95 %.

    Attributes:
        auc_loss: how much AUC is lost.
        auc_loss_interval: its interval.
        log_loss_rise: how much the normalised log loss rises.
        log_loss_rise_interval: its interval.
    """

    auc_loss: float
    auc_loss_interval: tuple[float, float]
    log_loss_rise: float
    log_loss_rise_interval: tuple[float, float]


def permutation_importance(
    sample: SampleInputs,
    groups: Sequence[FeatureGroup],
    clicked_c: np.ndarray,
    user_c: np.ndarray,
    *,
    permutations: int,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> list[PermutationImportance]:
    """Return the importance of each group.

    The members of a group move together: those of one level by one permutation. All groups are
    permuted alike in each repetition, so they are compared under the same draws.

    Args:
        sample: looked up, of two requests or more.
        groups: which hold each feature once.
        clicked_c: [C] bool, of both classes.
        user_c: [C] int64, the user of each candidate, counted from 0.
        permutations: repetitions, 2 or more.
        seed: of the permutations.
        on_step: called after each pass over the sample.
    """
    users = int(user_c.max()) + 1
    names = [[n for n in sample.levels if sample.levels[n] == level] for level in LEVELS]
    names = [part for part in names if part]
    rows = [torch.arange(sample.rows(sample.levels[part[0]])) for part in names]
    positions = tuple(
        row[:, None].expand(-1, len(part)) for row, part in zip(rows, names, strict=True)
    )

    def metrics(*positions: Tensor) -> Tensor:
        order = {
            name: column
            for part, row, tensor in zip(names, rows, positions, strict=True)
            for name, column in zip(part, tensor.unbind(1), strict=True)
            if not torch.equal(column, row)
        }
        found = metrics_by_user(sample.logits(order), clicked_c, user_c, users)
        on_step()
        return torch.from_numpy(found).flatten()

    group_of = {name: i for i, group in enumerate(groups) for name in group.members}
    masks = tuple(torch.tensor([[group_of[name] for name in part]]) for part in names)
    lost = [
        FeaturePermutation(metrics, _permuter(sample, seed, repetition)).attribute(
            positions, feature_mask=masks
        )
        for repetition in range(permutations)
    ]
    places = [_place(group.members[0], names) for group in groups]
    return [
        _importance(np.stack([draw[level][:, column].numpy() for draw in lost]))
        for level, column in places
    ]


def _permuter(
    sample: SampleInputs, seed: int, repetition: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return Captum's ``perm_func``: columns in the mask come from the rows of one permutation."""
    orders = {
        sample.rows(level): torch.from_numpy(
            np.random.default_rng([seed, repetition, number]).permutation(sample.rows(level))
        )
        for number, level in enumerate(LEVELS)
    }
    return lambda positions, mask: positions[orders[len(positions)]].where(mask, positions)


def _place(name: str, names: Sequence[Sequence[str]]) -> tuple[int, int]:
    return next((i, part.index(name)) for i, part in enumerate(names) if name in part)


def _importance(lost_p: Floats) -> PermutationImportance:
    """Make the importance of [P, 2 (1 + U)] losses: whole less permuted."""
    auc, log_loss = np.split(lost_p, len(METRICS), axis=1)
    auc_loss, auc_interval = with_interval(auc)
    rise, rise_interval = with_interval(0.0 - log_loss)  # not -log_loss: no -0.0
    return PermutationImportance(
        auc_loss=auc_loss,
        auc_loss_interval=auc_interval,
        log_loss_rise=rise,
        log_loss_rise_interval=rise_interval,
    )
