"""Reading the files of a published dataset, and saying what is wrong with them.

Every function raises `BadInputError` with one sentence that names the file, and the column and row
(counted from 1, without the header) where one is to blame.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.errors import BadInputError
from features.parquet import is_text, missing_column

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["text", "integer", "number", "bytes"]

NEAREST = (0.5, 1.5)  # cuts of the labels 0, 1 and 2 that round their mean, halves upwards

_BATCH = 65_536
_ACCEPTS = {
    "text": is_text,
    "integer": pa.types.is_integer,
    "number": lambda found: pa.types.is_integer(found) or pa.types.is_floating(found),
    "bytes": lambda found: pa.types.is_binary(found) or pa.types.is_large_binary(found),
}


def find_form(source: Path | None, forms: Sequence[Sequence[str]], how: str) -> Path:
    """Return the path of the first file of the form in which ``source`` holds a dataset.

    Args:
        source: the folder that the user named, or ``None``.
        forms: for each form the names of its files and folders, the one that tells it first.
        how: what to download and where to put it, as the end of a sentence.

    Raises:
        BadInputError: no folder was named, or a file is missing.
    """
    if source is None:
        raise BadInputError(f"this dataset is not downloaded for you: {how}")
    for form in forms:
        if (source / form[0]).exists():
            for name in form[1:]:
                if not (source / name).exists():
                    raise BadInputError(f"{source / name}: no such file or folder; {how}")
            return source / form[0]
    names = " nor ".join(form[0] for form in forms)
    neither = f"neither {names}" if len(forms) > 1 else f"no {names}"
    raise BadInputError(f"{source}: the folder holds {neither}; {how}")


def read_csv(
    path: Path, names: Sequence[str], *, separator: str = ",", encoding: str = "utf-8"
) -> "pd.DataFrame":
    """Return the columns ``names`` of a CSV file as the text that stands there.

    What a row that ends too early lacks is the empty string.

    Raises:
        BadInputError: the file is no CSV of that encoding, is empty, lacks a column, or has a row
            that is longer than its header.
    """
    import pandas as pd

    try:
        frame = pd.read_csv(
            path, sep=separator, encoding=encoding, dtype=str, keep_default_na=False
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path}: not a readable CSV file: {str(error).strip()}") from error
    for name in names:
        if name not in frame:
            raise missing_column(path, name, frame.columns.tolist())
    if not isinstance(frame.index, pd.RangeIndex):  # its first columns were taken for an index
        raise BadInputError(f"{path}: row 1 has more columns than the header")
    if frame.empty:
        raise BadInputError(f"{path}: the table is empty")
    return frame[list(names)]


def read_parquet(path: Path, columns: Mapping[str, Kind]) -> "pd.DataFrame":
    """Return the named columns of a Parquet file; a null text is the empty string.

    Raises:
        BadInputError: the file is unreadable or empty, or a column is missing, of another kind, or
            has a null where it is not text.
    """
    import pandas as pd

    frames = list(read_batches(path, columns))
    if not frames:
        raise BadInputError(f"{path}: the table is empty")
    return pd.concat(frames)


def read_batches(path: Path, columns: Mapping[str, Kind]) -> Iterator["pd.DataFrame"]:
    """Yield what `read_parquet` returns in pieces, whose index counts the rows of the file.

    Raises:
        BadInputError: as `read_parquet` does, but for an empty file.
    """
    start = 0
    with open_parquet(path, columns) as file:
        for batch in file.iter_batches(_BATCH, columns=list(columns)):
            for name, kind in columns.items():
                if kind != "text" and batch[name].null_count:
                    row = start + batch[name].is_null().index(True).as_py() + 1
                    raise BadInputError(f"{path}: column '{name}', row {row}: is null")
            frame = batch.to_pandas()
            texts = [name for name, kind in columns.items() if kind == "text"]
            frame[texts] = frame[texts].fillna("")
            frame.index += start
            start += len(frame)
            yield frame


@contextmanager
def open_parquet(path: Path, columns: Mapping[str, Kind]) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file that has the named columns; damage that is met is bad input.

    Raises:
        BadInputError: the file is unreadable, or a column is missing or of another kind.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            for name, kind in columns.items():
                if name not in schema.names:
                    raise missing_column(path, name, schema.names)
                found = schema.field(name).type
                if not _ACCEPTS[kind](found):
                    raise BadInputError(f"{path}: column '{name}' is {found}, expected {kind}")
            yield file
    except (pa.ArrowException, OSError) as error:
        raise BadInputError(f"{path}: cannot be read: {error}") from error


def whole_numbers(path: Path, values: "pd.Series") -> np.ndarray:
    """Return a column of ``path`` as int64 [N].

    Raises:
        BadInputError: a value is not a whole number from 0 to 10^18 - 1.
    """
    texts = values.astype(str).str.strip()
    wrong = ~texts.str.fullmatch(r"\d{1,18}").to_numpy(dtype=bool)
    _refuse(path, values, wrong, "a whole number")
    return texts.to_numpy().astype(np.int64)


def grades(path: Path, values: "pd.Series", *, low: float, high: float) -> np.ndarray:
    """Return a column of ``path`` as float64 [N].

    Raises:
        BadInputError: a value is no number, or outside ``[low, high]``.
    """
    import pandas as pd

    parsed = pd.to_numeric(values, errors="coerce").to_numpy(dtype=np.float64)
    wrong = ~((parsed >= low) & (parsed <= high))
    _refuse(path, values, wrong, f"a number from {low:g} to {high:g}")
    return parsed


def named_grades(path: Path, values: "pd.Series", known: Mapping[str, int]) -> np.ndarray:
    """Return int64 [N], the grade of each name in a column of ``path``.

    Raises:
        BadInputError: a name is not in ``known``.
    """
    parsed = values.map(known)
    _refuse(path, values, parsed.isna().to_numpy(), f"one of {', '.join(known)}")
    return parsed.to_numpy(dtype=np.int64)


def check_unique(path: Path, name: str, values: "pd.Series") -> None:
    """Raise `BadInputError` where a value of the column ``name`` stands twice."""
    twice = values[values.duplicated()]
    if len(twice):
        raise BadInputError(f"{path}: column '{name}' holds {twice.iloc[0]} more than once")


def mean_labels(pairs: "pd.DataFrame", cuts: tuple[float, float]) -> "pd.DataFrame":
    """Return one row for each query and product, with the label of its mean grade.

    Args:
        pairs: columns ``query``, ``product_id`` and ``grade``; a pair may stand in several rows.
        cuts: the mean grades from which a product is moderately (1) and highly relevant (2).

    Returns:
        columns ``query``, ``product_id`` and ``label``.
    """
    means = pairs.groupby(["query", "product_id"], as_index=False, observed=True)["grade"].mean()
    # A mean of decimal grades may miss a cut by a rounding of its binary form.
    labels = np.searchsorted(cuts, means.pop("grade").round(6), side="right")
    return means.assign(label=labels)


def tidy(values: "pd.Series") -> "pd.Series":
    """Return the texts with one space wherever there was white space, and none at either end."""
    return values.str.split().str.join(" ")


def _refuse(path: Path, values: "pd.Series", wrong: np.ndarray, expected: str) -> None:
    if wrong.any():
        row = int(wrong.argmax())
        raise BadInputError(
            f"{path}: column '{values.name}', row {values.index[row] + 1}: is "
            f"{str(values.iloc[row])!r}, expected {expected}"
        )
