"""Files of request records: their columns, and how they are written."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from features import columns
from features.dataset import Dataset
from features.files import atomic_file
from features.history import HISTORY_SCHEMA

ROW_GROUP = 1024


def record_schema(dataset: Dataset) -> pa.Schema:
    """Return the columns of the records, in the order of the format."""
    types = dataset.impressions.types
    user, time, query, *features = dataset.request_columns
    return pa.schema(
        [(name, types[name]) for name in (columns.REQUEST_ID, user, time, query)]
        + list(HISTORY_SCHEMA)
        + [(name, types[name]) for name in features]
        + [(name, pa.list_(types[name])) for name in dataset.candidate_columns]
    )


def record_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Return a writer of request records."""
    # Dictionaries pay for text only: encoding ids and floats with them takes longer and saves
    # little before zstd.
    text = [
        f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        for field in schema
        if pa.types.is_string(getattr(field.type, "value_type", field.type))
    ]
    return pq.ParquetWriter(
        path, schema, compression="zstd", compression_level=1, use_dictionary=text
    )


@contextmanager
def week_writer(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """Yield what takes the records of a week piece by piece, in their order.

    They are written in row groups of `ROW_GROUP` requests, however long the pieces are; the file
    appears whole or not at all.
    """
    pending = schema.empty_table()
    with atomic_file(path) as scratch, record_writer(scratch, schema) as writer:

        def take(records: pa.Table) -> None:
            nonlocal pending
            pending = pa.concat_tables([pending, records])
            whole = pending.num_rows - pending.num_rows % ROW_GROUP
            if whole:
                writer.write_table(pending.slice(0, whole), row_group_size=ROW_GROUP)
            pending = pending.slice(whole)

        yield take
        writer.write_table(pending, row_group_size=ROW_GROUP)
