"""ESCI: labels, splits and ASINs of the United States."""

import re
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.datasets import published
from experiments.datasets.esci import asin, build, product_ids
from features.errors import BadInputError

EXAMPLES = [  # query, product_id, product_locale, esci_label, split
    ("usb  hub", "B000000001", "us", "E", "train"),
    ("usb hub", "B000000002", "us", "S", "train"),
    ("usb hub", "B00000000Z", "us", "C", "train"),
    ("usb hub", "0007123456", "us", "I", "train"),
    ("silla", "B000000001", "es", "E", "test"),
    ("book", "0007123456", "us", "E", "test"),
    (" book", "B000000002", "us", "S", "train"),
    ("book", "B000000001", "us", "E", "test"),  # twice: (2 + 0) / 2 = 1
    (" book", "B000000001", "us", "I", "train"),
]
PRODUCTS = [  # product_id, product_title, product_locale
    ("B000000001", "USB hub,  4 ports", "us"),
    ("B000000001", "Concentrador USB", "es"),
    ("B000000002", "USB cable", "us"),
    ("B00000000Z", None, "us"),
    ("0007123456", "The Book", "us"),
]
HUB, CABLE, MUTE, BOOK = (
    int(text, 36) for text in ("B000000001", "B000000002", "B00000000Z", "0007123456")
)


def write(
    folder: Path, *, examples: list[tuple] = EXAMPLES, products: list[tuple] = PRODUCTS
) -> Path:
    folder.mkdir()
    names = ["query", "product_id", "product_locale", "esci_label", "split"]
    frame = pd.DataFrame(examples, columns=names)
    frame = frame.assign(example_id=range(len(frame)), query_id=0, small_version=1, large_version=1)
    frame.to_parquet(folder / "shopping_queries_dataset_examples.parquet")
    names = ["product_id", "product_title", "product_locale"]
    frame = pd.DataFrame(products, columns=names).assign(product_brand="A", product_color=None)
    frame.to_parquet(folder / "shopping_queries_dataset_products.parquet")
    return folder


def built(source: Path, output: Path) -> Path:
    output.mkdir()
    build(output, source=source)
    return output


@pytest.mark.parametrize("batch", [1, 2, 65_536])
def test_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(published, "_BATCH", batch)
    dataset = built(write(tmp_path / "source"), tmp_path / "dataset")
    rows = pq.read_table(dataset / "catalog.parquet").to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        (HUB, "USB hub, 4 ports", None, None),
        (CABLE, "USB cable", None, None),
        (MUTE, None, None, None),
        (BOOK, "The Book", None, None),
    ]
    table = pq.read_table(dataset / "relevance.parquet")
    assert table.column_names == ["query", "product_id", "label", "source", "split"]
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("book", BOOK, 2, "human", "test"),
        ("book", HUB, 1, "human", "test"),
        ("book", CABLE, 1, "human", "test"),
        ("usb hub", BOOK, 0, "human", "train"),
        ("usb hub", HUB, 2, "human", "train"),
        ("usb hub", CABLE, 1, "human", "train"),
        ("usb hub", MUTE, 0, "human", "train"),
    ]


@given(
    st.lists(st.text("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=10, max_size=10), min_size=1)
)
def test_an_asin_and_its_number_are_one_to_one(asins: list[str]) -> None:
    numbers = product_ids(Path("a.parquet"), pd.Series(asins, name="product_id"))
    assert numbers.tolist() == [int(text, 36) for text in asins]
    assert [asin(number) for number in numbers] == asins


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("a", "B00000000", "us", "E", "test"), "'product_id', row 10: is 'B00000000', expected"),
        (("a", "b000000001", "us", "E", "test"), "'product_id', row 10: is 'b000000001', expected"),
        (("a", "B000000001", "us", "X", "test"), "'esci_label', row 10: is 'X', expected one of"),
        (("a", "B000000001", "us", "E", "dev"), "'split', row 10: is 'dev', expected one of train"),
        (("a", "B000000009", "us", "E", "test"), "'product_id' names B000000009, which "),
    ],
)
def test_wrong_examples(tmp_path: Path, row: tuple, message: str) -> None:
    source = write(tmp_path / "source", examples=[*EXAMPLES, row])
    expected = re.escape(f"examples.parquet: column {message}")
    with pytest.raises(BadInputError, match=expected):
        built(source, tmp_path / "dataset")


def test_a_product_stands_once_in_a_locale(tmp_path: Path) -> None:
    source = write(tmp_path / "source", products=[*PRODUCTS, PRODUCTS[0]])
    with pytest.raises(BadInputError, match=r"product B000000001 of locale us stands more than"):
        built(source, tmp_path / "dataset")


def test_another_country(tmp_path: Path) -> None:
    source = write(tmp_path / "source", examples=[row for row in EXAMPLES if row[2] == "es"])
    with pytest.raises(BadInputError, match="column 'product_locale' holds no 'us'"):
        built(source, tmp_path / "dataset")
