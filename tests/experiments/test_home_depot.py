"""Home Depot: human grades become labels, whichever form they come in."""

import re
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.datasets.home_depot import build
from features.errors import BadInputError
from features.schema import DatasetSchema

# query, product_id, title, relevance
ROWS = [
    ("deck  over ", 100002, "BEHR DeckOver, 1 gal.", 3.0),
    ("angle bracket", 100001, "Simpson 12-Gauge Angle", 2.5),
    ("l bracket", 100001, "Simpson 12-Gauge Angle", 2.33),
    ("Angle bracket", 100001, "Simpson  12-Gauge Angle", 1.75),
    ("1/2\tpipe", 100003, 'Pipe 1/2", 30\xe5\xa1', 1.67),
    # Twice the same pair once white space is collapsed: (1.33 + 2.67) / 2 = 2.
    ("fence mesh", 100004, "Net", 1.33),
    ("fence  mesh", 100004, "Net, black", 2.67),
    # (2.33 + 2.67) / 2 = 2.5, highly relevant
    ("bird net", 100004, "Net", 2.33),
    (" bird net", 100004, "Net", 2.67),
    ("  ", 100005, "Lamp", 3.0),
]
LABELS = {
    ("deck over", 100002): 2,
    ("angle bracket", 100001): 2,
    ("l bracket", 100001): 1,
    ("Angle bracket", 100001): 1,
    ("1/2 pipe", 100003): 0,
    ("fence mesh", 100004): 1,
    ("bird net", 100004): 2,
}


def write_csv(folder: Path, rows: list[tuple] = ROWS) -> Path:
    folder.mkdir()
    frame = pd.DataFrame(rows, columns=["search_term", "product_uid", "product_title", "relevance"])
    frame.insert(0, "id", range(len(frame)))
    frame.to_csv(folder / "train.csv", index=False, encoding="latin-1")
    return folder


def write_parquet(folder: Path, rows: list[tuple] = ROWS) -> Path:
    folder.mkdir()
    frame = pd.DataFrame(rows, columns=["query", "product_id", "title", "relevance"])
    frame.to_parquet(folder / "relevance.parquet")
    return folder


def built(source: Path, output: Path) -> Path:
    output.mkdir()
    build(output, source=source)
    return output


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return built(write_csv(tmp_path / "source"), tmp_path / "dataset")


def test_labels_follow_the_mean_grade(dataset: Path) -> None:
    table = pq.read_table(dataset / "relevance.parquet")
    assert table.schema.field("label").type == pa.int8()
    rows = table.to_pylist()
    assert {(row["query"], row["product_id"]): row["label"] for row in rows} == LABELS
    assert len(rows) == len(LABELS)
    assert {row["source"] for row in rows} == {"human"}
    assert rows == sorted(rows, key=lambda row: (row["query"], row["product_id"]))


def test_a_product_has_the_title_of_most_rows(dataset: Path) -> None:
    table = pq.read_table(dataset / "catalog.parquet")
    assert table.schema.types == [pa.int64(), pa.string(), pa.string(), pa.binary()]
    assert table.to_pylist() == [
        {"product_id": number, "title": title, "aisle": None, "image": None}
        for number, title in (
            (100001, "Simpson 12-Gauge Angle"),
            (100002, "BEHR DeckOver, 1 gal."),
            (100003, 'Pipe 1/2", 30\xe5\xa1'),
            (100004, "Net"),
        )
    ]


def test_what_it_says_of_itself(dataset: Path) -> None:
    schema = DatasetSchema.load(dataset)
    assert schema.name == "home-depot"
    assert "Human grades" in schema.caveat
    assert "Kaggle" in schema.provenance
    assert schema.licence
    assert schema.weeks is None
    assert schema.features == ()


def test_both_forms_give_the_same_folder(tmp_path: Path, dataset: Path) -> None:
    other = built(write_parquet(tmp_path / "parquet"), tmp_path / "other")
    assert sorted(file.name for file in other.iterdir()) == [
        "catalog.parquet",
        "dataset.toml",
        "relevance.parquet",
    ]
    for file in other.iterdir():
        assert file.read_bytes() == (dataset / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("a", 1, "b", 3.01), "column 'relevance', row 11: is '3.01', expected a number from 1"),
        (("a", 1, "b", 0), "column 'relevance', row 11: is '0.0', expected a number from 1 to 3"),
        (("a", 1, "b", "high"), "column 'relevance', row 11: is 'high', expected a number"),
        (("a", 1, "b", "nan"), "column 'relevance', row 11: is 'nan', expected a number"),
        (("a", "x7", "b", 2), "column 'product_uid', row 11: is 'x7', expected a whole number"),
    ],
)
def test_wrong_values(tmp_path: Path, row: tuple, message: str) -> None:
    source = write_csv(tmp_path / "source", [*ROWS, row])
    with pytest.raises(BadInputError, match=re.escape(f"train.csv: {message}")):
        built(source, tmp_path / "dataset")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,search,product_uid,product_title,relevance\n", "column 'search_term' is missing"),
        ("id,search_term,product_uid,product_title,relevance\n", "the table is empty"),
        ("", "not a readable CSV file"),
        ('id,search_term,product_uid,product_title,relevance\n1,"a,2,b,3\n', "not a readable CSV"),
        (
            "id,search_term,product_uid,product_title,relevance\n1,a,2\n",
            "column 'relevance', row 1: is ''",
        ),
        ("id,search_term,product_uid,product_title,relevance\n1,a,2,b,c,3\n", "row 1 has more"),
        (
            "id,search_term,product_uid,product_title,relevance\n1,a,2,b,3\n1,a,2,b,c,3\n",
            "not a readable CSV file: Error tokenizing data. C error: Expected 5 fields in line 3",
        ),
    ],
)
def test_unreadable_csv(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(BadInputError, match=re.escape(f"train.csv: {message}")):
        built(tmp_path, tmp_path / "dataset")


def test_wrong_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "source") / "relevance.parquet"
    table = pq.read_table(path)
    for changed, message in (
        (table.drop_columns(["title"]), "column 'title' is missing"),
        (table.slice(0, 0), "the table is empty"),
        (
            table.set_column(1, "product_id", pa.array(["1"] * len(table))),
            "column 'product_id' is string, expected integer",
        ),
        (
            table.set_column(3, "relevance", pa.array([2.0, None] * 5)),
            "column 'relevance', row 2: is null",
        ),
    ):
        pq.write_table(changed, path)
        with pytest.raises(BadInputError, match=re.escape(f"relevance.parquet: {message}")):
            build(tmp_path, source=path.parent)
    path.write_bytes(b"no Parquet")
    with pytest.raises(BadInputError, match=r"relevance\.parquet: cannot be read"):
        build(tmp_path, source=path.parent)
