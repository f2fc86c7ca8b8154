"""What runs on Spark's executors: one task writes the records of one week.

The only module of the job that executors import; they need this project installed, and a folder
that they and the driver see under one name.
"""

import base64
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from pyspark.sql.datasource import (
    DataSource,
    DataSourceArrowWriter,
    DataSourceWriter,
    WriterCommitMessage,
)
from pyspark.sql.types import StructType

from features.manifest import UNFINISHED, week_path
from features.record_files import week_writer

FORMAT = "dashclip-request-records"
FOLDER = "folder"
NOTE = "note"
SCHEMA = "schema"
WEEK = "week"


def schema_option(schema: pa.Schema) -> str:
    """Return the Arrow schema of records as the text of the option `SCHEMA`."""
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


class RequestRecords(DataSource):
    """A sink of rows that are records with a column ``week``, one week a partition, in order.

    Options: `FOLDER` of the records, their `SCHEMA`, and the `NOTE` of the build under way there.
    A task that outlives its build, as one that was killed may leave some, writes nothing.
    """

    @classmethod
    def name(cls) -> str:
        """Return the name of the format."""
        return FORMAT

    def writer(self, schema: StructType, overwrite: bool) -> DataSourceWriter:
        """Return what writes the partitions."""
        return _WeekWriter(dict(self.options))


class _WeekWriter(DataSourceArrowWriter):
    def __init__(self, options: dict[str, str]) -> None:
        self.options = options

    def write(self, iterator: Iterator[pa.RecordBatch]) -> WriterCommitMessage:
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(self.options[SCHEMA])))
        first = next(iterator, None)
        if first is None:
            return WriterCommitMessage()
        week = first.column(WEEK)[0].as_py()
        folder = Path(self.options[FOLDER])
        with week_writer(week_path(folder, week), schema) as take:
            batch: pa.RecordBatch | None = first
            while batch is not None:
                records = pa.Table.from_batches([batch])
                assert records[WEEK].unique().to_pylist() == [week], "one week a task"
                take(records.select(schema.names).cast(schema))
                batch = next(iterator, None)
            if (folder / UNFINISHED).read_text(encoding="utf-8") != self.options[NOTE]:
                raise RuntimeError(f"{folder}: another build is under way there")
        return WriterCommitMessage()
