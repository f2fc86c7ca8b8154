"""WANDS: tab-separated files with names of grades."""

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from experiments.datasets.wands import build
from features.errors import BadInputError

QUERIES = ["query_id\tquery\tquery_class", "0\tsalon  chair\tMassage Chairs", "1\tsofa\t"]
PRODUCTS = [
    "product_id\tproduct_name\tproduct_class\tcategory hierarchy\tproduct_description\trating",
    '0\tsolid wood bed\tBeds|Kids Beds\tFurniture / Beds\t"good, deep\n""sleep"""\t15.0',
    '1\t20" bar stool , black\tBar Stools\t\t\t',
    "2\trecliner\t\t\t\t",
]
LABELS = [
    "id\tquery_id\tproduct_id\tlabel",
    "0\t0\t0\tIrrelevant",
    "1\t0\t1\tExact",
    "2\t0\t2\tPartial",
    "3\t1\t2\tExact",
    "4\t1\t2\tPartial",  # (2 + 1) / 2 = 1.5 -> 2
    "5\t1\t0\tPartial",
    "6\t1\t0\tIrrelevant",
    "7\t1\t0\tIrrelevant",  # 1 / 3 -> 0
]


def write(folder: Path, *, labels: list[str] = LABELS, products: list[str] = PRODUCTS) -> Path:
    folder.mkdir()
    for name, lines in (("query", QUERIES), ("product", products), ("label", labels)):
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def built(source: Path, output: Path) -> Path:
    output.mkdir()
    build(output, source=source)
    return output


def test_the_folder(tmp_path: Path) -> None:
    dataset = built(write(tmp_path / "source"), tmp_path / "dataset")
    rows = pq.read_table(dataset / "catalog.parquet").to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        (0, "solid wood bed", "Beds", None),
        (1, '20" bar stool , black', "Bar Stools", None),
        (2, "recliner", None, None),
    ]
    rows = pq.read_table(dataset / "relevance.parquet").to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("salon chair", 0, 0, "human"),
        ("salon chair", 1, 2, "human"),
        ("salon chair", 2, 1, "human"),
        ("sofa", 0, 0, "human"),
        ("sofa", 2, 2, "human"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("8\t1\t1\tGood", "label.csv: column 'label', row 9: is 'Good', expected one of Irr"),
        ("8\t1\t7\tExact", "label.csv: column 'product_id' names 7, which "),
        ("8\t4\t1\tExact", "label.csv: column 'query_id' names 4, which "),
        ("8\t1\t-1\tExact", "label.csv: column 'product_id', row 9: is '-1', expected a whole"),
    ],
)
def test_wrong_labels(tmp_path: Path, line: str, message: str) -> None:
    source = write(tmp_path / "source", labels=[*LABELS, line])
    with pytest.raises(BadInputError, match=re.escape(message)):
        built(source, tmp_path / "dataset")


def test_wrong_products(tmp_path: Path) -> None:
    source = write(tmp_path / "one", products=[*PRODUCTS, "2\tchair\t\t\t\t"])
    with pytest.raises(BadInputError, match=r"product\.csv: column 'product_id' holds 2 more than"):
        built(source, tmp_path / "dataset")
    source = write(tmp_path / "two", products=[PRODUCTS[0].replace("\t", ","), *PRODUCTS[1:]])
    with pytest.raises(BadInputError, match=r"product\.csv: "):
        build(tmp_path, source=source)
