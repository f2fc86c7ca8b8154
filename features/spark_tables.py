"""The tables of a dataset as Spark reads them."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from features.data_table import DataTable, quote
from features.dataset import Dataset

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_GLOB = re.compile(r"([\\\[\]{}*?,])")


@dataclass(frozen=True)
class SparkTable(DataTable):
    """A table whose files are views of a Spark session.

    Attributes:
        view: name of the view of the files as they are; ``_located`` at its end is that with
            ``filename`` and ``file_row_number``.
    """

    view: str = ""

    @property
    def raw(self) -> str:
        """SQL of the files as they are, but times without their zones."""
        return self.view

    @property
    def located(self) -> str:
        """SQL of the files with further columns ``filename`` and ``file_row_number``, from 0."""
        return f"{self.view}_located"

    def named(self, filename: str) -> str:
        """Return the file that `located` calls ``filename`` as the user knows it."""
        path = unquote(urlsplit(filename).path)
        return next((str(file) for file in self.files if str(file.absolute()) == path), path)

    def digest(self, names: Iterable[str]) -> str:
        """Return an SQL expression of a hash that tells rows apart by some columns, and by null."""
        # Spark's hash passes nulls over.
        told = [f"{quote(name)} IS NULL, {quote(name)}" for name in names]
        return f"xxhash64({', '.join(told)})"


def spark_dataset(session: "SparkSession", dataset: Dataset) -> Dataset:
    """Return ``dataset`` with tables that ``session`` reads."""
    return replace(
        dataset,
        catalog=_spark_table(session, dataset.catalog, "catalog_files"),
        purchases=_spark_table(session, dataset.purchases, "purchases_files"),
        impressions=_spark_table(session, dataset.impressions, "impressions_files"),
    )


def _spark_table(session: "SparkSession", table: DataTable, view: str) -> SparkTable:
    """Make the views of a table.

    Files of different types are read apart: Spark takes the types of one file for those of all.
    """
    alike: dict[tuple[str, ...], list[Path]] = defaultdict(list)
    for file in table.files:
        alike[_stored_types(file, table.types)].append(file)
    plain, located = [], []
    for files in alike.values():
        found = session.read.option("recursiveFileLookup", "true").parquet(*map(_spark_path, files))
        columns = [_without_zone(found, *column) for column in table.types.items()]
        place = ["_metadata.file_path AS filename", "_metadata.row_index AS file_row_number"]
        plain.append(found.selectExpr(*columns))
        located.append(found.selectExpr(*columns, *place))
    for name, parts in ((view, plain), (f"{view}_located", located)):
        reduce(lambda first, second: first.unionByName(second), parts).createOrReplaceTempView(name)
    # Times have lost their zones in the views.
    times = {name: quote(name) for name, kind in table.types.items() if pa.types.is_timestamp(kind)}
    return SparkTable(
        path=table.path,
        files=table.files,
        types=table.types,
        reads={**table.reads, **times},
        view=view,
    )


def _stored_types(file: Path, names: Iterable[str]) -> tuple[str, ...]:
    schema = pq.read_schema(file)
    stored = pq.read_metadata(file).schema
    physical = {stored.column(i).path: stored.column(i) for i in range(len(stored))}
    return tuple(
        f"{schema.field(name).type} {physical[name].physical_type}" for name in sorted(names)
    )


def _without_zone(found: "DataFrame", name: str, kind: pa.DataType) -> str:
    """Return the SQL expression of a column, a time as a ``TIMESTAMP`` without zone."""
    column, stored = quote(name), found.schema[name].dataType.typeName()
    if not pa.types.is_timestamp(kind) or stored == "timestamp_ntz":
        return column
    # Spark reads nanoseconds as numbers only.
    time = f"timestamp_micros({column} DIV 1000)" if stored == "long" else column
    return f"{time}::TIMESTAMP_NTZ AS {column}"


def _spark_path(file: Path) -> str:
    """Return the name of a local file as Spark takes it, which reads patterns."""
    return "file:" + _GLOB.sub(r"\\\1", str(file.absolute()))
