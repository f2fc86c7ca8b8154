"""Each way in which a dataset folder breaks the contract, and the sentence that says so."""

import datetime as dt
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from features import cli, dataset
from features.dataset import Dataset
from features.errors import BadInputError
from features.requests import build_requests

Change = Callable[[pa.Table], pa.Table]


@pytest.fixture
def data(tiny_dataset: Path, tmp_path: Path) -> Path:
    """A dataset folder to break."""
    return shutil.copytree(tiny_dataset, tmp_path / "data")


def refused(data: Path) -> str:
    """Return what a build says of ``data``, having checked that it wrote nothing."""
    output = data / "requests"
    with pytest.raises(BadInputError) as caught:
        build_requests(data, output)
    assert not output.exists()
    message = str(caught.value)
    assert message.startswith((str(data), "mixed time zone"))
    assert "\n" not in message
    return message.replace(f"{data}/", "")


def change(file: Path, change_table: Change) -> None:
    pq.write_table(change_table(pq.read_table(file)), file)


def cast(column: str, to: pa.DataType) -> Change:
    def change_table(table: pa.Table) -> pa.Table:
        position = table.column_names.index(column)
        return table.set_column(position, column, table[column].cast(to))

    return change_table


def put(column: str, row: int, value: Any) -> Change:
    """Set one value, ``row`` counted from 1."""

    def change_table(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[row - 1] = value
        position = table.column_names.index(column)
        return table.set_column(position, column, pa.array(values, table[column].type))

    return change_table


def repeat(row: int) -> Change:
    """Repeat one row, counted from 1, at the end."""
    return lambda table: pa.concat_tables([table, table.slice(row - 1, 1)])


@pytest.mark.parametrize(
    "name", ["dataset.toml", "catalog.parquet", "impressions.parquet", "purchases.parquet"]
)
def test_missing_file(data: Path, name: str) -> None:
    (data / name).unlink()
    assert refused(data).startswith(f"{name}: no such file")


def test_graded_queries_alone_train_no_ranker(data: Path) -> None:
    for name in ("impressions", "purchases"):
        (data / f"{name}.parquet").unlink()
    assert refused(data) == (
        "impressions.parquet: no such file; a ranker learns from impressions, which a dataset of "
        "products and graded queries alone does not have"
    )


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="nowhere: no such dataset folder"):
        Dataset.open(tmp_path / "nowhere")


def test_folder_without_parquet_files(data: Path) -> None:
    (data / "purchases.parquet").unlink()
    (data / "purchases.parquet").mkdir()
    assert refused(data) == "purchases.parquet: the folder holds no Parquet files"


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("catalog", "title"),
        ("purchases", "user_id"),
        ("impressions", "clicked"),
        ("impressions", "price"),  # declared in dataset.toml
    ],
)
def test_missing_column(data: Path, name: str, column: str) -> None:
    change(data / f"{name}.parquet", lambda table: table.drop_columns([column]))
    assert refused(data).startswith(f"{name}.parquet: column '{column}' is missing; ")


def test_misspelt_column(data: Path) -> None:
    change(
        data / "purchases.parquet", lambda table: table.rename_columns(["user", "product_id", "at"])
    )
    assert refused(data) == "purchases.parquet: column 'user_id' is missing; did you mean 'user'?"


@pytest.mark.parametrize(
    ("name", "column", "to", "found", "expected"),
    [
        ("catalog", "product_id", pa.string(), "string", "an integer"),
        ("purchases", "user_id", pa.float64(), "double", "an integer"),
        ("purchases", "purchased_at", pa.string(), "string", "a timestamp"),
        ("impressions", "requested_at", pa.int64(), "int64", "a timestamp"),
        ("impressions", "clicked", pa.int8(), "int8", "a boolean"),
        ("impressions", "query", pa.binary(), "binary", "text"),
        ("impressions", "store", pa.float32(), "float", "an integer or text"),
        ("impressions", "price", pa.string(), "string", "a number"),
    ],
)
def test_wrong_type(
    data: Path, name: str, column: str, to: pa.DataType, found: str, expected: str
) -> None:
    change(data / f"{name}.parquet", cast(column, to))
    assert refused(data) == f"{name}.parquet: column '{column}' is {found}, expected {expected}"


def test_types_that_differ_between_files(data: Path) -> None:
    path = data / "impressions.parquet"
    table = pq.read_table(path)
    path.unlink()
    path.mkdir()
    pq.write_table(table.slice(0, 100), path / "a.parquet")
    pq.write_table(cast("store", pa.string())(table.slice(100)), path / "b.parquet")
    assert refused(data) == (
        "impressions.parquet/b.parquet: column 'store' is string, "
        f"in {path}/a.parquet int64".replace(f"{data}/", "")
    )


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("catalog", "product_id"),
        ("purchases", "user_id"),
        ("purchases", "purchased_at"),
        ("impressions", "request_id"),
        ("impressions", "query"),
        ("impressions", "clicked"),
    ],
)
def test_null_in_a_key(data: Path, name: str, column: str) -> None:
    change(data / f"{name}.parquet", put(column, 30, None))
    change(data / f"{name}.parquet", put(column, 17, None))
    assert refused(data) == f"{name}.parquet: column '{column}', row 17: is null"


def test_null_is_found_in_its_file(data: Path) -> None:
    path = data / "purchases.parquet"
    table = pq.read_table(path)
    path.unlink()
    path.mkdir()
    pq.write_table(table.slice(0, 10), path / "a.parquet")
    pq.write_table(put("user_id", 3, None)(table.slice(10)), path / "b.parquet")
    assert refused(data) == "purchases.parquet/b.parquet: column 'user_id', row 3: is null"


def test_duplicate_product_in_the_catalog(data: Path) -> None:
    change(data / "catalog.parquet", repeat(5))
    assert refused(data) == "catalog.parquet: product_id 1028 stands in 2 rows, expected one"


@pytest.mark.parametrize("keys_at_a_time", [7, 1 << 23])
def test_duplicate_candidate(
    data: Path, keys_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "_KEYS_AT_A_TIME", keys_at_a_time)
    change(data / "impressions.parquet", repeat(900))
    change(data / "impressions.parquet", repeat(1))
    product = pq.read_table(data / "impressions.parquet")["product_id"][0]
    assert refused(data) == (
        f"impressions.parquet: request_id 10000, product_id {product} stands in 2 rows, "
        "expected one"
    )


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("user_id", 3, "2 and 3"),
        ("query", "x", "paper towels and x"),
        ("requested_at", dt.datetime(2024, 2, 1), "2024-01-01 00:19:55 and 2024-02-01 00:00:00"),
        ("store", 9, "2 and 9"),
        ("aisles_bought", None, "2.0 and None"),
    ],
)
def test_request_with_several_values(data: Path, column: str, value: Any, said: str) -> None:
    change(data / "impressions.parquet", put(column, 2, value))
    assert refused(data) == (
        f"impressions.parquet: column '{column}' has several values in request 10000: {said}; "
        "it must have one"
    )


def test_mixed_time_zone(data: Path) -> None:
    change(data / "purchases.parquet", cast("purchased_at", pa.timestamp("us", "UTC")))
    assert refused(data) == (
        "mixed time zone: purchases.parquet: column 'purchased_at' has a time zone and "
        "impressions.parquet: column 'requested_at' has none"
    )


@pytest.mark.parametrize("year", [1970, 2100])
@pytest.mark.parametrize(
    ("name", "column"), [("purchases", "purchased_at"), ("impressions", "requested_at")]
)
def test_time_in_a_wrong_unit(data: Path, name: str, column: str, year: int) -> None:
    change(data / f"{name}.parquet", put(column, 4, dt.datetime(year, 1, 20)))
    assert refused(data) == (
        f"{name}.parquet: column '{column}', row 4: is {year}-01-20 00:00:00, not in "
        "[1971-01-01, 2100-01-01); check the unit of the timestamps"
    )


def test_request_before_the_first_week(data: Path) -> None:
    toml = data / "dataset.toml"
    toml.write_text(toml.read_text().replace("2024-01-01", "2024-01-02"))
    assert refused(data) == (
        "impressions.parquet: column 'requested_at' holds 2024-01-01 00:19:55, before the first "
        "day of week 1 in dataset.toml, 2024-01-02"
    )


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), 1e39])
def test_infinite_dense_feature(data: Path, value: float) -> None:
    change(data / "impressions.parquet", put("aisles_bought", 6, value))
    message = refused(data)
    assert message.startswith("impressions.parquet: column 'aisles_bought', row 6: is ")
    assert message.endswith(", not a finite 32-bit number")


@pytest.mark.parametrize("name", ["catalog", "impressions"])
def test_empty_table(data: Path, name: str) -> None:
    change(data / f"{name}.parquet", lambda table: table.slice(0, 0))
    assert refused(data) == f"{name}.parquet: the table is empty"


@pytest.mark.parametrize("size", [0, 3, 2000])
def test_truncated_file(data: Path, size: int) -> None:
    path = data / "impressions.parquet"
    path.write_bytes(path.read_bytes()[:size])
    assert refused(data).startswith("impressions.parquet: not a readable Parquet file: ")


def test_damaged_page(data: Path) -> None:
    path = data / "impressions.parquet"
    content = bytearray(path.read_bytes())
    content[4:30] = bytes(26)  # the head of the first page
    path.write_bytes(content)
    assert "cannot be read: " in refused(data)


def test_id_beyond_64_bits(data: Path) -> None:
    def change_table(table: pa.Table) -> pa.Table:
        return put("store", 1, 2**63)(cast("store", pa.uint64())(table))

    change(data / "impressions.parquet", change_table)
    assert "cannot be read: " in refused(data)


def test_feature_with_the_name_of_a_fixed_column(data: Path) -> None:
    toml = data / "dataset.toml"
    toml.write_text(toml.read_text().replace('"hour"', '"user_id"'))
    assert refused(data) == (
        "dataset.toml: feature 'user_id' has the name of a column that the contract fixes"
    )


def test_types_that_are_taken(data: Path) -> None:
    def change_table(table: pa.Table) -> pa.Table:
        for column, to in [
            ("request_id", pa.uint32()),
            ("product_id", pa.int16()),
            ("query", pa.large_string()),
            ("brand", pa.dictionary(pa.int32(), pa.string())),
            ("hour", pa.uint8()),
            ("aisles_bought", pa.int8()),
            ("title_match", pa.bool_()),
            ("price", pa.decimal128(8, 2)),
        ]:
            table = cast(column, to)(table)
        return table

    expected = build_requests(data, data / "expected")
    change(data / "impressions.parquet", change_table)
    found = build_requests(data, data / "found")
    for week in expected.weeks:
        assert pq.read_table(found.path(week)).equals(pq.read_table(expected.path(week)))


def test_unknown_products_are_counted(data: Path) -> None:
    impressions = pq.read_table(data / "impressions.parquet")
    shown = pc.sum(pc.equal(impressions["product_id"], 1000)).as_py()
    change(data / "catalog.parquet", lambda table: table.slice(1))
    assert build_requests(data, data / "requests").unknown_products == shown > 0


def test_command(
    data: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["build-features", "--data", str(data), "--window-days", "7"])
    assert cli.main() == 0
    assert (data / "requests" / "week-0006.parquet").is_file()
    assert "tiny: request records in" in capfd.readouterr().out
    (data / "catalog.parquet").unlink()
    assert cli.main() == 2
    said = capfd.readouterr()
    assert said.err.startswith("build-features: ")
    assert said.err.count("\n") == 1
    assert said.out == ""
