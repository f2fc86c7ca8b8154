"""Fashion product images: attributes become aisles, queries and derived labels."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.datasets import fashion_relevance
from experiments.datasets.fashion import build
from experiments.datasets.fashion_relevance import Attributes, Query, grade, queries, relevance
from features.errors import BadInputError
from features.schema import DatasetSchema

COLUMNS = [
    "id",
    "gender",
    "masterCategory",
    "subCategory",
    "articleType",
    "baseColour",
    "season",
    "year",
    "usage",
    "productDisplayName",
]
SHIRT = ("Apparel", "Topwear", "Shirts")
TSHIRT = ("Apparel", "Topwear", "Tshirts")
HEEL = ("Footwear", "Shoes", "Heels")


def product(
    number: int,
    gender: str,
    kind: tuple[str, str, str],
    colour: str,
    usage: str = "Casual",
    name: str = "",
) -> tuple:
    name = name or f"Brand {gender} {colour} {kind[2]}"
    return (number, gender, *kind, colour, "Fall", "2011", usage, name)


SMALL = [
    *(product(number, "Men", SHIRT, "Navy Blue") for number in range(1, 6)),
    product(6, "Men", SHIRT, "Red"),
    product(7, "Women", SHIRT, "Navy Blue"),
    product(8, "Unisex", SHIRT, "Navy Blue", "Formal"),
    product(11, "Men", TSHIRT, "Navy Blue"),
    product(12, "Men", TSHIRT, "Red"),
    product(21, "Women", HEEL, "Navy Blue", name='6" Heel, Blue, by "A", new'),
    product(22, "Women", HEEL, "NA", "NA", name="Say  ''hi''"),
]


def frame(rows: list[tuple]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=COLUMNS).replace("NA", "")


def labels(rows: list[tuple]) -> dict[str, dict[int, int]]:
    found: dict[str, dict[int, int]] = {}
    for query, number, label in relevance(frame(rows)).itertuples(index=False):
        found.setdefault(query, {})[number] = label
    return found


def test_queries_name_what_enough_products_have() -> None:
    """Seven of eight shirts are casual: a share of .875 at most tells them apart."""
    assert [query.text for query in queries(Attributes(frame(SMALL)))] == [
        "casual shirts",
        "men casual shirts",
        "men navy blue casual shirts",
        "men navy blue shirts",
        "men shirts",
        "navy blue casual shirts",
        "navy blue shirts",
        "shirts",
    ]


def test_a_usage_that_all_have_is_not_named() -> None:
    rows = [row if row[0] != 8 else product(8, "Unisex", SHIRT, "Navy Blue") for row in SMALL]
    found = [query.text for query in queries(Attributes(frame(rows)))]
    assert found == ["men navy blue shirts", "men shirts", "navy blue shirts", "shirts"]


def test_labels_by_hand() -> None:
    found = labels(SMALL)
    assert found["men navy blue shirts"] == {
        **dict.fromkeys([1, 2, 3, 4, 5, 8], 2),  # 8 is unisex
        **dict.fromkeys([6, 7], 1),  # shirts of another colour or gender
        11: 1,  # another kind of topwear with both attributes
        **dict.fromkeys([12, 21, 22], 0),
    }
    assert found["shirts"] == {
        **dict.fromkeys(range(1, 9), 2),
        **dict.fromkeys([11, 12], 1),
        **dict.fromkeys([21, 22], 0),
    }
    assert found["men casual shirts"][8] == 1  # formal
    assert found["men casual shirts"][12] == 1  # a casual T-shirt for men, red


def test_no_query_no_rows() -> None:
    assert labels(SMALL[:4]) == {}


def test_words_of_a_query() -> None:
    named = {"usage": "Smart Casual", "gender": "Women", "baseColour": "Multi"}
    assert Query(article="Flip Flops", named=named).text == (
        "women multicolour smart casual flip flops"
    )


def test_texts_are_distinct() -> None:
    """Sandals for sports and sports sandals read the same: the type with that name is meant."""
    sandals = ("Footwear", "Sandal", "Sandals")
    rows = [product(number, "Men", sandals, "Black", "Sports") for number in range(1, 6)]
    rows += [product(number, "Men", sandals, "Black", "Casual") for number in range(6, 11)]
    rows += [
        product(number, "Men", ("Footwear", "Sandal", "Sports Sandals"), "Black", "Sports")
        for number in range(11, 16)
    ]
    found = queries(Attributes(frame(rows)))
    assert len({query.text for query in found}) == len(found)
    assert Query(article="Sports Sandals", named={}) in found
    assert labels(rows)["sports sandals"] == {
        **dict.fromkeys(range(1, 11), 1),
        **dict.fromkeys(range(11, 16), 2),
    }


def test_samples_are_bounded_and_half_of_the_irrelevant_are_hard() -> None:
    belts = ("Accessories", "Belts", "Belts")
    rows = [product(number, "Men", SHIRT, "Black") for number in range(100)]
    rows += [product(number, "Men", SHIRT, "White") for number in range(100, 160)]
    rows += [product(number, "Men", TSHIRT, "Black") for number in range(200, 260)]
    rows += [product(number, "Men", TSHIRT, "White") for number in range(300, 360)]  # category
    rows += [product(number, "Men", belts, "Black") for number in range(400, 410)]  # colour
    rows += [product(number, "Men", belts, "Brown") for number in range(500, 560)]
    found = labels(rows)["black shirts"]
    counts = np.bincount(list(found.values()))
    assert counts.tolist() == [30, 20, 20]

    def kept(label: int, first: int, last: int) -> int:
        return sum(found.get(number) == label for number in range(first, last))

    assert kept(2, 0, 100) == 20
    assert (kept(1, 100, 160), kept(1, 200, 260)) == (10, 10)
    assert kept(0, 300, 360) + kept(0, 400, 410) == 15
    assert kept(0, 500, 560) == 15
    few = labels([row for row in rows if row[0] < 503])["black shirts"]
    assert sum(few.get(number) == 0 for number in range(500, 503)) == 3
    assert np.bincount(list(few.values())).tolist() == [30, 20, 20]


products_drawn = st.lists(
    st.tuples(
        st.sampled_from(["Men", "Women", "Unisex", "Boys"]),
        st.sampled_from([SHIRT, TSHIRT, HEEL]),
        st.sampled_from(["Black", "White", ""]),
        st.sampled_from(["Casual", "Formal"]),
    ),
    min_size=15,
    max_size=60,
)


@given(drawn=products_drawn, seed=st.integers(0, 99))
def test_labels_follow_the_rules_in_any_order(drawn: list[tuple], seed: int) -> None:
    rows = [product(number, *row) for number, row in enumerate(drawn)]
    attributes = Attributes(frame(rows))
    shuffled = Attributes(frame(rows).sample(frac=1, random_state=seed))
    asked = queries(attributes)
    assert queries(shuffled) == asked
    for query in asked:
        kept, found = grade(attributes, query)
        assert len(set(kept.tolist())) == len(kept)
        assert (found == 2).sum() >= fashion_relevance.ENOUGH
        assert found.tolist() == [reference_label(query, rows[row]) for row in kept]
        again, labels_again = grade(shuffled, query)
        pairs = zip(shuffled.product_id[again].tolist(), labels_again.tolist(), strict=True)
        assert set(pairs) == set(zip(kept.tolist(), found.tolist(), strict=True))


def reference_label(query: Query, row: tuple) -> int:
    """The rules, one product at a time."""
    values = dict(zip(COLUMNS, row, strict=True))
    genders = {"Men": ("Men", "Unisex"), "Women": ("Women", "Unisex"), "Boys": ("Boys",)}
    fits = all(
        values[name] in genders[value] if name == "gender" else values[name] == value
        for name, value in query.named.items()
    )
    if values["articleType"] == query.article:
        return 2 if fits else 1
    sub_categories = {"Shirts": "Topwear", "Tshirts": "Topwear", "Heels": "Shoes"}
    return int(fits and values["subCategory"] == sub_categories[query.article])


# The folder.


def write_published(folder: Path, rows: list[tuple] = SMALL, *, without: int = 12) -> Path:
    """Write ``styles.csv`` as it is published: names with commas stand there without quotes."""
    (folder / "images").mkdir(parents=True)
    lines = [",".join(COLUMNS), *(",".join(map(str, row)) for row in rows)]
    (folder / "styles.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for row in rows:
        if row[0] != without:
            (folder / "images" / f"{row[0]}.jpg").write_bytes(b"\xff\xd8" + bytes([row[0]]))
    return folder


def write_parquet(folder: Path, rows: list[tuple] = SMALL, *, without: int = 12) -> Path:
    folder.mkdir()
    table = pd.DataFrame(rows, columns=COLUMNS).replace("NA", None)
    table["image"] = [None if row[0] == without else b"\xff\xd8" + bytes([row[0]]) for row in rows]
    table.to_parquet(folder / "products.parquet")
    return folder


def built(source: Path, output: Path) -> Path:
    output.mkdir()
    build(output, source=source)
    return output


def test_the_catalog(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_published(tmp_path / "source")
    dataset = built(source, tmp_path / "dataset")
    rows = {
        row["product_id"]: row for row in pq.read_table(dataset / "catalog.parquet").to_pylist()
    }
    assert list(rows) == [row[0] for row in SMALL]
    assert rows[21] == {
        "product_id": 21,
        "title": '6" Heel, Blue, by "A", new',
        "aisle": "Heels",
        "image": b"\xff\xd8\x15",
    }
    assert rows[22]["title"] == "Say ''hi''"
    assert rows[12]["image"] is None
    assert "1 of 12 images are missing, first 12.jpg" in capsys.readouterr().err
    schema = DatasetSchema.load(dataset)
    assert "derived" in schema.caveat
    assert "derived" in schema.provenance
    pairs = pq.read_table(dataset / "relevance.parquet")
    assert set(pairs["source"].to_pylist()) == {"derived"}
    assert len(pairs) == 8 * len(SMALL)


def test_both_forms_give_the_same_folder(tmp_path: Path) -> None:
    one = built(write_published(tmp_path / "published"), tmp_path / "one")
    two = built(write_parquet(tmp_path / "parquet"), tmp_path / "two")
    names = sorted(file.name for file in one.iterdir())
    assert names == ["catalog.parquet", "dataset.toml", "relevance.parquet"]
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_quoted_names_lose_their_quotes(tmp_path: Path) -> None:
    row = product(1, "Men", SHIRT, "Blue", name='"Polo, ""big"" Shirt"')
    dataset = built(write_published(tmp_path / "source", [row]), tmp_path / "dataset")
    assert pq.read_table(dataset / "catalog.parquet")["title"].to_pylist() == ['Polo, "big" Shirt']
    assert pq.read_table(dataset / "relevance.parquet").num_rows == 0


def test_unknown_names_and_types_are_null(tmp_path: Path) -> None:
    row = (1, "Men", "Apparel", "Topwear", "NA", "Blue", "Fall", "", "Casual", "")
    dataset = built(write_published(tmp_path / "source", [row]), tmp_path / "dataset")
    (found,) = pq.read_table(dataset / "catalog.parquet").to_pylist()
    assert (found["title"], found["aisle"]) == (None, None)


def test_row_groups_are_small(tmp_path: Path) -> None:
    rows = [product(number, "Men", SHIRT, "Blue") for number in range(1, 1100)]
    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    table = pd.DataFrame(rows, columns=COLUMNS)
    table.to_csv(source / "styles.csv", index=False)
    file = pq.ParquetFile(built(source, tmp_path / "dataset") / "catalog.parquet")
    groups = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    assert groups == [1024, 75]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["id,gender"], "column 'masterCategory' is missing"),
        ([",".join(COLUMNS)], "the table is empty"),
        (
            [",".join(["productDisplayName", *COLUMNS[:-1]])],
            "column 'productDisplayName' must be the last",
        ),
        ([",".join(COLUMNS), "1,Men,Apparel"], "row 1 has too few columns: '1,Men,Apparel'"),
        (
            [",".join(COLUMNS), "one,Men,A,B,C,Blue,Fall,2011,Casual,Shirt"],
            "column 'id', row 1: is 'one', expected a whole number",
        ),
        (
            [",".join(COLUMNS), *["7,Men,A,B,C,Blue,Fall,2011,Casual,Shirt"] * 2],
            "column 'id' holds 7 more than once",
        ),
        ([b"\xff\xfe"], "not a readable CSV file"),
    ],
)
def test_wrong_styles(tmp_path: Path, lines: list[str | bytes], message: str) -> None:
    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    content = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    (source / "styles.csv").write_bytes(content)
    with pytest.raises(BadInputError, match=re.escape(f"styles.csv: {message}")):
        built(source, tmp_path / "dataset")


def test_wrong_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "source") / "products.parquet"
    table = pq.read_table(path)
    place = table.schema.get_field_index("image")
    for changed, message in (
        (table.drop_columns(["image"]), "column 'image' is missing"),
        (
            table.set_column(place, "image", pa.array(["a.jpg"] * len(table))),
            "column 'image' is string, expected bytes",
        ),
        (table.drop_columns(["usage"]), "column 'usage' is missing"),
    ):
        pq.write_table(changed, path)
        with pytest.raises(BadInputError, match=re.escape(f"products.parquet: {message}")):
            build(tmp_path, source=path.parent)
