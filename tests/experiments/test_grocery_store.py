"""Grocery Store: iconic images and photos become products."""

import re
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from experiments.datasets.grocery_store import build
from features.errors import BadInputError
from features.schema import DatasetSchema

CLASSES = [  # name, id, coarse name
    ("Golden-Delicious", 0, "Apple"),
    ("Oatly-Oat-Milk", 2, "Oat-Milk"),
]
PHOTOS = [2, 0, 2]  # the class of each training photo


def write_published(folder: Path) -> Path:
    (folder / "iconic").mkdir(parents=True)
    (folder / "train").mkdir()
    names = [
        "Class Name (str)",
        "Class ID (int)",
        "Coarse Class Name (str)",
        "Coarse Class ID (int)",
        "Iconic Image Path (str)",
        "Product Description Path (str)",
    ]
    rows = [
        (name, number, coarse, number, f"/iconic/{name}_Iconic.jpg", f"/iconic/{name}.txt")
        for name, number, coarse in CLASSES
    ]
    pd.DataFrame(rows, columns=names).to_csv(folder / "classes.csv", index=False)
    for name, number, _ in CLASSES:
        (folder / "iconic" / f"{name}_Iconic.jpg").write_bytes(b"iconic %d" % number)
    lines = []
    for row, number in enumerate(PHOTOS):
        (folder / "train" / f"photo_{row}.jpg").write_bytes(b"photo %d" % row)
        lines.append(f"train/photo_{row}.jpg, {number}, {number}\n")
    (folder / "train.txt").write_text("".join(lines))
    return folder


def write_parquet(folder: Path) -> Path:
    folder.mkdir()
    classes = pd.DataFrame(CLASSES, columns=["class_name", "class_id", "coarse_class"])
    classes["iconic_image"] = [b"iconic %d" % number for number in classes["class_id"]]
    classes.to_parquet(folder / "products.parquet")
    photos = {"class_id": PHOTOS, "image": [b"photo %d" % row for row in range(len(PHOTOS))]}
    pd.DataFrame(photos).to_parquet(folder / "photos_train.parquet")
    return folder


def built(source: Path, output: Path) -> Path:
    output.mkdir()
    build(output, source=source)
    return output


def test_the_catalog(tmp_path: Path) -> None:
    dataset = built(write_published(tmp_path / "source"), tmp_path / "dataset")
    rows = pq.read_table(dataset / "catalog.parquet").to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        (1000, "Golden Delicious", "Apple", b"iconic 0"),
        (3000, "Oatly Oat Milk", "Oat Milk", b"iconic 2"),
        (3001, "Oatly Oat Milk", "Oat Milk", b"photo 0"),
        (1001, "Golden Delicious", "Apple", b"photo 1"),
        (3002, "Oatly Oat Milk", "Oat Milk", b"photo 2"),
    ]
    assert not (dataset / "relevance.parquet").exists()
    schema = DatasetSchema.load(dataset)
    assert schema.name == "grocery-store"
    assert "Klasson, Zhang, Kjellstr\xf6m" in schema.provenance


def test_both_forms_give_the_same_folder(tmp_path: Path) -> None:
    one = built(write_published(tmp_path / "published"), tmp_path / "one")
    two = built(write_parquet(tmp_path / "parquet"), tmp_path / "two")
    for name in ("catalog.parquet", "dataset.toml"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def refused(source: Path, output: Path) -> str:
    with pytest.raises(BadInputError) as caught:
        built(source, output)
    return str(caught.value)


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    source = write_published(tmp_path / "source")
    (source / "train" / "photo_1.jpg").unlink()
    assert re.search(
        r"train\.txt: names the image .*photo_1\.jpg, which is not there",
        refused(source, tmp_path / "one"),
    )
    (source / "iconic" / "Oatly-Oat-Milk_Iconic.jpg").unlink()
    assert "classes.csv: names the image" in refused(source, tmp_path / "two")


@pytest.mark.parametrize("line", ["train/photo_1.jpg", "train/photo_1.jpg, 1, 1", "a, b, c"])
def test_a_line_without_a_known_class(tmp_path: Path, line: str) -> None:
    source = write_published(tmp_path / "source")
    (source / "train.txt").write_text(f"train/photo_0.jpg, 2, 2\n{line}\n")
    message = refused(source, tmp_path / "dataset")
    assert f"train.txt: line 2: '{line}' is no path, class id of classes.csv" in message


def test_wrong_tables(tmp_path: Path) -> None:
    source = write_published(tmp_path / "source")
    table = pd.read_csv(source / "classes.csv")
    table.assign(**{"Class ID (int)": 2}).to_csv(source / "classes.csv", index=False)
    message = refused(source, tmp_path / "one")
    assert message.endswith("classes.csv: column 'Class ID (int)' holds 2 more than once")
    source = write_parquet(tmp_path / "parquet")
    photos = pd.read_parquet(source / "photos_train.parquet")
    photos.assign(class_id=[0, 2, 7]).to_parquet(source / "photos_train.parquet")
    message = refused(source, tmp_path / "two")
    assert "photos_train.parquet: column 'class_id', row 3: is 7, which" in message
