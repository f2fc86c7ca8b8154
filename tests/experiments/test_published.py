"""What all named datasets say where the user's files are missing, and how they are written."""

import importlib
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.datasets.published import NEAREST, mean_labels, tidy
from experiments.datasets.writing import products, write_catalog
from features.errors import BadInputError

FILES = {  # the files of every form
    "home_depot": [["train.csv"], ["relevance.parquet"]],
    "fashion": [["styles.csv", "images"], ["products.parquet"]],
    "grocery_store": [
        ["classes.csv", "train.txt"],
        ["products.parquet", "photos_train.parquet"],
    ],
    "esci": [
        [
            "shopping_queries_dataset_examples.parquet",
            "shopping_queries_dataset_products.parquet",
        ]
    ],
    "wands": [["label.csv", "query.csv", "product.csv"]],
}


@pytest.mark.parametrize("name", FILES)
def test_the_files_to_bring_are_named(tmp_path: Path, name: str) -> None:
    build = importlib.import_module(f"experiments.datasets.{name}").build
    with pytest.raises(BadInputError, match=r"not downloaded for you: download .*--source"):
        build(tmp_path, source=None)
    with pytest.raises(BadInputError, match=f"the folder holds (no|neither) {FILES[name][0][0]}"):
        build(tmp_path, source=tmp_path)


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name, forms in FILES.items() for form in forms if len(form) > 1],
)
def test_a_missing_file_is_named(tmp_path: Path, name: str, form: list[str]) -> None:
    build = importlib.import_module(f"experiments.datasets.{name}").build
    (tmp_path / form[0]).touch()
    message = f"{form[1]}: no such file or folder; download "
    with pytest.raises(BadInputError, match=re.escape(message)):
        build(tmp_path, source=tmp_path)


@given(
    sizes=st.lists(st.integers(0, 25), max_size=8),
    rows=st.integers(1, 12),
)
def test_row_groups_have_one_size(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], rows: int
) -> None:
    folder = tmp_path_factory.mktemp("catalog")
    ends = np.cumsum(sizes, dtype=np.int64)
    pieces = [
        products(np.arange(end - size, end), ["a"] * size)
        for end, size in zip(ends, sizes, strict=True)
    ]
    write_catalog(folder, pieces, rows=rows)
    file = pq.ParquetFile(folder / "catalog.parquet")
    total = sum(sizes)
    assert file.read()["product_id"].to_pylist() == list(range(total))
    groups = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    assert groups == [rows] * (total // rows) + [total % rows] * (total % rows > 0)


def test_empty_texts_are_null() -> None:
    table = products(np.array([1, 2]), ["", "a"], aisles=["b", ""], images=[None, b"c"])
    assert table.to_pylist() == [
        {"product_id": 1, "title": None, "aisle": "b", "image": None},
        {"product_id": 2, "title": "a", "aisle": None, "image": b"c"},
    ]


def test_means_are_rounded_to_the_nearest_label_and_halves_upwards() -> None:
    import pandas as pd

    pairs = pd.DataFrame(
        [
            ("a", 1, 0),  # 0, 1 -> .5 -> 1
            ("a", 1, 1),
            ("a", 2, 2),  # 2, 1 -> 1.5 -> 2
            ("a", 2, 1),
            ("b", 1, 0),  # 0, 0, 1 -> 1/3 -> 0
            ("b", 1, 0),
            ("b", 1, 1),
            ("b", 2, 2),  # 2, 2, 0 -> 4/3 -> 1
            ("b", 2, 2),
            ("b", 2, 0),
        ],
        columns=["query", "product_id", "grade"],
    )
    labels = mean_labels(pairs, NEAREST)
    assert labels.to_numpy().tolist() == [["a", 1, 1], ["a", 2, 2], ["b", 1, 0], ["b", 2, 1]]


def test_white_space_is_collapsed() -> None:
    import pandas as pd

    texts = pd.Series([" a\t b ", "", "\u00a0c\n", "D e"])
    assert tidy(texts).tolist() == ["a b", "", "c", "D e"]
