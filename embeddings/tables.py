"""Embedding tables: what an encoder says of products or queries, one Parquet file each.

=============  =========================================================================
``id``         int64 product id, or string: the query; unique, never null
``embedding``  fixed-size list [D] of float16 or float32; finite
``content``    optional: 16-byte hash of what the vector was made of; `build-tables` alone
               looks at it, to encode again only what changed
=============  =========================================================================

Other columns are not read.

The file's metadata holds, as text, `FINGERPRINT`, `DIMENSION`, `NORMALIZED` and `ROWS`.

Legend: ``N`` rows, ``D`` embedding dimension.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features import columns
from features.errors import BadInputError
from features.files import atomic_file
from features.parquet import open_streamed

FINGERPRINT = "dashclip.encoder_fingerprint"
DIMENSION = "dashclip.dimension"
NORMALIZED = "dashclip.normalized"
ROWS = "dashclip.rows"

CONTENT_TYPE = pa.binary(16)

_TRUTH = {"true": True, "false": False}
_ID_TYPES = (pa.int64(), pa.string())
_VALUE_TYPES = (pa.float16(), pa.float32())
_ROW_GROUP = 16_384
_AT_ONCE = 4096


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmbeddingTable:
    """Embeddings by id.

    Attributes:
        ids: [N] int64 product ids or string queries, a `pyarrow.Array`.
        embedding: [N, D] float16 or float32.
        fingerprint: of the encoder that made the embeddings; tables of one model must agree on it.
        normalized: whether each row has L2 norm 1.
        content: [N] hashes of `CONTENT_TYPE`, of what the vectors were made of; never null.
            ``None`` where that is not known.

    Raises:
        ValueError: a type or shape is not as above.
    """

    ids: pa.Array
    embedding: np.ndarray
    fingerprint: str
    normalized: bool
    content: pa.Array | None = None

    def __post_init__(self) -> None:
        if self.ids.type not in _ID_TYPES:
            raise ValueError(f"ids must be int64 or string, got {self.ids.type}")
        if self.embedding.dtype not in (np.float16, np.float32):
            raise ValueError(f"embedding must be float16 or float32, got {self.embedding.dtype}")
        if self.embedding.ndim != 2 or len(self.embedding) != len(self.ids):
            raise ValueError(
                f"embedding must be [{len(self.ids)}, D], as there are {len(self.ids)} ids, "
                f"got {list(self.embedding.shape)}"
            )
        if self.content is not None and (
            self.content.type != CONTENT_TYPE
            or len(self.content) != len(self.ids)
            or self.content.null_count
        ):
            raise ValueError(
                f"content must be {len(self.ids)} {CONTENT_TYPE} without nulls, got "
                f"{len(self.content)} {self.content.type}, {self.content.null_count} of them null"
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        """The embedding dimension ``D``."""
        return int(self.embedding.shape[1])


def write_table(path: Path, table: EmbeddingTable) -> None:
    """Write ``table`` to ``path``, whole or not at all.

    Raises:
        ValueError: an id is null or stands twice, or a value is not finite; nothing is written.
    """
    _check_ids(table.ids, "embedding table")
    finite = np.isfinite(table.embedding).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise _not_finite("embedding table", row, table.ids[row])
    values = pa.array(np.ascontiguousarray(table.embedding).reshape(-1))
    metadata = {
        FINGERPRINT: table.fingerprint,
        DIMENSION: str(table.dim),
        NORMALIZED: str(table.normalized).lower(),
        ROWS: str(len(table)),
    }
    arrays = {
        columns.ID: table.ids,
        columns.EMBEDDING: pa.FixedSizeListArray.from_arrays(values, table.dim),
    }
    if table.content is not None:
        arrays[columns.CONTENT] = table.content
    rows = pa.table(arrays).replace_schema_metadata(metadata)
    with atomic_file(path) as scratch:
        # Embeddings hardly compress: plain values are several times faster to read.
        pq.write_table(
            rows, scratch, row_group_size=_ROW_GROUP, compression="none", use_dictionary=False
        )


class StoredEmbeddings:
    """The embeddings [N, D] of a table's file, read by blocks of rows.

    The file stays open: it is read as it was, also where another takes its place meanwhile.

    Attributes:
        shape: (N, D).
        dtype: float16 or float32.
    """

    def __init__(self, path: Path, file: pq.ParquetFile) -> None:
        self._path = path
        self._file = file
        kind = file.schema_arrow.field(columns.EMBEDDING).type
        self.shape = (file.metadata.num_rows, int(kind.list_size))
        self.dtype = np.dtype(kind.value_type.to_pandas_dtype())

    def __len__(self) -> int:
        return self.shape[0]

    def blocks(self, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the rows from ``first`` up to ``last`` in their order, some at a time.

        No more than a few MiB of the file are in memory, whatever the size of its row groups.

        Yields:
            The number of a block's first row, and the block [n, D].

        Raises:
            BadInputError: the file is damaged, or a value of these rows is null or not finite.
        """
        number, groups, begins = 0, [], []
        for group in range(self._file.num_row_groups):
            rows = self._file.metadata.row_group(group).num_rows
            if number < last and number + rows > first:
                groups.append(group)
                begins.append(number)
            number += rows
        row = begins[0] if begins else 0
        batches = self._file.iter_batches(_AT_ONCE, groups, columns=[columns.EMBEDDING])
        while (batch := self._next(batches)) is not None:
            begin, end = max(first - row, 0), min(last - row, len(batch))
            if begin < end:
                lists = batch.column(0).slice(begin, end - begin)
                yield row + begin, self._values(lists, row + begin)
            row += len(batch)

    def _next(self, batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch | None:
        try:
            return next(batches, None)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(self._path, error) from error

    def _values(self, lists: pa.FixedSizeListArray, first: int) -> np.ndarray:
        if lists.null_count:
            row = first + pc.index(pc.is_null(lists), True).as_py() + 1
            raise BadInputError(f"{self._path}: column '{columns.EMBEDDING}', row {row}: is null")
        values = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.shape[1])
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            row = first + int(np.argmin(finite))
            raise _not_finite(str(self._path), row, self._file.read([columns.ID])[0][row])
        return values


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredTable:
    """An embedding table of which only the ids are in memory.

    Attributes:
        ids: [N] int64 product ids or string queries, a `pyarrow.Array`.
        embedding: [N, D], in the file.
        fingerprint: of the encoder that made the embeddings.
        normalized: whether each row has L2 norm 1.
    """

    ids: pa.Array
    embedding: StoredEmbeddings
    fingerprint: str
    normalized: bool


def open_table(path: Path) -> StoredTable:
    """Open an embedding table and check all of it but its values.

    Raises:
        BadInputError: the file is missing or unreadable, a column or a metadata entry is missing
            or of a wrong type, an id is null or stands twice, or the metadata disagrees with the
            content.
    """
    return _open(path)[0]


def _open(path: Path) -> tuple[StoredTable, pa.Array | None]:
    """Return a table and the hashes of its contents, where it has them."""
    if not path.is_file():
        raise BadInputError(f"{path}: no such embedding table; `build-tables` writes it")
    try:
        file = open_streamed(path)
        schema = file.schema_arrow
        _check_types(path, schema)
        read = file.read([n for n in (columns.ID, columns.CONTENT) if n in schema.names])
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    embedding = StoredEmbeddings(path, file)
    rows, dim = embedding.shape
    fingerprint, normalized = _read_metadata(path, schema, rows=rows, dim=dim)
    ids = read.column(columns.ID).combine_chunks()
    _check_ids(ids, str(path))
    table = StoredTable(
        ids=ids, embedding=embedding, fingerprint=fingerprint, normalized=normalized
    )
    return table, _content(read)


def read_table(path: Path) -> EmbeddingTable:
    """Read and check an embedding table.

    Raises:
        BadInputError: see `open_table`; or a value is null or not finite.
    """
    table, content = _open(path)
    embedding = np.empty(table.embedding.shape, table.embedding.dtype)
    for first, values in table.embedding.blocks(0, len(embedding)):
        embedding[first : first + len(values)] = values
    return EmbeddingTable(
        ids=table.ids,
        embedding=embedding,
        fingerprint=table.fingerprint,
        normalized=table.normalized,
        content=content,
    )


def _unreadable(path: Path, error: Exception) -> BadInputError:
    return BadInputError(f"{path}: not a readable Parquet file: {error}")


def _not_finite(where: str, row: int, raw_id: pa.Scalar) -> BadInputError:
    return BadInputError(
        f"{where}: column '{columns.EMBEDDING}', row {row + 1} (id {raw_id.as_py()!r}): "
        "holds a value that is not finite"
    )


def _content(read: pa.Table) -> pa.Array | None:
    """Return the hashes of the contents; None where there are none or the column is another's."""
    if columns.CONTENT not in read.column_names:
        return None
    found = read.column(columns.CONTENT)
    return found.combine_chunks() if found.type == CONTENT_TYPE and not found.null_count else None


def _check_types(path: Path, schema: pa.Schema) -> None:
    for name in (columns.ID, columns.EMBEDDING):
        if name not in schema.names:
            raise BadInputError(
                f"{path}: column '{name}' is missing; found {', '.join(schema.names)}"
            )
    ids, lists = schema.field(columns.ID).type, schema.field(columns.EMBEDDING).type
    if ids not in _ID_TYPES:
        raise BadInputError(f"{path}: column '{columns.ID}' is {ids}, expected int64 or string")
    if not pa.types.is_fixed_size_list(lists) or lists.value_type not in _VALUE_TYPES:
        raise BadInputError(
            f"{path}: column '{columns.EMBEDDING}' is {lists}, expected a fixed-size list of "
            "float16 or float32"
        )


def _read_metadata(path: Path, schema: pa.Schema, *, rows: int, dim: int) -> tuple[str, bool]:
    """Return the fingerprint and whether rows are normalised."""
    metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    for key in (FINGERPRINT, DIMENSION, NORMALIZED, ROWS):
        if key not in metadata:
            raise BadInputError(f"{path}: the file's metadata lacks '{key}'")
    for key, found in ((DIMENSION, dim), (ROWS, rows)):
        if metadata[key] != str(found):
            raise BadInputError(
                f"{path}: metadata '{key}' says {metadata[key]!r} and the file holds {found}"
            )
    if metadata[NORMALIZED] not in _TRUTH:
        raise BadInputError(
            f"{path}: metadata '{NORMALIZED}' must be 'true' or 'false', "
            f"got {metadata[NORMALIZED]!r}"
        )
    return metadata[FINGERPRINT], _TRUTH[metadata[NORMALIZED]]


def _check_ids(ids: pa.Array, where: str) -> None:
    """Raise for the first id that is null, or one that stands twice."""
    if ids.null_count:
        row = pc.index(pc.is_null(ids), True).as_py() + 1
        raise BadInputError(f"{where}: column '{columns.ID}', row {row}: is null")
    if len(pc.unique(ids)) < len(ids):
        counts = pc.value_counts(ids)
        twice = counts.filter(pc.greater(counts.field("counts"), 1))[0].as_py()
        raise BadInputError(
            f"{where}: column '{columns.ID}': {twice['values']!r} stands in {twice['counts']} "
            "rows, expected one"
        )
