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

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features import columns
from features.errors import BadInputError
from features.files import atomic_file

FINGERPRINT = "dashclip.encoder_fingerprint"
DIMENSION = "dashclip.dimension"
NORMALIZED = "dashclip.normalized"
ROWS = "dashclip.rows"

CONTENT_TYPE = pa.binary(16)

_TRUTH = {"true": True, "false": False}
_ID_TYPES = (pa.int64(), pa.string())
_VALUE_TYPES = (pa.float16(), pa.float32())
_COLUMNS = (columns.ID, columns.EMBEDDING, columns.CONTENT)
_ROW_GROUP = 16_384


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
    _check_rows(table.ids, table.embedding, "embedding table")
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


def read_table(path: Path) -> EmbeddingTable:
    """Read and check an embedding table.

    Raises:
        BadInputError: the file is missing or unreadable, a column or a metadata entry is missing
            or of a wrong type, an id is null or stands twice, a value is not finite, or the
            metadata disagrees with the content.
    """
    if not path.is_file():
        raise BadInputError(f"{path}: no such embedding table; `build-tables` writes it")
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            _check_types(path, schema)
            read = file.read([name for name in _COLUMNS if name in schema.names])
    except (pa.ArrowException, OSError) as error:
        raise BadInputError(f"{path}: not a readable Parquet file: {error}") from error
    dim = schema.field(columns.EMBEDDING).type.list_size
    fingerprint, normalized = _read_metadata(path, schema, rows=read.num_rows, dim=dim)
    ids = read.column(columns.ID).combine_chunks()
    lists = read.column(columns.EMBEDDING)
    if lists.null_count:
        row = pc.index(pc.is_null(lists), True).as_py() + 1
        raise BadInputError(f"{path}: column '{columns.EMBEDDING}', row {row}: is null")
    embedding = lists.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    _check_rows(ids, embedding, str(path))
    return EmbeddingTable(
        ids=ids,
        embedding=embedding,
        fingerprint=fingerprint,
        normalized=normalized,
        content=_content(read),
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


def _check_rows(ids: pa.Array, embedding: np.ndarray, where: str) -> None:
    """Raise for the first row that breaks a rule of the contents."""
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
    finite = np.isfinite(embedding).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise BadInputError(
            f"{where}: column '{columns.EMBEDDING}', row {row + 1} (id {ids[row].as_py()!r}): "
            "holds a value that is not finite"
        )
