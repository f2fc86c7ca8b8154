"""The requests that ``benchmark-serving`` sends, and tables as large as the paper's.

Features are those of real requests; products, purchases and queries are drawn anew, from tables
that are grown to the size asked for. Legend: ``B`` requests, ``C`` candidates, ``H`` purchases,
``E`` embedding dimension, ``S`` sparse and ``D`` dense features of one level.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experiments.serving_cases import Popularity
from features.batch import RequestBatch
from ranking.pretrained_embeddings import PretrainedTable

_FIRST_NEW_ID = 1 << 40
_OLDEST = 84  # days; every purchase is younger
_LOOKUPS = 300_000  # of one case's requests together: far more rows than a cache holds
_FEWEST, _MOST = 300, 5_000  # requests of a case that differ

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FeaturePool:
    """Features of real requests and candidates to draw from.

    Attributes:
        request_ids: [S, B] int64.
        request_values: [D, B] float32, NaN where missing.
        candidate_ids: [S, C] int64.
        candidate_values: [D, C] float32.
    """

    request_ids: npt.NDArray[np.int64]
    request_values: npt.NDArray[np.float32]
    candidate_ids: npt.NDArray[np.int64]
    candidate_values: npt.NDArray[np.float32]

    @classmethod
    def of(cls, batch: RequestBatch) -> "FeaturePool":
        """Take the features of a batch, of which each level must have one record or more."""
        return cls(
            request_ids=batch.request_sparse.numpy(),
            request_values=batch.request_dense.numpy(),
            candidate_ids=batch.candidate_sparse.numpy(),
            candidate_values=batch.candidate_dense.numpy(),
        )


class RequestSource:
    """Draws requests.

    Args:
        pool: where features come from.
        product_ids: [N] int64, of the product table.
        query_ids: [N] int64, of the query table.
        seed: the same seed gives the same requests, whatever else was drawn before.
    """

    def __init__(
        self, pool: FeaturePool, product_ids: Integers, query_ids: Integers, seed: int
    ) -> None:
        self._pool = pool
        self._seed = seed
        order = np.random.default_rng([seed, 0])  # which ids are the popular ones
        self._products = order.permutation(product_ids)
        self._queries = order.permutation(query_ids)

    def draw(
        self, candidates: int, history: int, popularity: Popularity, number: int | None = None
    ) -> list[RequestBatch]:
        """Return requests of one shape.

        Args:
            candidates: of a request, all different.
            history: purchases of a request; a product may come more than once.
            popularity: see `experiments.serving_cases.Case`.
            number: of requests; by default so many that their rows fit no cache.
        """
        if number is None:
            number = min(max(_LOOKUPS // (candidates + history + 1), _FEWEST), _MOST)
        rng = np.random.default_rng([self._seed, candidates, history, popularity == "zipf"])
        products = Ranks(len(self._products), popularity)
        queries = Ranks(len(self._queries), popularity)
        return [self._request(rng, candidates, history, products, queries) for _ in range(number)]

    def _request(
        self,
        rng: np.random.Generator,
        candidates: int,
        history: int,
        products: "Ranks",
        queries: "Ranks",
    ) -> RequestBatch:
        request = rng.integers(0, self._pool.request_ids.shape[1], 1)
        shown = rng.integers(0, self._pool.candidate_ids.shape[1], candidates)
        age = np.sort(rng.integers(0, _OLDEST, history)).astype(np.int16)
        return RequestBatch(
            lengths=torch.tensor([candidates]),
            query=torch.from_numpy(self._queries[queries.draw(rng, 1)]),
            history=torch.from_numpy(self._products[products.draw(rng, history)]),
            history_age=torch.from_numpy(age),
            history_lengths=torch.tensor([history]),
            request_sparse=_columns(self._pool.request_ids, request),
            request_dense=_columns(self._pool.request_values, request),
            product=torch.from_numpy(self._products[products.draw_different(rng, candidates)]),
            candidate_sparse=_columns(self._pool.candidate_ids, shown),
            candidate_dense=_columns(self._pool.candidate_values, shown),
            clicked=torch.zeros(0),
            weight=torch.ones(1),
        )


def _columns(values: npt.NDArray[Any], chosen: Integers) -> Tensor:
    return torch.from_numpy(np.take(values, chosen, axis=1))


class Ranks:
    """Draws ranks 0 … N - 1, the most popular first.

    Args:
        number: N.
        popularity: ``zipf``: rank k in proportion to ``1 / (k + 1)``; ``uniform``: all alike.
    """

    def __init__(self, number: int, popularity: Popularity) -> None:
        self.number = number
        self._sums: npt.NDArray[np.float64] | None = None
        if popularity == "zipf":
            sums = np.cumsum(1 / np.arange(1, number + 1))
            self._sums = sums / sums[-1]

    def draw(self, rng: np.random.Generator, size: int) -> Integers:
        """Return [size] ranks, each drawn by itself."""
        if self._sums is None:
            return rng.integers(0, self.number, size)
        return np.searchsorted(self._sums, rng.random(size), side="right")

    def draw_different(self, rng: np.random.Generator, size: int) -> Integers:
        """Return [size] ranks in the order drawn, none twice.

        Raises:
            ValueError: there are not so many.
        """
        if size > self.number:
            raise ValueError(f"{size} different ranks of {self.number} cannot be drawn")
        found = self.draw(rng, 2 * size)
        while len(first := np.unique(found, return_index=True)[1]) < size:
            found = np.concatenate([found, self.draw(rng, 2 * size)])
        return found[np.sort(first)[:size]]


def grown_table(table: PretrainedTable, rows: int, seed: int) -> PretrainedTable:
    """Return a table of ``rows`` rows: the given one's first, then random ones of its length.

    Args:
        table: a pretrained table with one row or more.
        rows: of the result; the first of the given ones where it has more.
        seed: of the random rows.
    """
    assert isinstance(table.weight, np.ndarray)
    have = min(len(table.ids), rows)
    rng = np.random.default_rng([seed, 1])
    weight = np.empty((rows, table.weight.shape[1]), table.weight.dtype)
    weight[:have] = table.weight[:have]
    scale = float(np.sqrt(np.square(weight[:have], dtype=np.float64).mean()))
    block = 1 << 16  # so that no second table stands in memory
    for start in range(have, rows, block):
        part = weight[start : start + block]
        part[:] = scale * rng.standard_normal(part.shape, dtype=np.float32)
    return PretrainedTable(ids=grown_ids(table, rows), weight=weight)


def grown_ids(table: PretrainedTable, rows: int) -> Integers:
    """Return the ids [rows] of `grown_table`."""
    new = np.arange(max(rows - len(table.ids), 0))
    return np.concatenate([table.ids[:rows], _FIRST_NEW_ID + new])
