"""Fashion product images (small): photos, titles and taxonomy of a fashion shop.

The folder ``--source`` holds ``styles.csv`` and ``images/ID.jpg`` as published on Kaggle, or
``products.parquet`` with the columns of ``styles.csv`` and ``image``. The aisle is the
``articleType``; relevance is derived from the attributes (`fashion_relevance`).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from experiments.datasets.fashion_relevance import relevance
from experiments.datasets.published import (
    Kind,
    check_unique,
    find_form,
    open_parquet,
    read_parquet,
    tidy,
    whole_numbers,
)
from experiments.datasets.writing import (
    IMAGE_ROWS,
    products,
    write_catalog,
    write_relevance,
    write_schema,
)
from features.console import say
from features.errors import BadInputError
from features.parquet import missing_column
from features.schema import DatasetSchema

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = DatasetSchema(
    name="fashion",
    licence="MIT as its Kaggle page says; bring your own copy and do not pass it on.",
    provenance=(
        "Kaggle, Fashion Product Images (Small), styles.csv and images: "
        "kaggle.com/datasets/paramaggarwal/fashion-product-images-small; relevance derived here "
        "from gender, colour, type and usage."
    ),
    caveat=(
        "Queries and relevance are derived from the catalog's gender, colour, type and usage: "
        "nobody searched or graded them, and most products that fit a broad query are unjudged."
    ),
)

_HOW = (
    "download 'Fashion Product Images (Small)' from Kaggle "
    "(paramaggarwal/fashion-product-images-small), unpack styles.csv and the folder images into "
    "one folder and name that folder with --source"
)
_ATTRIBUTES = ("gender", "masterCategory", "subCategory", "articleType", "baseColour", "usage")
_TITLE = "productDisplayName"
_UNKNOWN = ("NA", "nan")  # what styles.csv writes for an unknown attribute


def build(output: Path, *, source: Path | None) -> None:
    """Write the dataset's files into the empty folder ``output``.

    Args:
        output: an existing, empty folder.
        source: a folder with ``styles.csv`` and ``images``, or with ``products.parquet``.

    Raises:
        BadInputError: no folder was named, a file or column is missing, or a value is wrong.
    """
    path = find_form(source, [["styles.csv", "images"], ["products.parquet"]], _HOW)
    published = path.suffix == ".csv"
    frame = _read_styles(path) if published else _read_parquet(path)
    frame["id"] = whole_numbers(path, frame["id"])
    check_unique(path, "id", frame["id"])
    for name in _ATTRIBUTES:
        frame[name] = tidy(frame[name]).replace(list(_UNKNOWN), "")
    images = _image_files(path.parent / "images", frame) if published else _image_column(path)
    write_catalog(output, _catalog(frame, images), rows=IMAGE_ROWS)
    write_relevance(output, relevance(frame), source="derived")
    write_schema(output, SCHEMA)


def _read_styles(path: Path) -> "pd.DataFrame":
    """Read ``styles.csv``, whose names of products hold unquoted commas in a few lines.

    The name is the last column, so that whatever follows the comma before it belongs to it.
    """
    import pandas as pd

    try:
        header, *lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise BadInputError(f"{path}: not a readable CSV file: {error}") from error
    names = header.split(",")
    for name in ("id", *_ATTRIBUTES, _TITLE):
        if name not in names:
            raise missing_column(path, name, names)
    if names[-1] != _TITLE:
        raise BadInputError(f"{path}: column '{_TITLE}' must be the last, found {header!r}")
    rows = [line.split(",", len(names) - 1) for line in lines if line.strip()]
    for number, row in enumerate(rows, start=1):
        if len(row) < len(names):
            raise BadInputError(f"{path}: row {number} has too few columns: {','.join(row)!r}")
    if not rows:
        raise BadInputError(f"{path}: the table is empty")
    frame = pd.DataFrame(rows, columns=names, dtype=str)
    quoted = frame[_TITLE].str.fullmatch('".*"')
    frame.loc[quoted, _TITLE] = frame[_TITLE].str.slice(1, -1).str.replace('""', '"')
    return frame


def _read_parquet(path: Path) -> "pd.DataFrame":
    texts: dict[str, Kind] = dict.fromkeys((*_ATTRIBUTES, _TITLE), "text")
    return read_parquet(path, {"id": "integer", **texts})


def _catalog(frame: "pd.DataFrame", images: Iterator[list[bytes | None]]) -> Iterator[pa.Table]:
    start = 0
    for batch in images:
        rows = frame.iloc[start : start + len(batch)]
        start += len(batch)
        yield products(
            rows["id"].to_numpy(),
            tidy(rows[_TITLE]).tolist(),
            aisles=rows["articleType"].tolist(),
            images=batch,
        )


def _image_files(folder: Path, frame: "pd.DataFrame") -> Iterator[list[bytes | None]]:
    """Yield the bytes of ``folder/ID.jpg``, ``None`` where there is no such file."""
    missing = []
    for start in range(0, len(frame), IMAGE_ROWS):
        batch: list[bytes | None] = []
        for number in frame["id"].iloc[start : start + IMAGE_ROWS]:
            try:
                batch.append((folder / f"{number}.jpg").read_bytes())
            except FileNotFoundError:
                missing.append(f"{number}.jpg")
                batch.append(None)
        yield batch
    if missing:
        say(f"{folder}: {len(missing)} of {len(frame)} images are missing, first {missing[0]}")


def _image_column(path: Path) -> Iterator[list[bytes | None]]:
    with open_parquet(path, {"image": "bytes"}) as file:
        for batch in file.iter_batches(IMAGE_ROWS, columns=["image"]):
            yield batch.column(0).to_pylist()
