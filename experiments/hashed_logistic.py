"""Logistic regression over hashed features: sparse values, binned dense features and crosses.

Each feature of a row becomes one of 2^20 weights, by a hash of the feature and its value; a row's
logit is the bias and the sum of its weights. Dense features are cut into quantile bins first.
Trained by Adagrad, whose per-weight steps suit features of very different frequency, over shuffled
batches. The learning rate and the number of epochs are those of the least log loss on validation
rows; with them it is trained again on training and validation rows together.

Dimensions: ``C`` rows, ``K`` hashed features of a row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from experiments.flat_table import FlatTable

BUCKET_BITS = 20
BINS = 50
LEARNING_RATES = (0.05, 0.1, 0.2)
MOST_EPOCHS = 3
BATCH_SIZE = 2048
# Pairs of sparse features that get a weight per pair of values, where a dataset has both.
CROSSES = (("query_type", "product"), ("query_type", "type"), ("query_type", "manufacturer"))

_BINNING_SAMPLE = 1 << 20
_CHUNK = 1 << 18
# Constants of the finalizer of SplitMix64, a well mixed 64-bit hash.
_STEP, _MIX_1, _MIX_2 = (
    np.uint64(constant) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)

Buckets = npt.NDArray[np.int32]
Weights = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FeatureHasher:
    """Maps rows to weights.

    Attributes:
        edges: inner bin edges of each dense feature, ascending; float32.
        crosses: pairs of places of sparse features.
    """

    edges: tuple[npt.NDArray[np.float32], ...]
    crosses: tuple[tuple[int, int], ...]

    @classmethod
    def fit(cls, table: "FlatTable") -> "FeatureHasher":
        """Cut each dense feature at the quantiles of evenly spaced rows of ``table``."""
        sample = table.values[:: max(1, len(table) // _BINNING_SAMPLE)]
        inner = np.linspace(0, 1, BINS + 1)[1:-1]
        edges = []
        for column in sample.T:
            present = column[~np.isnan(column)]
            quantiles = np.quantile(present, inner) if len(present) else np.empty(0)
            edges.append(np.unique(quantiles).astype(np.float32))
        crosses = [
            (table.sparse.index(left), table.sparse.index(right))
            for left, right in CROSSES
            if left in table.sparse and right in table.sparse
        ]
        return cls(edges=tuple(edges), crosses=tuple(crosses))

    def transform(self, table: "FlatTable") -> Buckets:
        """Return the weights of each row, int32 ``[C, K]`` in ``[0, 2^20)``."""
        fields = table.codes.shape[1] + len(self.edges) + len(self.crosses)
        buckets = np.empty((len(table), fields), dtype=np.int32)
        for start in range(0, len(table), _CHUNK):
            rows = slice(start, start + _CHUNK)
            for field, keys in enumerate(self._keys(table.codes[rows], table.values[rows])):
                buckets[rows, field] = _hash(field, keys)
        return buckets

    def _keys(
        self, codes: npt.NDArray[np.int32], values: npt.NDArray[np.float32]
    ) -> Iterator[npt.NDArray[np.uint64]]:
        for column in codes.T:
            yield column.astype(np.uint64)
        for column, edges in zip(values.T, self.edges, strict=True):
            bins = np.searchsorted(edges, column, side="right")
            # A missing value has a bin of its own.
            yield np.where(np.isnan(column), len(edges) + 1, bins).astype(np.uint64)
        for left, right in self.crosses:
            pair = codes[:, left].astype(np.uint64) << np.uint64(32)
            yield pair | codes[:, right].astype(np.uint64)


class HashedLogistic:
    """Logistic regression over the buckets of `FeatureHasher`, trained by Adagrad.

    Args:
        base_rate: click rate that the bias starts from.
        learning_rate: of Adagrad.
    """

    def __init__(self, *, base_rate: float, learning_rate: float) -> None:
        self.weight = np.zeros(1 << BUCKET_BITS, dtype=np.float32)
        self.bias = float(np.log(base_rate / (1 - base_rate)))
        self._learning_rate = learning_rate
        # Sums of squared gradients start at 1, as in FTRL: the first steps of a rare value are
        # small, which is the regulariser here.
        self._squares = np.ones_like(self.weight)
        self._bias_squares = 1.0
        self._gradient = np.zeros_like(self.weight)

    def train_epoch(
        self, parts: Sequence[tuple[Buckets, npt.NDArray[np.bool_], Weights]], *, seed: int
    ) -> None:
        """Go once over ``parts`` (buckets ``[C, K]``, clicked and weight ``[C]``), shuffled."""
        ends = np.cumsum([len(clicked) for _, clicked, _ in parts])
        order = np.random.default_rng(seed).permutation(ends[-1])
        for start in range(0, len(order), BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            part_of = np.searchsorted(ends, rows, side="right")
            chosen = [rows[part_of == i] - end + len(parts[i][1]) for i, end in enumerate(ends)]
            batch = [[a[own] for a in part] for part, own in zip(parts, chosen, strict=True)]
            self.train_step(*(np.concatenate(pieces) for pieces in zip(*batch, strict=True)))

    def train_step(self, buckets: Buckets, clicked: npt.NDArray[np.bool_], weight: Weights) -> None:
        """Take one Adagrad step on the weighted log loss of a batch; touches its weights only."""
        error = (self.predict(buckets) - clicked.astype(np.float32)) * weight
        touched = buckets.ravel()
        np.add.at(self._gradient, touched, np.repeat(error, buckets.shape[1]))
        gradient = self._gradient[touched]
        squares = self._squares[touched] + gradient**2
        # A bucket that stands here more than once gets the same value each time.
        self._squares[touched] = squares
        self.weight[touched] -= self._learning_rate * gradient / np.sqrt(squares)
        self._gradient[touched] = 0
        total = float(error.sum())
        self._bias_squares += total**2
        self.bias -= self._learning_rate * total / self._bias_squares**0.5

    def predict(self, buckets: Buckets) -> npt.NDArray[np.float32]:
        """Return click probabilities, float32 ``[C]``."""
        probability = np.empty(len(buckets), dtype=np.float32)
        for start in range(0, len(buckets), _CHUNK):
            rows = slice(start, start + _CHUNK)
            logits = self.weight[buckets[rows]].sum(axis=1) + self.bias
            probability[rows] = np.exp(-np.logaddexp(0, -logits))
        return probability


def fit_tuned(
    hasher: FeatureHasher,
    train: "FlatTable",
    validation: "FlatTable",
    *,
    seed: int,
) -> HashedLogistic:
    """Choose learning rate and epochs on ``validation``, then train on all rows.

    Args:
        hasher: fitted on ``train``.
        train: rows of the earlier weeks.
        validation: rows of the last training week.
        seed: of the order of rows.
    """
    fitting = (hasher.transform(train), train.clicked, train.weight)
    held_out = (hasher.transform(validation), validation.clicked, validation.weight)
    base_rate = float(np.average(train.clicked, weights=train.weight))
    tried: dict[tuple[float, int], float] = {}
    for rate in LEARNING_RATES:
        model = HashedLogistic(base_rate=base_rate, learning_rate=rate)
        for epoch in range(1, MOST_EPOCHS + 1):
            model.train_epoch([fitting], seed=seed + epoch)
            tried[rate, epoch] = loss = _log_loss(model.predict(held_out[0]), *held_out[1:])
            if loss > tried.get((rate, epoch - 1), np.inf):
                break
    rate, epochs = min(tried, key=tried.__getitem__)
    model = HashedLogistic(base_rate=base_rate, learning_rate=rate)
    for epoch in range(1, epochs + 1):
        model.train_epoch([fitting, held_out], seed=seed + epoch)
    return model


def _hash(field: int, keys: npt.NDArray[np.uint64]) -> Buckets:
    mixed = keys * np.uint64(1024) + np.uint64(field) + np.uint64(1)
    mixed *= _STEP
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= factor
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(64 - BUCKET_BITS)).astype(np.int32)


def _log_loss(
    probability: npt.NDArray[np.float32], clicked: npt.NDArray[np.bool_], weight: Weights
) -> float:
    likely = np.where(clicked, probability, 1 - probability).astype(np.float64)
    return float(-np.average(np.log(np.clip(likely, 1e-12, None)), weights=weight))
