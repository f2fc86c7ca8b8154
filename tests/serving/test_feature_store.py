"""Histories by user id against the definition, the request records and numbers checked by hand."""

import datetime as dt
import tempfile
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.errors import BadInputError
from features.history import HISTORY_SCHEMA, purchase_histories
from features.manifest import RequestsManifest
from serving.feature_store import FeatureStore, History, open_store

NOON = dt.datetime(2024, 3, 31, 12)
DAY = dt.timedelta(days=1)
INSTANT = dt.timedelta(microseconds=1)
HOUR_EAST = dt.timezone(dt.timedelta(hours=1))

Purchase = tuple[int, int, dt.datetime]  # user, product, time


def write_purchases(path: Path, purchases: list[Purchase], zone: str | None = None) -> Path:
    table = {
        "user_id": pa.array([p[0] for p in purchases], pa.int64()),
        "product_id": pa.array([p[1] for p in purchases], pa.int64()),
        "purchased_at": pa.array([p[2] for p in purchases], pa.timestamp("us", tz=zone)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path)
    return path


def store_of(
    folder: Path, purchases: list[Purchase], window_days: int = 84, cap: int = 1000
) -> FeatureStore:
    path = write_purchases(folder / "purchases.parquet", purchases)
    return open_store(f"parquet:{path}", window_days=window_days, cap=cap)


def pairs(history: History) -> list[tuple[int, int]]:
    """Return (product, age) of each purchase, most recent first."""
    return list(zip(*(values.tolist() for values in history), strict=True))


def test_bounds_order_and_ages(tmp_path: Path) -> None:
    store = store_of(
        tmp_path,
        [
            (1, 10, NOON),  # at the request: its own basket
            (1, 12, NOON - 84 * DAY),  # exactly 84 days before: the oldest that counts
            (1, 13, NOON - 84 * DAY - INSTANT),
            (1, 11, NOON - INSTANT),
            (2, 15, NOON - DAY),
            (1, 20, NOON - 2 * DAY),
            (1, 9, NOON - 2 * DAY),
            (1, 20, NOON - 2 * DAY),
            (1, 21, NOON - 2 * DAY + INSTANT),
        ],
    )
    assert pairs(store.history(1, NOON)) == [(11, 0), (21, 1), (9, 2), (20, 2), (20, 2), (12, 84)]
    assert pairs(store.history(2, NOON)) == [(15, 1)]
    assert pairs(store.history(2, NOON - DAY)) == []


def test_types_and_unknown_users(tmp_path: Path) -> None:
    store = store_of(tmp_path, [(5, 10, NOON)])
    for user in (-1, 4, 6, 2**62):
        unknown = store.history(user, NOON + DAY)
        assert [len(values) for values in unknown] == [0, 0]
        assert [values.dtype for values in unknown] == [np.int64, np.int16]
    known = store.history(5, NOON + DAY)
    assert [values.dtype for values in known] == [np.int64, np.int16]
    known.product_ids[0] = 99  # a caller's own
    assert pairs(store.history(5, NOON + DAY)) == [(10, 1)]


def test_cap_and_window(tmp_path: Path) -> None:
    bought = [(1, day, NOON - day * DAY) for day in range(1, 8)]
    assert pairs(store_of(tmp_path, bought, cap=2).history(1, NOON)) == [(1, 1), (2, 2)]
    assert pairs(store_of(tmp_path, bought, window_days=3, cap=9).history(1, NOON + DAY)) == [
        (1, 2),
        (2, 3),
    ]


def test_an_age_is_at_most_what_16_bits_hold(tmp_path: Path) -> None:
    bought = [(1, 7, dt.datetime(1971, 1, 1))]
    store = store_of(tmp_path, bought, window_days=50_000)
    assert pairs(store.history(1, dt.datetime(2099, 1, 1))) == [(7, 32767)]


def test_now_is_the_clock_or_the_moment_told(tmp_path: Path) -> None:
    now = dt.datetime.now(dt.UTC).replace(tzinfo=None)
    path = write_purchases(
        tmp_path / "purchases.parquet", [(1, 1, now - 2 * DAY), (1, 2, now + DAY), (1, 3, NOON)]
    )
    spec = f"parquet:{path}"
    assert pairs(open_store(spec, window_days=84, cap=9).history(1)) == [(1, 2)]
    for moment in ("2024-04-01T12:00:00", "2024-04-01T14:00:00+02:00", "2024-04-01%2012:00"):
        store = open_store(f"{spec}?now={moment}", window_days=84, cap=9)
        assert pairs(store.history(1)) == [(3, 1)]
        assert pairs(store.history(1, NOON)) == []


def test_times_with_a_zone_are_instants(tmp_path: Path) -> None:
    path = tmp_path / "purchases.parquet"
    at = NOON.replace(tzinfo=dt.UTC)
    write_purchases(path, [(1, 7, at)], zone="America/New_York")
    store = open_store(f"parquet:{path}", window_days=84, cap=9)
    assert pairs(store.history(1, NOON)) == []
    assert pairs(store.history(1, NOON + INSTANT)) == [(7, 0)]
    assert pairs(store.history(1, NOON.replace(tzinfo=HOUR_EAST))) == []
    assert pairs(store.history(1, (NOON + DAY).replace(tzinfo=HOUR_EAST))) == [(7, 0)]


def test_a_folder_of_files_and_what_it_says(tmp_path: Path) -> None:
    write_purchases(tmp_path / "p" / "b.parquet", [(2, 1, NOON), (9, 4, NOON - DAY)])
    write_purchases(tmp_path / "p" / "a.parquet", [(2, 3, NOON + DAY)])
    store = open_store(f"parquet:{tmp_path / 'p'}", window_days=84, cap=9)
    assert pairs(store.history(2, NOON + 2 * DAY)) == [(3, 1), (1, 2)]
    assert store.describe() == {
        "store": "parquet",
        "users": 2,
        "purchases": 3,
        "last_purchase": "2024-04-01T12:00:00+00:00",
        "bytes": 16 * 3 + 16 * 2 + 8,
    }
    store.close()


def test_no_purchases(tmp_path: Path) -> None:
    store = store_of(tmp_path, [])
    assert pairs(store.history(1, NOON)) == []
    assert store.describe()["last_purchase"] is None


def test_users_whose_purchases_fill_several_blocks(tmp_path: Path) -> None:
    # DuckDB hands out some 100,000 rows at a time; user 2 has 300,000.
    users = np.repeat([1, 2, 3], [10, 300_000, 10])
    number = np.arange(len(users))
    times = 1_700_000_000_000_000 + 1_000_000 * number
    table = {
        "user_id": pa.array(users),
        "product_id": pa.array(number),
        "purchased_at": pa.array(times).cast(pa.timestamp("us")),
    }
    path = tmp_path / "purchases.parquet"
    pq.write_table(pa.table(table), path)
    store = open_store(f"parquet:{path}", window_days=84, cap=10**9)
    at = dt.datetime(2023, 12, 1)
    for user in (1, 2, 3):
        expected = number[users == user][::-1]
        np.testing.assert_array_equal(store.history(user, at).product_ids, expected)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("purchases.parquet", "write parquet:PATH, redis://HOST:PORT/DB or unix://SOCKET"),
        ("parquet:", "write parquet:PATH"),
        ("parquet:/nowhere", "/nowhere: no such file or folder of Parquet files"),
        ("parquet:x?now=yesterday", "now is 'yesterday', expected a moment such as 2017-10-30T"),
    ],
)
def test_texts_that_name_no_store(spec: str, sentence: str) -> None:
    with pytest.raises(BadInputError) as refused:
        open_store(spec, window_days=84, cap=9)
    assert sentence in str(refused.value)


def test_purchases_that_break_a_rule(tmp_path: Path) -> None:
    path = tmp_path / "purchases.parquet"
    pq.write_table(pa.table({"user_id": [1], "product_id": [2]}), path)
    with pytest.raises(BadInputError, match="column 'purchased_at' is missing"):
        open_store(f"parquet:{path}", window_days=84, cap=9)
    write_purchases(path, [(1, 2, NOON), (1, 3, dt.datetime(1970, 1, 20))])
    with pytest.raises(BadInputError, match=r"column 'purchased_at', row 2: is 1970-01-20"):
        open_store(f"parquet:{path}", window_days=84, cap=9)
    table = pa.table({"user_id": [None, 1], "product_id": [1, 2], "purchased_at": [NOON] * 2})
    pq.write_table(table, path)
    with pytest.raises(BadInputError, match="column 'user_id', row 1: is null"):
        open_store(f"parquet:{path}", window_days=84, cap=9)


@st.composite
def times(draw: st.DrawFn) -> dt.datetime:
    """Times that often collide, or lie a whole number of days apart, give or take an instant."""
    days = draw(st.integers(0, 12))
    return NOON + days * DAY + draw(st.sampled_from([-1, 0, 0, 1])) * INSTANT


purchase_lists = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9), times()), max_size=40)
request_lists = st.lists(st.tuples(st.integers(1, 4), times()), max_size=12)


def of_records(
    purchases: list[Purchase], requests: list[tuple[int, dt.datetime]], window_days: int, cap: int
) -> list[list[tuple[int, int]]]:
    """Return what the request records hold, for each request (user, time) in the order given."""
    time = pa.timestamp("us")
    bought = {
        "user_id": pa.array([p[0] for p in purchases], pa.int64()),
        "product_id": pa.array([p[1] for p in purchases], pa.int64()),
        "purchased_at": pa.array([p[2] for p in purchases], time),
    }
    asked = {
        "request_id": pa.array(range(len(requests)), pa.int64()),
        "user_id": pa.array([r[0] for r in requests], pa.int64()),
        "requested_at": pa.array([r[1] for r in requests], time),
    }
    ordered = pa.table(asked).sort_by([("requested_at", "ascending"), ("request_id", "ascending")])
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.register("bought", pa.table(bought))
        connection.execute("CREATE TABLE purchases AS FROM bought")
        found = purchase_histories(connection, ordered, window_days=window_days, cap=cap)
    products, ages = (found[name].to_pylist() for name in HISTORY_SCHEMA.names)
    rows = [list(zip(*lists, strict=True)) for lists in zip(products, ages, strict=True)]
    places = ordered["request_id"].to_pylist()
    return [row for _, row in sorted(zip(places, rows, strict=True))]


@settings(max_examples=30, deadline=None)
@given(purchase_lists, request_lists, st.integers(1, 8), st.integers(1, 12))
def test_equals_the_request_records(
    purchases: list[Purchase],
    requests: list[tuple[int, dt.datetime]],
    window_days: int,
    cap: int,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = store_of(Path(folder), purchases, window_days, cap)
    found = [pairs(store.history(*request)) for request in requests]
    assert found == of_records(purchases, requests, window_days, cap)


def test_equals_the_request_records_of_a_dataset(tiny_dataset: Path, tiny_requests: Path) -> None:
    manifest = RequestsManifest.load(tiny_requests)
    store = open_store(
        f"parquet:{tiny_dataset / 'purchases.parquet'}",
        window_days=manifest.window_days,
        cap=manifest.history_cap,
    )
    compared = 0
    for week in manifest.weeks:
        names = ["user_id", "requested_at", *HISTORY_SCHEMA.names]
        for row in pq.read_table(manifest.path(week), columns=names).to_pylist():
            found = store.history(row["user_id"], row["requested_at"])
            assert found.product_ids.tolist() == row["purchase_history"]
            assert found.age_days.tolist() == row["purchase_age_days"]
            compared += len(found.product_ids)
    assert compared > 1000
