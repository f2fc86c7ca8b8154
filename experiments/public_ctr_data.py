"""CTR data as row numbers of one embedding table, kept as memory-mapped ``.npy`` files.

All categorical fields share one table, each with a range of its own, so that a batch is one
lookup::

    field    values by frequency   rows of the table
    user     u7, u3                0 unknown user, 1 u7, 2 u3
    item     i5, i1, i9            3 unknown item, 4 i5, 5 i1, 6 i9

A value is unknown where the training rows do not hold it ``min_count`` times, or it is missing.
Dimensions: ``N`` rows, ``F`` categorical and ``D`` numeric fields.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from experiments.flat_table import Vocabularies
from experiments.public_ctr_config import PublicConfig
from experiments.public_ctr_files import (
    LIBSVM,
    SPLITS,
    Fields,
    Rows,
    find_splits,
    read_fields,
    read_rows,
)
from experiments.public_ctr_libsvm import read_libsvm_fields, read_libsvm_rows
from features.console import progress_bar, say
from features.errors import BadInputError
from features.files import atomic_folder, fingerprint

_VERSION = 1  # of the encoding
_MANIFEST = "encoded.json"
_MERGE_AFTER = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedSplit:
    """The rows of one split.

    Attributes:
        table_rows: int32 ``[N, F]``, rows of the one embedding table.
        values: float32 ``[N, D]``, of the numeric fields.
        clicked: bool ``[N]``.
    """

    table_rows: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]
    clicked: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.clicked)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedData:
    """A dataset, encoded.

    Attributes:
        fields: names.
        sizes: rows of the table that each categorical field has, the unknown one included.
        splits: ``train``, ``valid`` and ``test``.
        fingerprint: of the files as they were.
    """

    fields: Fields
    sizes: tuple[int, ...]
    splits: dict[str, EncodedSplit]
    fingerprint: str

    @property
    def table_rows(self) -> int:
        """Rows of the one embedding table."""
        return sum(self.sizes)


def load_or_encode(folder: Path, output: Path, config: PublicConfig) -> EncodedData:
    """Return the dataset of ``folder``, encoded in ``output/encoded`` now or by an earlier run.

    Raises:
        BadInputError: a split is missing, empty or of one class, or a file breaks a rule of
            `experiments.public_ctr_files` or `experiments.public_ctr_libsvm`.
    """
    paths = find_splits(folder)
    numeric = () if paths["train"].suffix in LIBSVM else config.numeric
    identity = {
        "version": _VERSION,
        "files": fingerprint(*paths.values()),
        "min_count": config.min_count,
        "numeric": list(numeric),
    }
    encoded = output / "encoded"
    if _identity(encoded) != identity:
        fields = _fields(paths["train"], numeric)
        with atomic_folder(encoded) as scratch:
            vocabularies = _vocabularies(paths["train"], fields, config.min_count)
            for split, path in paths.items():
                _write_split(scratch, split, path, fields, vocabularies)
            manifest = {
                "identity": identity,
                "fields": asdict(fields),
                "sizes": [int(size) for size in vocabularies.sizes],
            }
            (scratch / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    return _open(encoded)


def _identity(encoded: Path) -> dict[str, Any] | None:
    manifest = encoded / _MANIFEST
    if not manifest.is_file():
        return None
    found: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))["identity"]
    return found


def _open(encoded: Path) -> EncodedData:
    manifest = json.loads((encoded / _MANIFEST).read_text(encoding="utf-8"))
    splits = {
        split: EncodedSplit(
            table_rows=np.load(encoded / f"{split}_rows.npy", mmap_mode="r"),
            values=np.load(encoded / f"{split}_values.npy", mmap_mode="r"),
            clicked=np.load(encoded / f"{split}_clicked.npy"),
        )
        for split in SPLITS
    }
    fields = {kind: tuple(names) for kind, names in manifest["fields"].items()}
    return EncodedData(
        fields=Fields(**fields),
        sizes=tuple(manifest["sizes"]),
        splits=splits,
        fingerprint=manifest["identity"]["files"],
    )


def _fields(path: Path, numeric: tuple[str, ...]) -> Fields:
    return read_libsvm_fields(path) if path.suffix in LIBSVM else read_fields(path, numeric)


def _blocks(path: Path, fields: Fields, doing: str) -> Iterator[Rows]:
    """Yield the blocks of a file, showing on a terminal how many rows are done."""
    blocks = read_libsvm_rows if path.suffix in LIBSVM else read_rows
    with progress_bar() as bar:
        task = bar.add_task(f"{doing} {path.name}", total=None)
        for block in blocks(path, fields):
            yield block
            bar.update(task, advance=len(block))


class _Counts:
    """How often each value of a field occurs; merged now and then to stay small."""

    def __init__(self) -> None:
        self._parts: list[pa.Table] = []

    def add(self, values: pa.Array) -> None:
        found = pa.Table.from_struct_array(pc.value_counts(values.drop_null()))
        self._parts.append(found)
        if len(self._parts) == _MERGE_AFTER:
            self._parts = [self._merged()]

    def _merged(self) -> pa.Table:
        total = pa.concat_tables(self._parts).group_by("values").aggregate([("counts", "sum")])
        return total.rename_columns(["values", "counts"])

    def frequent(self, min_count: int) -> pa.Array:
        """Return the values seen so often, the most frequent first, equals in ascending order."""
        kept = self._merged().filter(pc.field("counts") >= min_count)
        order = [("counts", "descending"), ("values", "ascending")]
        return kept.sort_by(order)["values"].combine_chunks()


def _vocabularies(path: Path, fields: Fields, min_count: int) -> Vocabularies:
    counts = {name: _Counts() for name in fields.categorical}
    rows = 0
    for block in _blocks(path, fields, "counting"):
        rows += len(block)
        for name, tokens in block.tokens.items():
            counts[name].add(tokens)
    if not rows:
        raise BadInputError(f"{path}: no rows")
    values = {name: found.frequent(min_count) for name, found in counts.items()}
    return Vocabularies(values=values)


class _GrowingArray:
    """A ``.npy`` file that takes rows at its end.

    numpy leaves room in a file's header for any number of rows, so that the final header takes
    exactly the place of the first.
    """

    def __init__(self, path: Path, dtype: str, *columns: int) -> None:
        self._columns = columns
        self._dtype = np.dtype(dtype)
        self._rows = 0
        self._file = path.open("wb")
        self._data_start = self._write_header()

    def _write_header(self) -> int:
        self._file.seek(0)
        description = np.lib.format.dtype_to_descr(self._dtype)
        shape = (self._rows, *self._columns)
        header = {"descr": description, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()

    def append(self, rows: npt.NDArray[Any]) -> None:
        assert rows.dtype == self._dtype
        assert rows.shape[1:] == self._columns
        self._rows += len(rows)
        self._file.write(np.ascontiguousarray(rows).data)

    def __enter__(self) -> "_GrowingArray":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            end = self._write_header()
        assert end == self._data_start, "the header must keep its length"


def _write_split(
    target: Path, split: str, path: Path, fields: Fields, vocabularies: Vocabularies
) -> None:
    sizes = vocabularies.sizes
    starts = (sizes.cumsum() - sizes).astype(np.int32)
    rows = positives = 0
    with (
        _GrowingArray(target / f"{split}_rows.npy", "int32", len(fields.categorical)) as table_rows,
        _GrowingArray(target / f"{split}_values.npy", "float32", len(fields.numeric)) as values,
        _GrowingArray(target / f"{split}_clicked.npy", "bool") as clicked,
    ):
        for block in _blocks(path, fields, "encoding"):
            codes = np.empty((len(block), len(fields.categorical)), dtype=np.int32)
            for place, (name, tokens) in enumerate(block.tokens.items()):
                codes[:, place] = vocabularies.encode(name, tokens) + starts[place]
            numbers = np.empty((len(block), len(fields.numeric)), dtype=np.float32)
            for place, column in enumerate(block.values.values()):
                numbers[:, place] = column
            table_rows.append(codes)
            values.append(numbers)
            clicked.append(block.clicked)
            rows += len(block)
            positives += int(block.clicked.sum())
    if not rows:
        raise BadInputError(f"{path}: no rows")
    if positives in (0, rows):
        found = "none" if not positives else "all"
        raise BadInputError(f"{path}: of {rows:,} rows {found} are clicked; both classes must be")
    say(f"{path.name}: {rows:,} rows, {positives:,} clicked")
