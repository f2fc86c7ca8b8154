"""The Grocery Store dataset: iconic images and natural photos of 81 grocery products.

The folder ``--source`` is the folder ``dataset`` of the published repository (``classes.csv``,
``train.txt`` and the images that both name), or holds ``products.parquet`` (``class_name``,
``class_id``, ``coarse_class``, ``iconic_image``) and ``photos_train.parquet`` (``class_id``,
``image``).

The catalog has one product for each class, with its iconic image, and one for each training photo;
both have the class name as their title and the coarse class as their aisle. Product ids are
``1000 · (class_id + 1)`` for the class and ``1000 · (class_id + 1) + n`` for its nth photo. The
validation and test photos stay out, for whoever evaluates on them. There are no queries.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from experiments.datasets.published import (
    check_unique,
    find_form,
    open_parquet,
    read_csv,
    read_parquet,
    tidy,
    whole_numbers,
)
from experiments.datasets.writing import IMAGE_ROWS, products, write_catalog, write_schema
from features.errors import BadInputError
from features.schema import DatasetSchema

if TYPE_CHECKING:
    import pandas as pd

PHOTOS = 1_000  # product ids that belong to a class

SCHEMA = DatasetSchema(
    name="grocery-store",
    licence="MIT, Marcus Klasson.",
    provenance=(
        "Klasson, Zhang, Kjellstr\N{LATIN SMALL LETTER O WITH DIAERESIS}m: A Hierarchical Grocery "
        "Store Image Dataset with Visual and Semantic Labels (WACV 2019); "
        "github.com/marcusklasson/GroceryStoreDataset."
    ),
    caveat=(
        "81 grocery products: the photos of a product are products of their own here and share "
        "its title; there are no queries."
    ),
)

_HOW = (
    "download github.com/marcusklasson/GroceryStoreDataset and name its folder 'dataset', which "
    "holds classes.csv, train.txt and the images, with --source"
)
_CLASSES = {
    "Class Name (str)": "name",
    "Class ID (int)": "class_id",
    "Coarse Class Name (str)": "coarse",
    "Iconic Image Path (str)": "image",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Photo:
    class_id: int
    image: bytes


def build(output: Path, *, source: Path | None) -> None:
    """Write the dataset's files into the empty folder ``output``.

    Args:
        output: an existing, empty folder.
        source: a folder with ``classes.csv``, ``train.txt`` and the images that they name, or with
            ``products.parquet`` and ``photos_train.parquet``.

    Raises:
        BadInputError: no folder was named, a file or column is missing, or a value is wrong.
    """
    forms = [["classes.csv", "train.txt"], ["products.parquet", "photos_train.parquet"]]
    path = find_form(source, forms, _HOW)
    published = path.suffix == ".csv"
    classes = _read_classes(path) if published else _read_parquet(path)
    photos = (
        _photo_files(path.with_name("train.txt"), classes)
        if published
        else _photo_rows(path.with_name("photos_train.parquet"), classes)
    )
    write_catalog(output, _catalog(classes, photos), rows=IMAGE_ROWS)
    write_schema(output, SCHEMA)


def _read_classes(path: Path) -> "pd.DataFrame":
    frame = read_csv(path, list(_CLASSES))
    _check_classes(path, frame, "Class ID (int)")
    frame = frame.rename(columns=_CLASSES)
    frame["image"] = [_image(path, path.parent, name) for name in frame["image"]]
    return frame.set_index("class_id")


def _read_parquet(path: Path) -> "pd.DataFrame":
    frame = read_parquet(
        path,
        {
            "class_name": "text",
            "class_id": "integer",
            "coarse_class": "text",
            "iconic_image": "bytes",
        },
    )
    _check_classes(path, frame, "class_id")
    names = {"class_name": "name", "coarse_class": "coarse", "iconic_image": "image"}
    return frame.rename(columns=names).set_index("class_id")


def _check_classes(path: Path, frame: "pd.DataFrame", name: str) -> None:
    frame[name] = whole_numbers(path, frame[name])
    check_unique(path, name, frame[name])


def _photo_files(path: Path, classes: "pd.DataFrame") -> Iterator[_Photo]:
    """Yield the photos of ``train.txt``: lines of path, class id and coarse class id."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        parts = [part.strip() for part in line.split(",")]
        if len(parts) < 2 or not parts[1].isdecimal() or int(parts[1]) not in classes.index:
            raise BadInputError(
                f"{path}: line {number}: {line!r} is no path, class id of classes.csv and coarse "
                "class id, with commas between them"
            )
        yield _Photo(class_id=int(parts[1]), image=_image(path, path.parent, parts[0]))


def _photo_rows(path: Path, classes: "pd.DataFrame") -> Iterator[_Photo]:
    with open_parquet(path, {"class_id": "integer", "image": "bytes"}) as file:
        row = 0
        for batch in file.iter_batches(IMAGE_ROWS, columns=["class_id", "image"]):
            for found in batch.to_pylist():
                row += 1
                if found["class_id"] not in classes.index:
                    raise BadInputError(
                        f"{path}: column 'class_id', row {row}: is {found['class_id']}, which "
                        "products.parquet does not hold"
                    )
                yield _Photo(**found)


def _image(path: Path, folder: Path, name: str) -> bytes:
    file = folder / name.strip().lstrip("/")
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise BadInputError(f"{path}: names the image {file}, which is not there") from error


def _catalog(classes: "pd.DataFrame", photos: Iterable[_Photo]) -> Iterator[pa.Table]:
    titles = tidy(classes["name"].str.replace("-", " "))
    aisles = tidy(classes["coarse"].str.replace("-", " "))

    def rows(class_ids: list[int], number: list[int], images: list[bytes]) -> pa.Table:
        return products(
            PHOTOS * (np.array(class_ids, np.int64) + 1) + number,
            titles.loc[class_ids].tolist(),
            aisles=aisles.loc[class_ids].tolist(),
            images=images,
        )

    yield rows(classes.index.tolist(), [0] * len(classes), classes["image"].tolist())
    seen: dict[int, int] = {}
    for photo in photos:
        seen[photo.class_id] = number = seen.get(photo.class_id, 0) + 1
        if number >= PHOTOS:
            raise BadInputError(
                f"class {photo.class_id} has {PHOTOS} photos or more; product ids allow fewer"
            )
        yield rows([photo.class_id], [number], [photo.image])
