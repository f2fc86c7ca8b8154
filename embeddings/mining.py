"""Products that the encoders take for relevant to a query and that nobody judged so.

NOTE[DIFF]: beyond the paper, whose negatives are queries. As negatives of the query these products
teach what sets a relevant product apart from those that look like it (ANCE, Xiong and others 2021).

Legend: ``Q`` queries, ``M`` products mined a query, ``D`` embedding dimension.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from embeddings.retrieval import top_k
from features.errors import BadInputError

_BATCH = 256


@torch.no_grad()
def mine(
    embed_queries: Callable[[Tensor], Tensor],
    embed_products: Callable[[Tensor], Tensor],
    queries: np.ndarray,
    pool: np.ndarray,
    depth: int,
) -> np.ndarray:
    """Return the ``[Q, M]`` catalog rows that rank highest for each query, the nearest first.

    Args:
        embed_queries: returns ``[N, D]`` unit vectors of numbered queries.
        embed_products: returns ``[N, D]`` unit vectors of catalog rows.
        queries: ``[Q]`` numbers of the queries.
        pool: catalog rows to rank.
        depth: ``M``, not more than the pool holds.

    Raises:
        BadInputError: a vector is not finite.
    """
    near = _embedded(embed_queries, queries), _embedded(embed_products, pool)
    if not all(np.isfinite(vectors).all() for vectors in near):
        raise BadInputError(
            "the encoders' vectors are no numbers any more: lower the learning rate"
        )
    rows, _ = top_k(*near, depth)
    return pool[rows]


def _embedded(embed: Callable[[Tensor], Tensor], rows: np.ndarray) -> np.ndarray:
    parts = [embed(part).float().cpu() for part in torch.from_numpy(rows).split(_BATCH)]
    return torch.cat(parts).numpy()
