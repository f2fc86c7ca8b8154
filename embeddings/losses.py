"""The three losses of DashCLIP, and the negatives that two of them need.

Legend: ``B`` rows of a batch, ``M`` candidates to choose among, ``K`` negatives a tuple, ``D``
embedding dimension.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def similarities(rows: Tensor, candidates: Tensor) -> Tensor:
    """Return the ``[B, M]`` cosines of unit vectors ``[B, D]`` and ``[M, D]``, in float32.

    In bfloat16 they would be rounded to .004, which a temperature of .05 makes .08 of a logit.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return rows.float() @ candidates.float().t()


def soft_targets(similarity: Tensor, same: Tensor, alpha: float) -> Tensor:
    """Return the soft labels of image-text contrast (ALBEF, equations 6 and 7; BLIP alike).

    Args:
        similarity: ``[B, M]``, of the momentum encoders, already over the temperature.
        same: ``[B, M]``, true where a candidate is the row's own; a row's target is shared among
            all of them (two products may bear one title).
        alpha: weight of the momentum encoders' opinion.

    Returns:
        ``[B, M]``, rows sum to 1.
    """
    hard = same.to(similarity.dtype)
    hard = hard / hard.sum(1, keepdim=True)
    return alpha * similarity.softmax(1) + (1 - alpha) * hard


def contrast(similarity: Tensor, targets: Tensor) -> Tensor:
    """Return the ``[B]`` cross-entropies of ``[B, M]`` similarities against soft targets."""
    return -(similarity.log_softmax(1) * targets).sum(1)


def hard_negatives(similarity: Tensor, same: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one negative a row, the likelier the more similar (ALBEF, Section 3.2; BLIP alike).

    Args:
        similarity: ``[B, M]``, over the temperature; its softmax is what the draw follows.
        same: ``[B, M]``, true where a candidate is no negative.
        noise: ``[B, M]``, uniform in [0, 1), which decides the draw (Gumbel's trick), so that
            several processes draw what one would.

    Returns:
        ``[B]`` indices of candidates, and ``[B]`` whether the row has any negative at all; where
        it has none, its index means nothing.
    """
    gumbel = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))
    keys = (similarity.detach().float() + gumbel).masked_fill(same, -torch.inf)
    return keys.argmax(1), ~same.all(1)


def product_query_contrast(
    cosine: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float,
    *,
    shared: Tensor | None = None,
) -> Tensor:
    """Return the ``[B]`` product-query losses (PQC; paper, equation 1).

    ::

        -log( e(p, q+) / (e(p, q+) + sum_j e(p, q_j-)) ),    e(p, q) = exp(cos(p, q) / t)

    Args:
        cosine: ``[B, M]`` of each product and all queries of the batch.
        positive: ``[B]``, which of them is relevant to the product.
        negatives: ``[B, K]``, which are its negatives; -1 for none. A row without any has a loss
            of 0.
        temperature: ``t``.
        shared: ``[B, M]``, true for further queries to take as negatives.
    """
    near = cosine.gather(1, positive[:, None])
    none = negatives < 0
    negatives = torch.where(none, positive[:, None], negatives)
    parts = [near, cosine.gather(1, negatives).masked_fill(none, -torch.inf)]
    if shared is not None:
        own = torch.cat([positive[:, None], negatives], dim=1)
        parts.append(cosine.masked_fill(~shared.scatter(1, own, False), -torch.inf))
    target = torch.zeros(len(cosine), dtype=torch.long, device=cosine.device)
    return F.cross_entropy(torch.cat(parts, dim=1) / temperature, target, reduction="none")
