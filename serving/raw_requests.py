"""Raw requests, as clients send them, made a batch of tensors.

A raw request is a mapping, columnar for its candidates::

    {"query": "milk",
     "history": [31, 17], "history_age_days": [0, 12],              # optional, most recent first
     "features": {"query_type": "dairy", "hour": 13},               # of the request
     "candidates": {"product_id": [17, 20],
                    "features": {"brand": ["National", None], "price": [1.5, 2.0]}}}

``None`` and a feature that is left out are missing values. Dimensions as in `features.batch`.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from features.batch import RequestBatch
from features.errors import BadInputError
from features.id_map import MISSING_ID, hash_text
from features.schema import Level
from serving.inputs import Input, InputSpec

_KEPT_TEXTS = 100_000  # hashes that are kept, of texts that are not too long
_LONGEST_KEPT = 200
_SHOWN = 60
_OLDEST = np.iinfo(np.int16).max
_GREATEST = float(np.finfo(np.float32).max)


def to_batch(requests: Sequence[Mapping[str, Any]], inputs: InputSpec) -> RequestBatch:
    """Make a batch of B raw requests, which must be of the documented form.

    Raises:
        BadInputError: it names the first field that is wrong, with its place in the list where B
            is more than 1.
    """
    read = []
    for place, request in enumerate(requests):
        try:
            read.append(_Request.read(request, inputs))
        except BadInputError as error:
            if len(requests) == 1:
                raise
            raise BadInputError(f"request {place + 1}: {error}") from None
    return RequestBatch(
        lengths=_counts([r.product for r in read]),
        query=torch.tensor([r.query for r in read], dtype=torch.int64),
        history=_joined([r.history for r in read]),
        history_age=_joined([r.history_age for r in read]),
        history_lengths=_counts([r.history for r in read]),
        request_sparse=_joined([r.request_sparse for r in read], 1),
        request_dense=_joined([r.request_dense for r in read], 1),
        product=_joined([r.product for r in read]),
        candidate_sparse=_joined([r.candidate_sparse for r in read], 1),
        candidate_dense=_joined([r.candidate_dense for r in read], 1),
        clicked=torch.zeros(0),
        weight=torch.ones(len(read)),
    )


def tensors_of(batch: RequestBatch) -> tuple[Tensor, ...]:
    """Return what a served model takes: the arguments of `OnlineRanker.forward`."""
    return (
        batch.lengths,
        batch.query,
        batch.history,
        batch.history_age,
        batch.history_lengths,
        batch.request_sparse,
        batch.request_dense,
        batch.product,
        batch.candidate_sparse,
        batch.candidate_dense,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """The arrays of one request; shapes as in `RequestBatch` with B = 1."""

    query: int
    history: np.ndarray
    history_age: np.ndarray
    request_sparse: np.ndarray
    request_dense: np.ndarray
    product: np.ndarray
    candidate_sparse: np.ndarray
    candidate_dense: np.ndarray

    @classmethod
    def read(cls, raw: Mapping[str, Any], inputs: InputSpec) -> "_Request":
        query = raw.get("query")
        if not isinstance(query, str):
            raise BadInputError(f"query: must be a text, got {_shown(query)}")
        candidates = _mapping("candidates", raw.get("candidates"))
        product = _whole_numbers("candidates.product_id", candidates.get("product_id"))
        history, age = _history(raw)
        request = {k: [v] for k, v in _mapping("features", raw.get("features")).items()}
        request_sparse, request_dense = _level("features", request, inputs, "request", 1)
        candidate_sparse, candidate_dense = _level(
            "candidates.features",
            _mapping("candidates.features", candidates.get("features")),
            inputs,
            "candidate",
            len(product),
        )
        return cls(
            query=int(_texts("query", [query])[0]),
            history=history,
            history_age=age,
            request_sparse=request_sparse,
            request_dense=request_dense,
            product=product,
            candidate_sparse=candidate_sparse,
            candidate_dense=candidate_dense,
        )


def _history(raw: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    history = _whole_numbers("history", raw.get("history"))
    ages = raw.get("history_age_days")
    if ages is None:
        return history, np.zeros(len(history), np.int16)
    found = _whole_numbers("history_age_days", ages)
    if len(found) != len(history):
        raise BadInputError(
            f"history_age_days: has {len(found)} values, 'history' {len(history)}; "
            "both must have one a purchase"
        )
    wrong = found[(found < 0) | (found > _OLDEST)]
    if len(wrong):
        raise BadInputError(f"history_age_days: must be 0 to {_OLDEST}, got {wrong[0]}")
    return history, found.astype(np.int16)


def _level(
    where: str, columns: Mapping[str, Any], inputs: InputSpec, level: Level, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids [S, N] and values [D, N] of one level."""
    sparse, dense = inputs.of_kind("sparse", level), inputs.of_kind("dense", level)
    names = {item.name for item in (*sparse, *dense)}
    unknown = columns.keys() - names
    if unknown:
        known = ", ".join(sorted(names)) or "none"
        raise BadInputError(f"{where}: no feature {_shown(min(unknown, key=str))}; known: {known}")
    ids = np.full((len(sparse), number), MISSING_ID)
    for row, item in zip(ids, sparse, strict=True):
        column = _column(where, columns, item, number)
        if column is not None:
            read = _texts if item.type == "string" else _ids
            row[:] = read(f"{where}.{item.name}", column)
    values = np.full((len(dense), number), np.nan, np.float32)
    for row, item in zip(values, dense, strict=True):
        column = _column(where, columns, item, number)
        if column is not None:
            row[:] = _numbers(f"{where}.{item.name}", column)
    return ids, values


def _column(where: str, columns: Mapping[str, Any], item: Input, number: int) -> list[Any] | None:
    column = columns.get(item.name)
    if column is None:
        return None
    if not isinstance(column, list):
        raise BadInputError(f"{where}.{item.name}: must be a list, got {_shown(column)}")
    if len(column) != number:
        raise BadInputError(
            f"{where}.{item.name}: has {len(column)} values for {number} candidates"
        )
    return column


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadInputError(f"{where}: must be an object, got {_shown(value)}")
    return value


def _whole_numbers(where: str, value: Any) -> np.ndarray:
    """Return [N] int64; none may be missing."""
    if value is None:
        return np.zeros(0, np.int64)
    if not isinstance(value, list):
        raise BadInputError(f"{where}: must be a list, got {_shown(value)}")
    if None in value:
        raise BadInputError(f"{where}: place {value.index(None) + 1} is null")
    return _ids(where, value)


def _ids(where: str, column: list[Any]) -> np.ndarray:
    """Return [N] int64, `MISSING_ID` for ``None``."""
    if set(map(type, column)) <= {int}:
        try:
            return np.array(column, np.int64)
        except OverflowError:
            pass
    found = np.full(len(column), MISSING_ID)
    for place, value in enumerate(column):
        if value is None:
            continue
        if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
            raise _wrong(where, place, "a whole number of 64 bits", value)
        found[place] = value
    return found


def _texts(where: str, column: list[Any]) -> np.ndarray:
    """Return [N] int64 hashes, `MISSING_ID` for ``None``."""
    if not set(map(type, column)) <= {str, type(None)}:
        place = next(i for i, v in enumerate(column) if v is not None and type(v) is not str)
        raise _wrong(where, place, "a text", column[place])
    try:
        hashes = {text: MISSING_ID if text is None else _hash(text) for text in set(column)}
    except UnicodeEncodeError:  # half of a surrogate pair
        raise BadInputError(f"{where}: a text cannot be encoded in UTF-8") from None
    return np.array([hashes[text] for text in column], np.int64)


def _hash(text: str) -> int:
    return _kept_hash(text) if len(text) <= _LONGEST_KEPT else hash_text(text)


_kept_hash = lru_cache(_KEPT_TEXTS)(hash_text)


def _numbers(where: str, column: list[Any]) -> np.ndarray:
    """Return [N] float32, NaN for ``None``."""
    if set(map(type, column)) <= {int, float, type(None)}:
        with contextlib.suppress(OverflowError):  # an integer above what a float can be
            found = np.array(column, np.float64)  # None becomes NaN
            missing = np.isnan(found)
            if missing.sum() == column.count(None) and not (np.abs(found) > _GREATEST).any():
                return found.astype(np.float32)
    found = np.full(len(column), np.nan, np.float32)
    for place, value in enumerate(column):
        if value is None:
            continue
        if type(value) not in (int, float) or not abs(value) <= _GREATEST:
            raise _wrong(where, place, "a finite number of 32 bits", value)
        found[place] = value
    return found


def _wrong(where: str, place: int, what: str, value: Any) -> BadInputError:
    listed = not where.startswith("features.")  # those of the request are single values
    at = f" place {place + 1}" if listed else ""
    return BadInputError(f"{where}:{at} must be {what}, got {_shown(value)}")


def _shown(value: Any) -> str:
    """Return a value for an error message: short, and on one line."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a huge number"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _counts(lists: Sequence[np.ndarray]) -> Tensor:
    return torch.tensor([len(values) for values in lists], dtype=torch.int64)


def _joined(arrays: Sequence[np.ndarray], axis: int = 0) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays, axis) if len(arrays) != 1 else arrays[0])
