"""The time below which a request cannot be served on this machine, from rates measured on it.

A fused model must read the rows of its tables that a request names and its dense weights, and must
do the multiply-adds of its matrix products. Those bytes and operations over the rates that one core
reaches are the limit. What is left out makes the limit the lower: id maps, element-wise work, the
calls of operators.

Legend: ``m, k, n`` a product of [m, k] and [k, n].
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.serving_cases import Popularity
from experiments.serving_workload import Ranks
from features.batch import RequestBatch
from ranking.ranker import Ranker

GATHERED_BYTES = 256  # of a row: an int8 embedding of the paper's size, without scale and offset

_IDS = 4_096  # rows gathered by one call
_REPEATS = 60
_STREAM_BYTES = 1 << 28
_SQUARE = (1024, 2048)
_BITS = {"float32": 32, "float16": 16, "int8": 8, "int4": 4}
_SCALE_BYTES = 4  # of a quantised row: scale and offset

Shape = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one core reaches.

    Each is the fastest of several tries.

    Attributes:
        gather: bytes a second of rows of 256 bytes read at random, by popularity of the rows.
        stream: bytes a second read in order from a block that no cache holds.
        weights: bytes a second read in order, again and again, from a block as large as the dense
            weights.
        square: float32 operations a second (two a multiply-add) of a large square product.
    """

    gather: dict[Popularity, float]
    stream: float
    weights: float
    square: float

    @classmethod
    def measure(cls, rows: int, weight_bytes: int, seed: int) -> "Rates":
        """Measure on the core that this process runs on.

        Args:
            rows: of the table that is gathered from.
            weight_bytes: of the dense weights.
            seed: of what is read.
        """
        return cls(
            gather={p: _gather(rows, p, seed) for p in ("zipf", "uniform")},
            stream=_stream(_STREAM_BYTES, 10),
            weights=_stream(weight_bytes, 10 * _REPEATS),
            square=max(_square(side) for side in _SQUARE),
        )

    def about(self) -> dict[str, Any]:
        """Return the rates in units to read, for ``serving.json``."""
        return {
            "gather_gb_per_second": {name: rate / 1e9 for name, rate in self.gather.items()},
            "stream_gb_per_second": self.stream / 1e9,
            "weights_gb_per_second": self.weights / 1e9,
            "square_product_gflop_per_second": self.square / 1e9,
        }


def _gather(rows: int, popularity: Popularity, seed: int) -> float:
    """Return the better of torch's and numpy's gathers."""
    rng = np.random.default_rng([seed, 2])
    table = rng.integers(0, 256, (rows, GATHERED_BYTES), np.uint8)
    of_rank = rng.permutation(rows)
    ranks = Ranks(rows, popularity)
    batches = [of_rank[ranks.draw(rng, _IDS)] for _ in range(_REPEATS)]
    tensor = torch.from_numpy(table)
    tensors = [torch.from_numpy(ids) for ids in batches]
    best = min(
        _fastest([lambda ids=ids: table.take(ids, axis=0) for ids in batches]),  # type: ignore[misc]
        _fastest([lambda ids=ids: tensor.index_select(0, ids) for ids in tensors]),  # type: ignore[misc]
    )
    return _IDS * GATHERED_BYTES / best


def _stream(size: int, repeats: int) -> float:
    block = torch.ones(max(size // 4, 1))
    return block.nbytes / _fastest([block.sum] * repeats)


def _square(side: int) -> float:
    left, right = torch.randn(side, side), torch.randn(side, side)
    return 2 * side**3 / _fastest([lambda: left @ right] * 9)


def _fastest(calls: Sequence[Callable[[], Any]]) -> float:
    """Return the least of the seconds that the calls take, to be free of other work."""
    seconds = []
    for call in calls:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class _Products(TorchDispatchMode):
    """Notes the matrix products that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[Shape] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self._note(args[0], args[1])
        elif name in ("addmm", "baddbmm"):
            self._note(args[1], args[2])
        return func(*args, **(kwargs or {}))

    def _note(self, left: torch.Tensor, right: torch.Tensor) -> None:
        shape = (left.shape[-2], left.shape[-1], right.shape[-1])
        self.shapes += [shape] * (left.shape[0] if left.dim() == 3 else 1)


def matrix_products(ranker: Ranker, batch: RequestBatch) -> list[Shape]:
    """Return the matrix products that the trained ranker does to score a batch."""
    with torch.no_grad():
        encoded = ranker.encode(batch)
        with _Products() as products:
            ranker(encoded)
    return products.shapes


def products_seconds(shapes: Sequence[Shape]) -> float:
    """Return how long products of these shapes take on this core, weights in its caches."""
    pairs = [(torch.randn(m, k), torch.randn(n, k).t()) for m, k, n in shapes]

    def all_of_them() -> None:
        for left, right in pairs:
            torch.mm(left, right)

    return _fastest([all_of_them] * _REPEATS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a ranker must do for a request, beside the rows that it reads.

    Attributes:
        weight_bytes: of the dense layers.
        multiply_adds: of the matrix products, by number of candidates.
        products_ms: time of products of these shapes alone, by number of candidates.
        request_rows: rows of trained tables read once a request.
        candidate_rows: rows of trained tables read for each candidate.
        trained_dim: of those rows.
        dim: of the rows of the product and of the query table.
    """

    weight_bytes: int
    multiply_adds: dict[int, int]
    products_ms: dict[int, float]
    request_rows: int
    candidate_rows: int
    trained_dim: int
    dim: int

    @classmethod
    def measure(cls, ranker: Ranker, requests: Sequence[RequestBatch]) -> "Work":
        """Count, and time the products.

        Args:
            ranker: the trained one, with product and query tables.
            requests: one for each number of candidates.
        """
        assert ranker.pretrained is not None
        shapes = {int(r.lengths[0]): matrix_products(ranker, r) for r in requests}
        return cls(
            weight_bytes=sum(p.nbytes for p in ranker.dense_parameters()),
            multiply_adds={c: sum(m * k * n for m, k, n in s) for c, s in shapes.items()},
            products_ms={c: 1e3 * products_seconds(s) for c, s in shapes.items()},
            request_rows=len(ranker.request_transforms.tables),
            candidate_rows=len(ranker.candidate_transforms.tables),
            trained_dim=ranker.config.embedding_dim,
            dim=ranker.pretrained.embedding_bags["product"].weight.shape[1],
        )

    def row_bytes(self, candidates: int, history: int, table_dtype: str) -> int:
        """Return the bytes of the rows that a request names."""
        pretrained = (candidates + history + 1) * bytes_of_row(self.dim, table_dtype)
        trained = self.request_rows + candidates * self.candidate_rows
        return pretrained + trained * bytes_of_row(self.trained_dim, table_dtype)


def bytes_of_row(dim: int, table_dtype: str) -> int:
    """Return the bytes of a row of a table: a quantised one has a scale and an offset."""
    bits = _BITS[table_dtype]
    return dim * bits // 8 + (_SCALE_BYTES if bits <= 8 else 0)


def limit(
    work: Work, rates: Rates, *, candidates: int, history: int, table_dtype: str, popularity: str
) -> dict[str, Any]:
    """Return the limit of a request and what it is made of, in milliseconds.

    ``limit_ms`` takes the arithmetic at the rate of a large square product and the weights at that
    of a block of their size; ``limit_at_shapes_ms`` takes the time of the model's own products,
    which are smaller and read the weights themselves.
    """
    row_bytes = work.row_bytes(candidates, history, table_dtype)
    rows_ms = 1e3 * row_bytes / {str(p): rate for p, rate in rates.gather.items()}[popularity]
    weights_ms = 1e3 * work.weight_bytes / rates.weights
    arithmetic_ms = 1e3 * 2 * work.multiply_adds[candidates] / rates.square
    return {
        "row_bytes": row_bytes,
        "weight_bytes": work.weight_bytes,
        "multiply_adds": work.multiply_adds[candidates],
        "rows_ms": rows_ms,
        "weights_ms": weights_ms,
        "arithmetic_ms": arithmetic_ms,
        "products_ms": work.products_ms[candidates],
        "limit_ms": rows_ms + weights_ms + arithmetic_ms,
        "limit_at_shapes_ms": rows_ms + work.products_ms[candidates],
    }


def to_json(work: Work, rates: Rates) -> dict[str, Any]:
    """Return both as a document that `from_json` reads."""
    return {"work": asdict(work), "rates": asdict(rates)}


def from_json(document: dict[str, Any]) -> tuple[Work, Rates]:
    """Return what `to_json` was given; JSON has turned the numbers of candidates into texts."""
    work = dict(document["work"])
    for name in ("multiply_adds", "products_ms"):
        work[name] = {int(count): value for count, value in work[name].items()}
    return Work(**work), Rates(**document["rates"])
