"""Finding Parquet files and saying what is wrong with their columns."""

import difflib
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from features.errors import BadInputError

_BUFFER_BYTES = 4 << 20


def parquet_files(path: Path) -> list[Path]:
    """Return ``path`` if it is a file, else the Parquet files in that folder, sorted by name.

    Raises:
        BadInputError: there is nothing at ``path``, or no Parquet file in it.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise BadInputError(f"{path}: no such file or folder of Parquet files")
    files = sorted(p for p in path.rglob("*.parquet") if p.is_file() and p.name[0] not in "._")
    if not files:
        raise BadInputError(f"{path}: the folder holds no Parquet files")
    return files


def open_streamed(path: Path) -> pq.ParquetFile:
    """Open a file so that ``iter_batches`` has little more than a batch of it in memory.

    Without these settings it reads ahead all row groups that it is asked for, and keeps them.

    Raises:
        pyarrow.ArrowException: it is not a Parquet file.
    """
    return pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES)


def missing_column(path: Path, name: str, found: Sequence[str]) -> BadInputError:
    """Return the error that says that the file lacks a column, with the nearest name there is."""
    near = difflib.get_close_matches(name, found, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"found {', '.join(found)}"
    return BadInputError(f"{path}: column '{name}' is missing; {hint}")


def is_text(found: pa.DataType) -> bool:
    """Whether a type is a string, plain or in a dictionary."""
    types = pa.types
    if types.is_dictionary(found):
        found = found.value_type
    return types.is_string(found) or types.is_large_string(found) or types.is_string_view(found)
