"""Transforms fitted on training rows: raw ids to rows, raw numbers to scaled values and bins.

They are modules, so that a saved model carries them and serving runs the same code. Dimensions:
``N`` records of one level (requests or candidates), ``S`` sparse features, ``D`` dense features.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from features.id_map import IdMap

_MOST_SAMPLED = 1 << 22  # records whose quantiles are taken


class LevelTransforms(nn.Module):
    """The transforms of the features of one level.

    Dense values are made ``(log1p(|x|) sign(x) - mean) / std``, a missing one (NaN) 0; their bin
    is 0 where missing, else 1 + the number of boundaries below the value.
    """

    # NOTE[DIFF]: the paper does not say how dense features enter its DCN. Here each stands beside
    # an embedding of its quantile bin: a product of weights alone follows no step in a value.

    boundaries: Tensor  # [D, bins - 1] float32, ascending, padded with +inf where fewer differ
    mean: Tensor  # [D]
    std: Tensor  # [D]

    def __init__(
        self,
        sparse: Sequence[str],
        dense: Sequence[str],
        vocabularies: Sequence[np.ndarray],
        boundaries: np.ndarray,
        mean: np.ndarray,
        std: np.ndarray,
    ) -> None:
        super().__init__()
        self.sparse = tuple(sparse)
        self.dense = tuple(dense)
        maps = [IdMap(ids) for ids in vocabularies]
        self.vocabularies = nn.ModuleList(maps)
        self._sizes = [len(ids) + 1 for ids in maps]
        self.register_buffer("boundaries", torch.from_numpy(boundaries.astype(np.float32)))
        self.register_buffer("mean", torch.from_numpy(mean.astype(np.float32)))
        self.register_buffer("std", torch.from_numpy(std.astype(np.float32)))

    @property
    def tables(self) -> dict[str, int]:
        """Trainable tables that the rows of `forward` point into: name to number of rows."""
        sizes = {f"{n}_id": size for n, size in zip(self.sparse, self._sizes, strict=True)}
        bins = self.boundaries.shape[1] + 2
        return sizes | ({f"{name}_bin": bins for name in self.dense} if bins > 2 else {})

    def forward(self, ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Encode N records.

        Args:
            ids: [S, N] int64 raw ids.
            values: [D, N] float32, NaN where missing.

        Returns:
            rows [S + D (where binned), N] int64 in the order of `tables`, and scaled values
            [N, D] float32.
        """
        rows = [vocabulary(ids[i]) for i, vocabulary in enumerate(self.vocabularies)]
        missing = values.isnan()
        if self.boundaries.shape[1] > 0:
            for i in range(values.shape[0]):
                bins = torch.bucketize(values[i], self.boundaries[i]) + 1
                rows.append(bins.masked_fill_(missing[i], 0))
        scaled = values.sign() * values.abs().log1p()
        scaled = ((scaled - self.mean[:, None]) / self.std[:, None]).masked_fill_(missing, 0.0)
        empty = torch.zeros(0, ids.shape[1], dtype=torch.int64)
        return torch.stack(rows) if rows else empty, scaled.t().contiguous()


def fit(
    sparse: Sequence[str],
    dense: Sequence[str],
    parts: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    min_count: int,
    bins: int,
) -> LevelTransforms:
    """Fit the transforms of one level on its training records.

    Args:
        sparse: names of the S sparse features.
        dense: names of the D dense features.
        parts: arrays (ids [S, n] int64, values [D, n] float32) of successive training records.
        min_count: a sparse value seen in fewer records becomes the unknown row 0, which is
            thereby trained too.
        bins: quantile bins of each dense feature; 0 or 1 for none.

    Vocabularies and mean and standard deviation use every record; quantiles use every
    ``n // 20_000``-th one of a part of n, and fewer of each part where there are many parts.
    """
    counts = [_Counter() for _ in sparse]
    moments = np.zeros((3, len(dense)))  # count, sum, sum of squares of what is present
    sample = _Sample()
    for ids, values in parts:
        for counter, column in zip(counts, ids, strict=True):
            counter.add(column)
        present = ~np.isnan(values)
        logs = np.where(present, np.sign(values) * np.log1p(np.abs(values)), 0).astype(np.float64)
        moments += [present.sum(1), logs.sum(1), (logs * logs).sum(1)]
        sample.add(values[:, :: max(1, values.shape[1] // 20_000)])
    number = np.maximum(moments[0], 1)
    mean = moments[1] / number
    std = np.sqrt(np.maximum(moments[2] / number - mean * mean, 0))
    return LevelTransforms(
        sparse,
        dense,
        [counter.frequent(min_count) for counter in counts],
        _boundaries(sample.values(), bins) if sample else np.zeros((0, 0)),
        mean,
        np.where(std > 1e-6, std, 1.0),
    )


class _Counter:
    """Counts ids over parts."""

    def __init__(self) -> None:
        self._ids = np.zeros(0, dtype=np.int64)
        self._counts = np.zeros(0, dtype=np.int64)

    def add(self, column: np.ndarray) -> None:
        found = pa.array(column).value_counts()
        ids = np.concatenate([self._ids, found.field("values").to_numpy()])
        counts = np.concatenate([self._counts, found.field("counts").to_numpy()])
        self._ids, inverse = np.unique(ids, return_inverse=True)
        self._counts = np.bincount(inverse, weights=counts).astype(np.int64)

    def frequent(self, min_count: int) -> np.ndarray:
        """Return the ids seen at least ``min_count`` times, the most frequent first."""
        kept = self._counts >= min_count
        ids, counts = self._ids[kept], self._counts[kept]
        return ids[np.lexsort((ids, -counts))]


class _Sample:
    """Records of all parts, thinned evenly so that at most `_MOST_SAMPLED` of them are kept."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._number = 0
        self._stride = 1

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, values: np.ndarray) -> None:
        """Add a part's values [D, n]."""
        # A copy: the part would stay in memory with a view of it.
        self._parts.append(values[:, :: self._stride].copy())
        self._number += self._parts[-1].shape[1]
        while self._number > _MOST_SAMPLED:
            self._stride *= 2
            self._parts = [part[:, ::2].copy() for part in self._parts]
            self._number = sum(part.shape[1] for part in self._parts)

    def values(self) -> np.ndarray:
        """Return [D, N] of what is kept."""
        return np.concatenate(self._parts, axis=1)


def _boundaries(sample: np.ndarray, bins: int) -> np.ndarray:
    """Return [D, max(bins - 1, 0)] distinct quantiles of each row, padded with +inf."""
    boundaries = np.full((len(sample), max(bins - 1, 0)), np.inf)
    for row, values in zip(boundaries, sample, strict=True):
        present = values[~np.isnan(values)]
        if bins > 1 and len(present):
            distinct = np.unique(np.quantile(present, np.arange(1, bins) / bins))
            row[: len(distinct)] = distinct
    return boundaries
