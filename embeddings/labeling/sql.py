"""DuckDB over Parquet files whose columns are checked, in bounded memory."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from embeddings.catalog import check_type, open_parquet
from features import columns
from features.data_table import quote, text
from features.parquet import is_text, parquet_files

if TYPE_CHECKING:
    import duckdb

Kind = tuple[Callable[[pa.DataType], bool], str, str]
"""Which types a column may have, how a sentence names them, and what SQL reads them as."""

TEXT: Kind = (is_text, "text", "VARCHAR")
INTEGER: Kind = (pa.types.is_integer, "an integer", "BIGINT")
PAIR: Mapping[str, Kind] = {columns.QUERY: TEXT, columns.PRODUCT_ID: INTEGER}

_MEMORY_LIMIT = "256MB"
_MOST_THREADS = 4


@contextmanager
def engine(folder: Path) -> "Iterator[duckdb.DuckDBPyConnection]":
    """Yield a DuckDB that spills into ``folder``, where no trace of it stays."""
    import duckdb

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".scratch-", dir=folder) as scratch:
        config: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": _MEMORY_LIMIT,
            "temp_directory": scratch,
            "threads": min(_MOST_THREADS, os.cpu_count() or 1),
        }
        with duckdb.connect(config=config) as connection:
            yield connection


def select(path: Path, kinds: Mapping[str, Kind]) -> str:
    """Return SQL of some columns of a Parquet file or folder.

    Raises:
        BadInputError: there is no such file, or a column is missing or of another type.
    """
    return select_files(parquet_files(path), kinds)


def select_files(files: list[Path], kinds: Mapping[str, Kind]) -> str:
    """Return SQL of some columns of Parquet files.

    Raises:
        BadInputError: a column is missing or of another type.
    """
    for file in files:
        with open_parquet(file, list(kinds)) as opened:
            for name, (accepts, expected, _) in kinds.items():
                check_type(file, opened, name, accepts, expected)
    read = ", ".join(
        f"{quote(name)}::{kind} AS {quote(name)}" for name, (_, _, kind) in kinds.items()
    )
    return f"SELECT {read} FROM read_parquet([{', '.join(text(str(file)) for file in files)}])"
