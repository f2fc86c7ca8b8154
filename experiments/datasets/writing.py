"""Writing the files of a dataset folder that holds products and graded queries."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features import columns
from features.schema import DatasetSchema

if TYPE_CHECKING:
    import pandas as pd

Source = Literal["human", "llm", "derived"]

IMAGE_ROWS = 1_024  # rows of a row group where images are in it
TEXT_ROWS = 16_384

_CATALOG = pa.schema(
    [
        (columns.PRODUCT_ID, pa.int64()),
        (columns.TITLE, pa.string()),
        (columns.AISLE, pa.string()),
        (columns.IMAGE, pa.binary()),
    ]
)
_TEXTS = [columns.TITLE, columns.AISLE]


def products(
    product_ids: np.ndarray,
    titles: Sequence[str],
    *,
    aisles: Sequence[str] | None = None,
    images: Sequence[bytes | None] | None = None,
) -> pa.Table:
    """Return rows of ``catalog.parquet``; an empty title or aisle is null.

    Args:
        product_ids: [N] int64.
        titles: [N] texts.
        aisles: [N] texts; none has an aisle where ``None``.
        images: [N] bytes of JPEG or PNG files; none has an image where ``None``.
    """
    nothing = [None] * len(product_ids)
    content = [
        product_ids,
        [title or None for title in titles],
        nothing if aisles is None else [aisle or None for aisle in aisles],
        nothing if images is None else images,
    ]
    arrays = [pa.array(part, kind) for part, kind in zip(content, _CATALOG.types, strict=True)]
    return pa.table(arrays, schema=_CATALOG)


def write_catalog(output: Path, tables: Iterable[pa.Table], *, rows: int = TEXT_ROWS) -> None:
    """Write ``catalog.parquet`` from pieces of any size; one row group of ``rows`` is in memory."""
    pending = _CATALOG.empty_table()
    with pq.ParquetWriter(
        output / "catalog.parquet",
        _CATALOG,
        compression="zstd",
        compression_level=1,
        use_dictionary=_TEXTS,
        write_statistics=[columns.PRODUCT_ID],  # of an image they would be another copy of it
    ) as writer:
        for table in tables:
            pending = pa.concat_tables([pending, table])
            while pending.num_rows >= rows:
                writer.write_table(pending.slice(0, rows))
                pending = pending.slice(rows)
        if pending.num_rows:
            writer.write_table(pending)


def write_relevance(output: Path, pairs: "pd.DataFrame", *, source: Source) -> None:
    """Write ``relevance.parquet``, sorted by query and product.

    Args:
        output: the dataset folder.
        pairs: columns ``query``, ``product_id`` and ``label`` (0, 1 or 2), and ``split`` where the
            source publishes one; a pair stands in one row.
        source: who graded the pairs.
    """
    keys = [columns.QUERY, columns.PRODUCT_ID]
    assert not pairs.duplicated(keys).any()
    assert pairs[columns.LABEL].isin([0, 1, 2]).all()
    pairs = pairs.sort_values(keys, kind="stable")
    content = {
        columns.QUERY: pa.array(pairs[columns.QUERY], pa.string()),
        columns.PRODUCT_ID: pa.array(pairs[columns.PRODUCT_ID], pa.int64()),
        columns.LABEL: pa.array(pairs[columns.LABEL], pa.int8()),
        columns.SOURCE: pa.array([source] * len(pairs), pa.string()),
    }
    if "split" in pairs:
        content["split"] = pa.array(pairs["split"], pa.string())
    pq.write_table(
        pa.table(content),
        output / "relevance.parquet",
        row_group_size=100_000,
        compression="zstd",
        compression_level=1,
    )


def write_schema(output: Path, schema: DatasetSchema) -> None:
    """Write ``dataset.toml``."""
    (output / "dataset.toml").write_text(schema.to_toml(), encoding="utf-8")
