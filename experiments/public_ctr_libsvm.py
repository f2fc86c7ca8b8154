r"""libsvm files of CTR data in which each place of a row is one field.

::

    1 3:1 12:1 20:0.5        label 1, fields 1 to 3
    0 4:1 12:1 20:0.25       fields 1 and 2 are categorical: the index is the value
                             field 3 is numeric: its index is 20 in every row, its value varies

This is how Frappe and the tagging data of MovieLens are passed on (``label index:1 index:1 ...``),
and Criteo and Avazu as the AFN paper prepared them. A label of -1 is a 0.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from experiments.public_ctr_files import Fields, Rows, finite
from features.columns import LABEL
from features.errors import BadInputError

_BLOCK_BYTES = 1 << 24
_SEPARATE = bytes.maketrans(b":", b" ")


def read_libsvm_fields(path: Path) -> Fields:
    """Return the fields ``field_1``, ``field_2``, ... of a libsvm file, told apart by its rows.

    Raises:
        BadInputError: as `read_libsvm_rows`.
    """
    first: npt.NDArray[np.float64] | None = None
    varies = np.zeros(0, dtype=bool)
    weighted = np.zeros(0, dtype=bool)
    for _, block in _blocks(path):
        index, value = block[:, 1::2], block[:, 2::2]
        if first is None:
            first = index[0]
            varies = weighted = np.zeros(len(first), dtype=bool)
        varies = varies | (index != first).any(axis=0)
        weighted = weighted | (value != 1).any(axis=0)
    numeric = ~varies & weighted
    names = [f"field_{place}" for place in range(1, len(numeric) + 1)]
    return Fields(
        categorical=tuple(n for n, is_number in zip(names, numeric, strict=True) if not is_number),
        numeric=tuple(n for n, is_number in zip(names, numeric, strict=True) if is_number),
    )


def read_libsvm_rows(path: Path, fields: Fields) -> Iterator[Rows]:
    """Yield the rows of a libsvm file, a block at a time.

    Args:
        path: of the file.
        fields: of the training file.

    Raises:
        BadInputError: a row is not ``label index:value ...``, has another number of fields, a
            label other than 0, 1 or -1, or a weight other than 1 in a categorical field.
    """
    numeric = {name: _place(name) for name in fields.numeric}
    places = {name: _place(name) for name in fields.categorical}
    for done, block in _blocks(path, len(numeric) + len(places)):
        label = block[:, 0]
        wrong = ~np.isin(label, (0.0, 1.0, -1.0))
        if wrong.any():
            row = int(wrong.argmax())
            raise BadInputError(
                f"{path}: row {done + row + 1:,}: '{LABEL}' must be 0 or 1, got {label[row]:g}"
            )
        for name, place in places.items():
            _check_weights(path, name, done, block[:, 2 * place])
        yield Rows(
            clicked=label == 1,
            tokens={n: pa.array(block[:, 2 * p - 1].astype(np.int64)) for n, p in places.items()},
            values={
                n: finite(path, n, done, block[:, 2 * p].astype(np.float32))
                for n, p in numeric.items()
            },
        )


def _place(name: str) -> int:
    return int(name.removeprefix("field_"))


def _check_weights(path: Path, name: str, done: int, weight: npt.NDArray[np.float64]) -> None:
    wrong = weight != 1
    if wrong.any():
        row = int(wrong.argmax())
        raise BadInputError(
            f"{path}: row {done + row + 1:,}: '{name}' is categorical, its value after the colon "
            f"must be 1, got {weight[row]:g}"
        )


def _blocks(path: Path, fields: int | None = None) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    """Yield the number of rows before a block, and the block ``[N, 1 + 2 fields]``.

    A row of a block is label, index, value, index, value, ...
    """
    done = 0
    with path.open("rb") as file:
        while lines := file.readlines(_BLOCK_BYTES):
            lines = [line for line in lines if line.strip()]
            if not lines:
                continue
            if fields is None:
                fields = max(lines[0].count(b":"), 1)
            yield done, _parse(path, done, lines, fields)
            done += len(lines)


def _parse(path: Path, done: int, lines: list[bytes], fields: int) -> npt.NDArray[np.float64]:
    width = 1 + 2 * fields
    if all(line.count(b":") == fields and len(line.split()) == fields + 1 for line in lines):
        numbers = _numbers(b"".join(lines))
        if numbers is not None and len(numbers) == width * len(lines):
            return numbers.reshape(len(lines), width)
    for row, line in enumerate(lines, done + 1):
        found = _numbers(line)
        if line.count(b":") != fields or found is None or len(found) != width:
            raise BadInputError(
                f"{path}: row {row:,} must be a label and {fields} fields 'index:value', got "
                f"{line.decode(errors='replace').strip()[:80]!r}"
            )
    raise AssertionError("the rows are well one by one and not together")


def _numbers(text: bytes) -> npt.NDArray[np.float64] | None:
    """Return the numbers of a text, or None where something else is in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        try:
            return np.fromstring(text.translate(_SEPARATE), dtype=np.float64, sep=" ")
        except (DeprecationWarning, ValueError):
            return None
