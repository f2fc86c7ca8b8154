"""One table of a dataset, and the SQL that reads it."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa


@dataclass(frozen=True)
class DataTable:
    """One table of a dataset: a Parquet file, or a folder of them.

    Attributes:
        path: the file or folder.
        files: the Parquet files, sorted by name.
        types: the type as which each column that the contract or ``dataset.toml`` names is read.
        reads: the SQL expression that reads it so.
    """

    path: Path
    files: tuple[Path, ...]
    types: dict[str, pa.DataType]
    reads: dict[str, str]

    @cached_property
    def raw(self) -> str:
        """SQL of the files as they are."""
        return self._scan("")

    @property
    def located(self) -> str:
        """SQL of the files with further columns ``filename`` and ``file_row_number``, from 0."""
        return self._scan(", filename = true, file_row_number = true")

    def named(self, filename: str) -> str:
        """Return the file that `located` calls ``filename`` as the user knows it."""
        return filename

    def digest(self, names: Iterable[str]) -> str:
        """Return an SQL expression of a hash that tells rows apart by some columns, and by null."""
        return f"hash({', '.join(map(quote, names))})"

    def _scan(self, options: str) -> str:
        files = ", ".join(text(str(file)) for file in self.files)
        return f"read_parquet([{files}], union_by_name = true, hive_partitioning = false{options})"

    def select(self, *names: str, source: str | None = None) -> str:
        """Return SQL of some columns with the project's types, from ``source`` if given."""
        reads = ", ".join(f"{self.reads[name]} AS {quote(name)}" for name in names or self.reads)
        return f"SELECT {reads} FROM {source or self.raw}"


def quote(name: str) -> str:
    """Return ``name`` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def text(value: str) -> str:
    """Return ``value`` as an SQL string."""
    return "'" + value.replace("'", "''") + "'"
