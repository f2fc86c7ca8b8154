"""Request records as one flat table, for learners that know rows only: the floors and the peers.

Request-level features are repeated for each candidate of their request::

    lengths  store  product          codes (store, product)
    [2,      [7,    [[5, 9],    ->   [[1, 1], [1, 2],      two rows of the first request
     1]       8]     [5]]             [2, 1]]              one row of the second

Dimensions: ``B`` requests, ``C`` candidates (rows) of all requests, ``F`` sparse and ``D`` dense
features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features import columns
from features.errors import BadInputError
from features.requests import RequestsManifest
from features.schema import DatasetSchema, Kind

UNKNOWN = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabularies:
    """The values of each sparse feature that the training weeks hold.

    A value's code is its place, from 1; the most frequent value comes first, equally frequent ones
    in ascending order. Code 0 stands for a value that was not seen, or a missing one.

    Attributes:
        values: for each sparse feature, its distinct values.
    """

    values: dict[str, pa.Array]

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Number of codes of each feature, the unknown one included; ``[F]``."""
        return np.array([len(values) + 1 for values in self.values.values()], dtype=np.int64)

    def encode(self, name: str, column: pa.Array) -> npt.NDArray[np.int32]:
        """Return the codes of one feature's values, int32 in the shape of ``column``."""
        known = self.values[name]
        encoded = pc.dictionary_encode(column)
        places = pc.index_in(encoded.dictionary.cast(known.type, safe=False), known)
        codes = np.append(places.fill_null(-1).to_numpy() + 1, UNKNOWN).astype(np.int32)
        # The last entry serves the missing values.
        return codes[encoded.indices.fill_null(len(codes) - 1).to_numpy(zero_copy_only=False)]

    @classmethod
    def fit(
        cls, manifest: RequestsManifest, weeks: Sequence[int], schema: DatasetSchema
    ) -> "Vocabularies":
        """Collect the values of ``weeks``.

        Raises:
            BadInputError: a week or a feature column is missing.
        """
        names = _names(schema, "sparse")
        counts: dict[str, list[pa.Table]] = {name: [] for name in names}
        for week in weeks:
            table = _read(manifest.path(week), names)
            for name in names:
                found = pc.value_counts(_flat(table[name]).drop_null())
                counts[name].append(pa.Table.from_struct_array(found))
        return cls(values={name: _ranked(found) for name, found in counts.items()})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FlatTable:
    """One row per candidate, in the order of the request records.

    Attributes:
        sparse: names of the sparse features, request level first.
        dense: names of the dense features, request level first.
        codes: int32 ``[C, F]``, see `Vocabularies`.
        values: float32 ``[C, D]``, NaN where missing.
        clicked: bool ``[C]``.
        lengths: int32 ``[B]``, candidates of each request; they sum to ``C``.
        weight: float32 ``[C]``, what each row counts in training.
    """

    sparse: tuple[str, ...]
    dense: tuple[str, ...]
    codes: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]
    clicked: npt.NDArray[np.bool_]
    lengths: npt.NDArray[np.int32]
    weight: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.clicked)

    @classmethod
    def read(
        cls,
        manifest: RequestsManifest,
        weeks: Sequence[int],
        schema: DatasetSchema,
        vocabularies: Vocabularies,
    ) -> "FlatTable":
        """Read ``weeks``, in the given order; holds one week's file at a time besides the result.

        Raises:
            BadInputError: a week or a feature column is missing.
        """
        sparse, dense = _names(schema, "sparse"), _names(schema, "dense")
        paths = [manifest.path(week) for week in weeks]
        rows = sum(manifest.weeks[week].rows for week in weeks)
        codes = np.empty((rows, len(sparse)), dtype=np.int32)
        values = np.empty((rows, len(dense)), dtype=np.float32)
        clicked = np.empty(rows, dtype=np.bool_)
        weight = np.ones(rows, dtype=np.float32)
        lengths: list[npt.NDArray[np.int32]] = []
        start = 0
        for path in paths:
            sampled = [columns.WEIGHT] if columns.WEIGHT in pq.read_schema(path).names else []
            table = _read(path, [columns.CLICKED, *sampled, *sparse, *dense])
            of_week = pc.list_value_length(table[columns.CLICKED]).to_numpy().astype(np.int32)
            here = slice(start, start + int(of_week.sum()))
            clicked[here] = _to_numpy(_flat(table[columns.CLICKED]))
            for name in sampled:
                weight[here] = np.repeat(table[name].to_numpy(), of_week)
            for i, name in enumerate(sparse):
                found = vocabularies.encode(name, _flat(table[name]))
                codes[here, i] = _spread(found, table[name].type, of_week)
            for i, name in enumerate(dense):
                column = _flat(table[name]).cast(pa.float32(), safe=False)
                values[here, i] = _spread(_to_numpy(column), table[name].type, of_week)
            lengths.append(of_week)
            start = here.stop
        assert start == rows, "the manifest and the records disagree"
        return cls(
            sparse=sparse,
            dense=dense,
            codes=codes,
            values=values,
            clicked=clicked,
            lengths=np.concatenate(lengths),
            weight=weight,
        )


def _names(schema: DatasetSchema, kind: Kind) -> tuple[str, ...]:
    return schema.names(kind, "request") + schema.names(kind, "candidate")


def _read(path: Path, names: Sequence[str]) -> pa.Table:
    file = pq.ParquetFile(path)
    for name in names:
        if name not in file.schema_arrow.names:
            raise BadInputError(f"{path}: column '{name}' is missing; rebuild the request records")
    return file.read(columns=list(names))


def _flat(column: pa.ChunkedArray) -> pa.Array:
    """Return a request-level column as it is, and a candidate-level one without its lists."""
    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):
        whole = whole.chunk(0) if whole.num_chunks else pa.array([], type=whole.type)
    return whole.flatten() if pa.types.is_list(whole.type) else whole


def _to_numpy(column: pa.Array) -> npt.NDArray[Any]:
    return column.to_numpy(zero_copy_only=False)


def _spread(
    column: npt.NDArray[Any], type_on_disk: pa.DataType, lengths: npt.NDArray[np.int32]
) -> npt.NDArray[Any]:
    """Repeat a value per request ``[B]`` for its candidates ``[C]``; leave ``[C]`` as it is."""
    if not pa.types.is_list(type_on_disk):
        return np.repeat(column, lengths)
    assert len(column) == lengths.sum(), "a list column has another length than 'clicked'"
    return column


def _ranked(counts: list[pa.Table]) -> pa.Array:
    total = pa.concat_tables(counts).group_by("values").aggregate([("counts", "sum")])
    order = [("counts_sum", "descending"), ("values", "ascending")]
    return total.sort_by(order)["values"].combine_chunks()
