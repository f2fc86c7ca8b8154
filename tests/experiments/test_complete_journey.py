"""The default dataset, built from hand-made files of the package's form."""

import datetime as dt
import hashlib
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from experiments.datasets.complete_journey import FIRST_DAY, build, package_data
from experiments.datasets.retail_text import query_texts, readable, title, tokens
from features.errors import BadInputError
from features.schema import DatasetSchema

TRANSACTIONS = pa.schema(
    [
        ("household_id", pa.int64()),
        ("store_id", pa.int64()),
        ("basket_id", pa.int64()),
        ("product_id", pa.int64()),
        ("quantity", pa.int64()),
        ("sales_value", pa.float64()),
        ("retail_disc", pa.float64()),
        ("coupon_disc", pa.float64()),
        ("coupon_match_disc", pa.float64()),
        ("week", pa.int64()),
        ("transaction_timestamp", pa.timestamp("ns")),
    ]
)
PRODUCTS = pa.schema(
    [
        ("product_id", pa.int64()),
        ("manufacturer_id", pa.int64()),
        ("department", pa.string()),
        ("brand", pa.string()),
        ("product_category", pa.string()),
        ("product_type", pa.string()),
        ("package_size", pa.string()),
    ]
)
PROMOTIONS = pa.schema(
    [
        ("product_id", pa.int64()),
        ("store_id", pa.int64()),
        ("display_location", pa.string()),
        ("mailer_location", pa.string()),
        ("week", pa.int64()),
    ]
)

CHIPS = ("BAG SNACKS", "POTATO CHIPS")


def local_week(when: dt.datetime) -> int:
    return (when.date() - FIRST_DAY).days // 7 + 1


def utc(when: dt.datetime) -> dt.datetime:
    summer = dt.datetime(2017, 3, 12, 2) <= when < dt.datetime(2017, 11, 5, 2)
    return when + dt.timedelta(hours=4 if summer else 5)


def line(
    basket: int,
    when: dt.datetime,
    product: int,
    *,
    household: int = 1,
    store: int = 7,
    quantity: int = 1,
    sales: float = 1.0,
    discounts: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> tuple:
    return (
        *(household, store, basket, product, quantity, sales),
        *(*discounts, local_week(when), utc(when)),
    )


def product(number: int, category: str | None, kind: str | None, size: str | None = None) -> tuple:
    return (number, 69, "GROCERY", "National", category, kind, size)


def write_source(folder: Path, lines: list, products: list, promotions: list) -> Path:
    folder.mkdir(exist_ok=True)
    for name, schema, rows in (
        ("transactions", TRANSACTIONS, lines),
        ("products", PRODUCTS, products),
        ("promotions", PROMOTIONS, promotions),
    ):
        columns = [
            pa.array(values, field.type)
            for values, field in zip(zip(*rows, strict=True), schema, strict=True)
        ]
        pq.write_table(pa.table(columns, schema=schema), folder / f"{name}.parquet")
    return folder


def built(source: Path, output: Path) -> Path:
    output.mkdir()
    build(output, source=source)
    return output


NOW = dt.datetime(2017, 3, 29, 10, 30)  # a Wednesday of week 14


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One request in week 14, and what came before it."""
    folder = tmp_path_factory.mktemp("journey")
    day = dt.timedelta(days=1)
    lines = [
        line(100, NOW, 1),
        line(100, NOW, 4),
        line(100, NOW, 5),
        line(100, NOW, 99),  # not in products
        line(90, NOW - 7 * day, 1, quantity=2, sales=4.0, discounts=(0.5, 0.25, 0.25)),
        line(80, NOW - 56 * day, 1, household=2, sales=3.0),
        line(81, NOW - 55 * day, 1, household=2, store=8, quantity=0, sales=0.0),
        line(70, NOW - 63 * day, 1, household=2, sales=100.0),  # week 5: too old
        line(60, NOW - 84 * day, 4, sales=1.25),
        line(59, NOW - 84 * day - dt.timedelta(seconds=1), 4, sales=50.0),
        line(110, NOW + day, 1, sales=1000.0),  # later in week 14
        line(120, NOW + 7 * day, 3, household=2),
    ]
    products = [
        (1, 69, "GROCERY", "Private", *CHIPS, "10 OZ"),
        product(2, *CHIPS),
        product(3, "BAG SNACKS", "CORN CHIPS"),
        product(4, "YOGURT", "YOGURT"),
        product(5, None, None),
    ]
    promotions = [
        *((number, 7, "0", "A", 14) for number in (1, 2, 3)),
        (1, 7, "9", "0", 14),  # listed twice
        (4, 8, "1", "0", 14),  # another store
        (5, 7, "1", "0", 14),
        *((1, 7, "1", "0", week) for week in (5, 6, 13)),
        (3, 7, "2", "0", 15),
    ]
    source = write_source(folder / "source", lines, products, promotions)
    return built(source, folder / "dataset")


def requests(dataset: Path, basket_time: dt.datetime) -> list[dict]:
    table = pq.read_table(dataset / "impressions.parquet")
    return table.filter(pc.field("requested_at") == basket_time).to_pylist()


def test_candidates_are_the_promoted_products_of_the_category_and_clicks_the_bought(
    dataset: Path,
) -> None:
    rows = requests(dataset, NOW)
    assert [(row["product_id"], row["clicked"]) for row in rows] == [
        (1, True),
        (2, False),
        (3, False),
    ]
    assert {row["query"] for row in rows} == {"potato chips"}
    assert {row["user_id"] for row in rows} == {1}


def test_request_features_count_what_came_before(dataset: Path) -> None:
    first = requests(dataset, NOW)[0]
    assert first["query_type"] == "POTATO CHIPS"
    assert (first["store"], first["hour"], first["weekday"]) == (7, 10, 2)
    # Weeks 6 and 13; the request in store 8 had nothing to show, and that of week 5 is too old.
    assert (first["query_requests"], first["query_clicks"]) == (2, 2)
    # Baskets 60, to the second 84 days before, and 90; not 59, nor the basket itself.
    assert (first["household_baskets"], first["household_spend"]) == (2, 5.25)


def test_candidate_features_count_what_came_before(dataset: Path) -> None:
    first, second, third = requests(dataset, NOW)
    assert first["price"] == pytest.approx((4.0 / 2 + 3.0) / 2)
    assert first["discount"] == pytest.approx((1.0 / 5.0 + 0.0) / 2)
    assert (first["product_purchases"], first["product_clicks"]) == (3, 2)
    assert (second["price"], second["discount"]) == (None, None)
    assert (second["product_purchases"], second["product_clicks"]) == (0, 0)
    assert [row["title_match"] for row in (first, second, third)] == [1.0, 1.0, 0.5]
    assert (first["display_location"], first["mailer_location"]) == ("9", "A")
    assert (first["product"], first["manufacturer"], first["type"]) == (1, 69, "POTATO CHIPS")


def test_repeats_count_what_the_household_bought_in_84_days_before(dataset: Path) -> None:
    def repeats(when: dt.datetime) -> list[tuple[int, int, int]]:
        keys = ("product_id", "product_repeats", "type_repeats")
        return [tuple(row[key] for key in keys) for row in requests(dataset, when)]

    # Basket 90 alone: 60 and 59 hold yogurt, the others are of household 2 or come later. Product 2
    # is of the same type, product 3 of the same category only.
    assert repeats(NOW) == [(1, 1, 1), (2, 0, 1), (3, 0, 0)]
    assert repeats(NOW + dt.timedelta(days=1)) == [(1, 2, 2), (2, 0, 2), (3, 0, 0)]
    # Household 2 bought potato chips only.
    assert repeats(NOW + dt.timedelta(days=7)) == [(3, 0, 0)]


def test_repeats_within_the_window_of_84_days_to_the_second(tmp_path: Path) -> None:
    """Products 1 and 2 share a type; 3 and 4 have none, which is no type to share."""
    second, window = dt.timedelta(seconds=1), dt.timedelta(days=84)
    untyped = (product(number, "BAG SNACKS", None) for number in (3, 4))
    source = write_source(
        tmp_path / "source",
        [
            *(line(100, NOW, number) for number in (1, 2, 3)),
            line(101, NOW, 1),  # another basket of the same instant
            line(90, NOW - second, 1),
            line(91, NOW - second, 3),
            line(80, NOW - window, 1),
            line(80, NOW - window, 2),
            line(81, NOW - window - second, 1),
            line(70, NOW - second, 1, household=2),
        ],
        [product(1, *CHIPS), product(2, *CHIPS), *untyped],
        [(number, 7, "1", "0", 14) for number in range(1, 5)],
    )
    rows = requests(built(source, tmp_path / "dataset"), NOW)
    assert {(row["product_id"], row["product_repeats"], row["type_repeats"]) for row in rows} == {
        (1, 2, 3),
        (2, 1, 3),
        (3, 1, 0),
        (4, 0, 0),
    }


def test_the_week_itself_is_not_counted(dataset: Path) -> None:
    later = requests(dataset, NOW + dt.timedelta(days=1))[0]
    assert later["product_purchases"] == requests(dataset, NOW)[0]["product_purchases"]
    assert later["household_spend"] == pytest.approx(5.25 - 1.25 + 4.0)  # basket 60 has left


def test_requests_are_numbered_in_time_and_rows_ordered(dataset: Path) -> None:
    table = pq.read_table(dataset / "impressions.parquet")
    keys = list(zip(table["request_id"].to_pylist(), table["product_id"].to_pylist(), strict=True))
    assert keys == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (2, 3)]


def test_catalog(dataset: Path) -> None:
    first, *_, last = pq.read_table(dataset / "catalog.parquet").to_pylist()
    assert first == {
        "product_id": 1,
        "title": "private label, potato chips, bag snacks, 10 ounce, manufacturer 69",
        "aisle": "BAG SNACKS",
        "image": None,
    }
    assert last["title"] == "national brand, manufacturer 69"
    assert last["aisle"] is None
    assert pq.read_schema(dataset / "catalog.parquet").field("image").type == pa.binary()


def test_purchases_are_all_lines_in_order_of_local_time(dataset: Path) -> None:
    table = pq.read_table(dataset / "purchases.parquet")
    assert table.schema.field("purchased_at").type == pa.timestamp("us")
    times = table["purchased_at"].to_pylist()
    assert times == sorted(times)
    assert len(times) == 12
    assert times[0] == NOW - dt.timedelta(days=84, seconds=1)  # winter time
    assert 99 in table["product_id"].to_pylist()


def test_relevance_follows_the_catalog(dataset: Path) -> None:
    rows = pq.read_table(dataset / "relevance.parquet").to_pylist()
    grades = {(row["query"], row["product_id"]): row["label"] for row in rows}
    assert len(grades) == len(rows)
    assert grades["potato chips", 1] == grades["potato chips", 2] == 2
    assert grades["potato chips", 3] == 1
    assert grades["potato chips", 4] == grades["yogurt", 1] == 0
    assert ("yogurt", 5) not in grades
    assert {row["source"] for row in rows} == {"derived"}


def test_schema_declares_every_feature_column(dataset: Path) -> None:
    schema = DatasetSchema.load(dataset)
    declared = {feature.name for feature in schema.features}
    columns = set(pq.read_schema(dataset / "impressions.parquet").names)
    contract = {"request_id", "user_id", "query", "product_id", "requested_at", "clicked"}
    assert columns == contract | declared
    counters = {feature.name for feature in schema.features if feature.from_history}
    assert counters == {"product_repeats", "type_repeats"}
    assert schema.weeks is not None
    assert schema.weeks.start(44) == dt.datetime(2017, 10, 23)
    assert "Simulated data" in schema.caveat
    assert "purchase of a promoted product" in schema.caveat
    assert not list(dataset.glob(".*"))


def test_the_cap_keeps_the_smallest_hashes(tmp_path: Path) -> None:
    numbers = range(1, 41)
    source = write_source(
        tmp_path / "source",
        [line(100, NOW, number) for number in numbers],
        [product(number, *CHIPS) for number in numbers],
        [(number, 7, "1", "0", 14) for number in numbers],
    )
    table = pq.read_table(built(source, tmp_path / "dataset") / "impressions.parquet")
    by_hash = sorted(
        numbers, key=lambda n: hashlib.md5(f"100|POTATO CHIPS|{n}".encode()).hexdigest()
    )
    assert table["product_id"].to_pylist() == sorted(by_hash[:24])
    assert pc.all(table["clicked"]).as_py()


def test_types_that_read_the_same_are_one_query(tmp_path: Path) -> None:
    source = write_source(
        tmp_path / "source",
        [line(100, NOW, 1), line(100, NOW, 2)],
        [product(1, "GIFTS", "MISC"), product(2, "TOYS", "MISCELLANEOUS")],
        [(1, 7, "1", "0", 14), (2, 7, "1", "0", 14)],
    )
    rows = requests(built(source, tmp_path / "dataset"), NOW)
    assert [row["product_id"] for row in rows] == [1, 2]
    assert {(row["request_id"], row["query"], row["query_type"]) for row in rows} == {
        (0, "miscellaneous", "MISC")
    }


def random_source(seed: int) -> tuple[list, list, list]:
    """Twelve products in three categories, three stores, six households, weeks 1 to 18."""
    draw = np.random.default_rng(seed)
    products = [product(n, f"CATEGORY {n % 3}", f"TYPE {n % 6}", "1 OZ") for n in range(12)]
    promotions = [
        (int(n), int(store), "1", "A", week)
        for week in range(1, 19)
        for store in range(3)
        for n in draw.choice(12, size=6, replace=False)
    ]
    lines = []
    for basket in range(300):
        when = dt.datetime(2016, 12, 26) + dt.timedelta(seconds=int(draw.integers(18 * 604_800)))
        household, store = int(draw.integers(6)), int(draw.integers(3))
        lines += [
            line(
                basket,
                when,
                int(number),
                household=household,
                store=store,
                quantity=int(draw.integers(4)),
                sales=float(draw.integers(1, 500)) / 100,
                discounts=(float(draw.integers(50)) / 100, 0.0, 0.0),
            )
            for number in draw.choice(12, size=draw.integers(1, 6), replace=False)
        ]
    return lines, products, promotions


@pytest.mark.parametrize("seed", [1, 2])
def test_the_future_changes_nothing(tmp_path: Path, seed: int) -> None:
    lines, products, promotions = random_source(seed)
    cut = dt.datetime(2017, 4, 20, 12)  # in the middle of week 17
    past = [row for row in lines if row[-1] < utc(cut)]
    other = [(*row[:4], 9, 99.0, *row[6:]) if row[-1] >= utc(cut) else row for row in lines]
    assert 0 < len(past) < len(lines)
    whole, short, changed = (
        pq.read_table(
            built(
                write_source(tmp_path / f"source-{name}", rows, products, promotions),
                tmp_path / name,
            )
            / "impressions.parquet"
        )
        for name, rows in (("whole", lines), ("short", past), ("changed", other))
    )
    before = pc.field("requested_at") < cut
    assert whole.filter(before).equals(short)
    assert whole.filter(before).equals(changed.filter(before))
    assert short.num_rows > 200


def test_repeats_equal_a_count_of_the_purchases(tmp_path: Path) -> None:
    lines, products, promotions = random_source(4)
    products[5] = product(5, "CATEGORY 2", None)
    kinds = {row[0]: row[5] for row in products}
    dataset = built(
        write_source(tmp_path / "source", lines, products, promotions), tmp_path / "out"
    )
    purchases = pq.read_table(dataset / "purchases.parquet").to_pylist()
    window = dt.timedelta(days=84)
    counted = []
    for row in pq.read_table(dataset / "impressions.parquet").to_pylist():
        now = row["requested_at"]
        before = [
            bought["product_id"]
            for bought in purchases
            if bought["user_id"] == row["user_id"] and now - window <= bought["purchased_at"] < now
        ]
        kind = kinds[row["product_id"]]
        same = sum(kinds[bought] == kind for bought in before) if kind else 0
        assert row["product_repeats"] == before.count(row["product_id"])
        assert row["type_repeats"] == same
        counted.append(same)
    assert len(counted) > 200
    assert len(set(counted)) > 5


def test_it_builds_the_same_twice(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", *random_source(3))
    one, two = (built(source, tmp_path / name) for name in ("one", "two"))
    for file in sorted(one.iterdir()):
        assert file.read_bytes() == (two / file.name).read_bytes(), file.name


def test_candidates_never_depend_on_the_label(tmp_path: Path) -> None:
    """Buying another product of the same type changes the clicks and nothing else."""
    products = [product(number, *CHIPS) for number in range(1, 41)]
    promotions = [(number, 7, "1", "0", 14) for number in range(1, 41)]
    tables = []
    for bought in (1, 2):
        source = write_source(
            tmp_path / f"source-{bought}", [line(100, NOW, bought)], products, promotions
        )
        tables.append(pq.read_table(built(source, tmp_path / f"{bought}") / "impressions.parquet"))
    assert tables[0].drop(["clicked"]).equals(tables[1].drop(["clicked"]))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("promotions", None, "promotions.parquet: no such file"),
        ("products", ("drop", "brand"), "products.parquet: column 'brand' is missing"),
        ("promotions", ("cast", "week"), "column 'week' must be integer, got string"),
        ("transactions", ("null", "store_id"), "column 'store_id' has 1 nulls"),
        ("transactions", ("week", "week"), "column 'week' is 15 in basket 100"),
        ("transactions", ("store", "store_id"), "basket 100 has more than one time, store"),
        ("products", ("twice", "product_id"), "'product_id' holds 1 more than once"),
        ("products", ("empty", "product_id"), "products.parquet: no rows"),
    ],
)
def test_bad_sources_are_refused(
    tmp_path: Path, name: str, change: tuple[str, str] | None, message: str
) -> None:
    source = write_source(
        tmp_path / "source",
        [line(100, NOW, 1), line(100, NOW, 2)],
        [product(1, *CHIPS), product(2, *CHIPS)],
        [(1, 7, "1", "0", 14), (2, 7, "1", "0", 14)],
    )
    path = source / f"{name}.parquet"
    if change is None:
        path.unlink()
    else:
        pq.write_table(broken(pq.read_table(path), *change), path)
    with pytest.raises(BadInputError, match=re.escape(message)):
        built(source, tmp_path / "dataset")


def broken(table: pa.Table, how: str, column: str) -> pa.Table:
    place = table.schema.get_field_index(column)
    values = table[column].to_pylist()
    if how == "drop":
        return table.drop([column])
    if how == "empty":
        return table.slice(0, 0)
    changed = {
        "cast": lambda: pa.array(map(str, values)),
        "null": lambda: pa.array([None, *values[1:]], table[column].type),
        "week": lambda: pa.array([15 for _ in values]),
        "store": lambda: pa.array([7, 8]),
        "twice": lambda: pa.array([1, 1]),
    }[how]()
    return table.set_column(place, column, changed)


def test_the_packages_files_are_found_without_importing_it() -> None:
    assert (package_data() / "transactions.parquet").is_file()


def test_readable_text() -> None:
    assert readable("PWDR/CRYSTL DRNK MX") == "powder crystal drink mix"
    assert readable("SOFT DRINKS 12/18&15PK CAN CAR") == "soft drinks 12 18 15 pack can car"
    assert readable("WOMEN S GENERAL-MAGAZINE") == "womens general magazine"
    assert readable("JUICE (UNDER 10% JUICE)") == "juice under 10% juice"
    assert readable(None) == ""


def test_cut_names_lose_their_brackets_unless_that_merges_them() -> None:
    texts = query_texts(
        [
            "SFT DRNK SNGL SRV BTL CARB (EX",
            "DAIRY CASE 100% PURE JUICE - O",
            "GRAPE JUICE (OVER 50% JUICE)",
            "BLENDED JUICE&COMBINATIONS (OV",
            "BLENDED JUICE&COMBINATIONS (UN",
        ]
    )
    assert list(texts.values()) == [
        "blended juice combinations ov",
        "blended juice combinations un",
        "dairy case 100% pure juice",
        "grape juice over 50% juice",
        "soft drink single serve bottle carbonated",
    ]


def test_titles_leave_out_what_is_missing_or_said() -> None:
    assert title("Private", "apple sauce", "APPLES", "50 OZ", 69) == (
        "private label, apple sauce, 50 ounce, manufacturer 69"
    )
    assert title("National", None, None, None, 2) == "national brand, manufacturer 2"
    assert title(None, None, None, None, None) == ""


def test_tokens_are_distinct_words() -> None:
    assert tokens("Chips, corn chips 1.5 liter") == ["1.5", "chips", "corn", "liter"]
