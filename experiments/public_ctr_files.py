"""Files of CTR data with fixed splits: ``train``, ``valid`` and ``test`` as CSV, Parquet or libsvm.

CSV and Parquet have a column ``label`` of 0 and 1; every other column is a field. libsvm files
(``.libsvm`` or ``.txt``) are told in `experiments.public_ctr_libsvm`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from features.columns import LABEL
from features.errors import BadInputError

SPLITS = ("train", "valid", "test")
LIBSVM = (".libsvm", ".txt")
SUFFIXES = (".csv", ".parquet", *LIBSVM)

_BLOCK_BYTES = 1 << 25
_BLOCK_ROWS = 1 << 18
_LABELS = {"0": False, "0.0": False, "1": True, "1.0": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """Names of the fields, in the order of the training file."""

    categorical: tuple[str, ...]
    numeric: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Consecutive rows of a file; N is their number.

    Attributes:
        clicked: bool ``[N]``.
        tokens: for each categorical field an array ``[N]``, null where missing.
        values: for each numeric field float32 ``[N]``, 0 where missing.
    """

    clicked: npt.NDArray[np.bool_]
    tokens: dict[str, pa.Array]
    values: dict[str, npt.NDArray[np.float32]]

    def __len__(self) -> int:
        return len(self.clicked)


def find_splits(folder: Path) -> dict[str, Path]:
    """Return the file of each split.

    Raises:
        BadInputError: the folder or a split is missing, a split has two files, or the splits
            have different formats.
    """
    if not folder.is_dir():
        raise BadInputError(f"{folder}: no such folder")
    splits = {}
    for split in SPLITS:
        found = [path for s in SUFFIXES if (path := folder / f"{split}{s}").is_file()]
        if not found:
            names = ", ".join(f"{split}{suffix}" for suffix in SUFFIXES)
            raise BadInputError(f"{folder}: the {split} split is missing; looked for {names}")
        if len(found) > 1:
            names = " and ".join(path.name for path in found)
            raise BadInputError(f"{folder}: the {split} split is there twice: {names}")
        splits[split] = found[0]
    train = splits["train"]
    for path in splits.values():
        if path.suffix != train.suffix:
            raise BadInputError(f"{path}: must have the format of {train.name}")
    return splits


def read_fields(path: Path, numeric: Sequence[str]) -> Fields:
    """Return the fields of a CSV or Parquet file.

    Raises:
        BadInputError: ``label``, a numeric column or every field is missing, or a name is double.
    """
    names = _column_names(path)
    for name in (LABEL, *numeric):
        if name not in names:
            raise BadInputError(
                f"{path}: column '{name}' is missing; the columns are {', '.join(names)}"
            )
    for name in names:
        if names.count(name) > 1:
            raise BadInputError(f"{path}: column '{name}' is there twice")
    fields = Fields(
        categorical=tuple(n for n in names if n != LABEL and n not in numeric),
        numeric=tuple(n for n in names if n != LABEL and n in numeric),
    )
    if LABEL in numeric or not fields.categorical + fields.numeric:
        raise BadInputError(f"{path}: there must be a field beside '{LABEL}'")
    return fields


def read_rows(path: Path, fields: Fields) -> Iterator[Rows]:
    """Yield the rows of a CSV or Parquet file, a block at a time.

    Args:
        path: of the file.
        fields: of the training file; this one must have the same columns, in any order.

    Raises:
        BadInputError: the columns differ, a label is not 0 or 1, a numeric value is no finite
            number, or the file is damaged.
    """
    names = _column_names(path)
    expected = {LABEL, *fields.categorical, *fields.numeric}
    for name in sorted(expected ^ set(names)):
        state = "is missing, the training file has it" if name in expected else "is not in train"
        raise BadInputError(f"{path}: column '{name}' {state}")
    done = 0
    for block in _blocks(path, names):
        yield Rows(
            clicked=_clicked(path, done, block[LABEL]),
            tokens={name: _text(path, name, block[name]) for name in fields.categorical},
            values={name: _numbers(path, name, done, block[name]) for name in fields.numeric},
        )
        done += len(block)


def _column_names(path: Path) -> list[str]:
    try:
        if path.suffix == ".parquet":
            return list(pq.ParquetFile(path).schema_arrow.names)
        with pcsv.open_csv(path) as reader:
            return list(reader.schema.names)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise BadInputError(f"{path}: not a {path.suffix[1:]} file: {_line(error)}") from error


def _blocks(path: Path, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    try:
        if path.suffix == ".parquet":
            yield from pq.ParquetFile(path).iter_batches(batch_size=_BLOCK_ROWS)
            return
        reading = pcsv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES)
        # As text: an identifier is not a number, and "07" is not "7".
        converting = pcsv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        )
        with pcsv.open_csv(path, read_options=reading, convert_options=converting) as reader:
            yield from reader
    except pa.ArrowInvalid as error:
        raise BadInputError(f"{path}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _clicked(path: Path, done: int, column: pa.Array) -> npt.NDArray[np.bool_]:
    plain = column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column
    text = pc.utf8_trim_whitespace(_text(path, LABEL, plain))
    found = pc.index_in(text, pa.array(list(_LABELS)))
    if found.null_count:
        row = found.is_null().index(True).as_py()
        raise BadInputError(
            f"{path}: row {done + row + 1:,}: '{LABEL}' must be 0 or 1, got "
            f"{'nothing' if text[row].as_py() is None else repr(text[row].as_py())}"
        )
    return np.array(list(_LABELS.values()))[found.to_numpy()]


def _text(path: Path, name: str, column: pa.Array) -> pa.Array:
    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise BadInputError(
            f"{path}: column '{name}' must hold single values, got {column.type}"
        ) from error


def _numbers(path: Path, name: str, done: int, column: pa.Array) -> npt.NDArray[np.float32]:
    try:
        numbers = column.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        for row, value in enumerate(column.to_pylist(), done + 1):
            if value is not None and not _is_number(value):
                raise BadInputError(
                    f"{path}: row {row:,}: '{name}' must be a number, got {value!r}"
                ) from None
        raise
    return finite(path, name, done, numbers)


def _is_number(value: Any) -> bool:
    try:
        pa.array([value]).cast(pa.float32(), safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True


def finite(
    path: Path, name: str, done: int, numbers: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Return the values of a numeric field, 0 where missing.

    Args:
        path: of the file that they are from.
        name: of the field.
        done: rows of the file before these.
        numbers: float32 ``[N]``, NaN where missing.

    Raises:
        BadInputError: one is infinite.
    """
    wrong = np.isinf(numbers)
    if wrong.any():
        row = int(wrong.argmax())
        raise BadInputError(f"{path}: row {done + row + 1:,}: '{name}' is infinite")
    return np.nan_to_num(numbers, nan=0.0)
