"""AUC and normalised log loss with what each user adds to them, so that differences have errors.

Legend: ``C`` candidates, ``U`` users, ``G`` groups, ``P`` permutations.
"""

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional as F

from ranking.metrics import base_rate_entropy

Floats = npt.NDArray[np.float64]

METRICS = ("auc", "normalized_log_loss")
_Z_95 = 1.959963984540054


def metrics_by_user(
    logits_c: Tensor, clicked_c: npt.NDArray[np.bool_], user_c: npt.NDArray[np.int64], users: int
) -> Floats:
    """Return [2, 1 + U]: `METRICS`, and the influence of each user's rows on each.

    The influence of a row is the derivative of the metric by the row's weight, divided by the
    number of rows; for the AUC that is DeLong's structural component less the AUC. Influences
    sum to 0, and the influence on a difference of metrics is the difference of influences.

    Args:
        logits_c: [C] scores.
        clicked_c: [C], of both classes.
        user_c: [C] which of the U users asked.
        users: U.
    """
    found = []
    for value, influence_c in (_auc(logits_c, clicked_c), _log_loss(logits_c, clicked_c)):
        by_user = np.bincount(user_c, weights=influence_c, minlength=users)
        found.append(np.concatenate([[value], by_user]))
    return np.stack(found)


def _auc(logits_c: Tensor, clicked_c: npt.NDArray[np.bool_]) -> tuple[float, Floats]:
    scores = logits_c.numpy()
    rank = rankdata(scores)  # ties share their mean rank
    among_class = np.empty(len(rank))
    for label in (True, False):
        among_class[clicked_c == label] = rankdata(scores[clicked_c == label])
    other_below = rank - among_class  # rows of the other class below, ties counting one half
    positives = int(clicked_c.sum())
    negatives = len(rank) - positives
    component = np.where(clicked_c, other_below / negatives, 1 - other_below / positives)
    auc = float(component[clicked_c].mean())
    return auc, (component - auc) / np.where(clicked_c, positives, negatives)


def _log_loss(logits_c: Tensor, clicked_c: npt.NDArray[np.bool_]) -> tuple[float, Floats]:
    """Return log loss / entropy of the base rate; both depend on the weights of the rows."""
    target = torch.from_numpy(clicked_c).double()
    loss_c = F.binary_cross_entropy_with_logits(logits_c.double(), target, reduction="none").numpy()
    loss, rate = loss_c.mean(), float(clicked_c.mean())
    entropy = base_rate_entropy(rate)
    slope = np.log((1 - rate) / rate)  # of the entropy, by the rate
    influence = (loss_c - loss) / entropy - loss / entropy**2 * slope * (clicked_c - rate)
    return float(loss / entropy), influence / len(clicked_c)


def with_interval(differences_pu: Floats) -> tuple[float, tuple[float, float]]:
    """Return the mean over permutations and its 95 % interval.

    Its variance is the spread between users (the infinitesimal jackknife, clustered by user) plus
    the spread between permutations divided by their number.

    Args:
        differences_pu: [P, 1 + U] differences of one metric from `metrics_by_user`, P of 2 or more.
    """
    permutations = len(differences_pu)
    value = float(differences_pu[:, 0].mean())
    influence_u = differences_pu[:, 1:].mean(axis=0)
    users = len(influence_u)
    variance = float((influence_u**2).sum()) * users / max(users - 1, 1)
    variance += float(differences_pu[:, 0].var(ddof=1)) / permutations
    half = _Z_95 * variance**0.5
    return value, (value - half, value + half)
