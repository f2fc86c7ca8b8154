"""The purchase-history window against numbers a reader checks by hand, and a plain reference."""

import datetime as dt
import functools

import duckdb
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from features.history import HISTORY_SCHEMA, purchase_histories

NOON = dt.datetime(2024, 3, 31, 12)
DAY = dt.timedelta(days=1)
INSTANT = dt.timedelta(microseconds=1)

Purchase = tuple[int, int, dt.datetime]  # user, product, time
Bought = tuple[int, int]  # product, age in days


@functools.cache
def engine() -> duckdb.DuckDBPyConnection:
    return duckdb.connect(config={"threads": 1})


def histories(
    purchases: list[Purchase],
    requests: list[tuple[int, dt.datetime]],
    window_days: int = 84,
    cap: int = 1000,
) -> list[list[Bought]]:
    """Return the history of each request (user, time), in the order given."""
    time = pa.timestamp("us")
    table = pa.table(
        {
            "user_id": pa.array([p[0] for p in purchases], pa.int64()),
            "product_id": pa.array([p[1] for p in purchases], pa.int64()),
            "purchased_at": pa.array([p[2] for p in purchases], time),
        }
    )
    searches = pa.table(
        {
            "request_id": pa.array(range(len(requests)), pa.int64()),
            "user_id": pa.array([r[0] for r in requests], pa.int64()),
            "requested_at": pa.array([r[1] for r in requests], time),
        }
    )
    order = searches.sort_by([("requested_at", "ascending"), ("request_id", "ascending")])
    connection = engine()
    connection.register("bought", table)
    connection.execute("CREATE OR REPLACE TABLE purchases AS FROM bought")
    found = purchase_histories(connection, order, window_days=window_days, cap=cap)
    assert found.schema.equals(HISTORY_SCHEMA)
    products, ages = (found[name].to_pylist() for name in HISTORY_SCHEMA.names)
    by_request = {
        request: list(zip(*lists, strict=True))
        for request, *lists in zip(order["request_id"].to_pylist(), products, ages, strict=True)
    }
    return [by_request[i] for i in range(len(requests))]


def products(found: list[list[Bought]]) -> list[list[int]]:
    return [[product for product, _ in history] for history in found]


def reference(
    purchases: list[Purchase], user: int, time: dt.datetime, window_days: int, cap: int
) -> list[Bought]:
    """The definition, a purchase at a time."""
    inside = [
        (bought_at, product)
        for buyer, product, bought_at in purchases
        if buyer == user and time - window_days * DAY <= bought_at < time
    ]
    inside.sort(key=lambda purchase: purchase[1])
    inside.sort(key=lambda purchase: purchase[0], reverse=True)
    return [(product, (time - bought_at) // DAY) for bought_at, product in inside][:cap]


def test_bounds_of_the_window() -> None:
    purchases = [
        (1, 10, NOON),  # at the request: its own basket
        (1, 11, NOON - INSTANT),
        (1, 12, NOON - 84 * DAY),  # exactly 84 days before: the oldest that counts
        (1, 13, NOON - 84 * DAY - INSTANT),
        (1, 14, NOON + INSTANT),
        (2, 15, NOON - DAY),  # another user
    ]
    assert histories(purchases, [(1, NOON)]) == [[(11, 0), (12, 84)]]


def test_most_recent_first_ties_by_product_repeats_kept() -> None:
    purchases = [
        (1, 30, NOON - 3 * DAY),
        (1, 20, NOON - DAY),
        (1, 10, NOON - 2 * DAY),
        (1, 9, NOON - DAY),
        (1, 20, NOON - DAY),
        (1, 20, NOON - 3 * DAY),
    ]
    found = histories(purchases, [(1, NOON)])
    assert found == [[(9, 1), (20, 1), (20, 1), (10, 2), (20, 3), (30, 3)]]


def test_an_age_is_in_whole_days_of_24_hours() -> None:
    purchases = [
        (1, 10, NOON - INSTANT),
        (1, 11, NOON - DAY + INSTANT),
        (1, 12, NOON - DAY),
        (1, 13, NOON - 2 * DAY + INSTANT),
        (1, 14, NOON - 2 * DAY),
    ]
    assert histories(purchases, [(1, NOON)]) == [[(10, 0), (11, 0), (12, 1), (13, 1), (14, 2)]]


def test_an_age_is_at_most_what_16_bits_hold() -> None:
    purchases = [(1, days, NOON - days * DAY) for days in (32766, 32767, 32768, 40000)]
    found = histories(purchases, [(1, NOON)], window_days=50_000)
    assert found == [[(32766, 32766), (32767, 32767), (32768, 32767), (40000, 32767)]]


def test_cap_keeps_the_most_recent() -> None:
    purchases = [(1, product, NOON - product * DAY) for product in range(1, 8)]
    assert histories(purchases, [(1, NOON)], cap=3) == [[(1, 1), (2, 2), (3, 3)]]


def test_window_length() -> None:
    purchases = [(1, 5, NOON - 7 * DAY), (1, 6, NOON - 8 * DAY)]
    assert products(histories(purchases, [(1, NOON)], window_days=7)) == [[5]]


def test_each_request_has_its_own_history() -> None:
    purchases = [(1, 5, NOON - DAY), (2, 6, NOON - DAY)]
    asked = [(2, NOON), (1, NOON), (3, NOON), (1, NOON), (1, NOON - DAY)]
    assert histories(purchases, asked) == [[(6, 1)], [(5, 1)], [], [(5, 1)], []]


def test_no_requests_and_no_purchases() -> None:
    assert histories([(1, 5, NOON)], []) == []
    assert histories([], [(1, NOON)]) == [[]]


@st.composite
def times(draw: st.DrawFn) -> dt.datetime:
    """Times that often collide, or lie a whole number of days apart, give or take an instant."""
    days = draw(st.integers(0, 12))
    return NOON + days * DAY + draw(st.sampled_from([-1, 0, 0, 1])) * INSTANT


users = st.integers(1, 3)
purchase_lists = st.lists(st.tuples(users, st.integers(1, 9), times()), max_size=40)
request_lists = st.lists(st.tuples(users, times()), max_size=12)


@settings(max_examples=60, deadline=None)
@given(purchase_lists, request_lists, st.integers(1, 8), st.integers(1, 12))
def test_equals_the_definition(
    purchases: list[Purchase],
    requests: list[tuple[int, dt.datetime]],
    window_days: int,
    cap: int,
) -> None:
    found = histories(purchases, requests, window_days, cap)
    expected = [reference(purchases, *request, window_days, cap) for request in requests]
    assert found == expected


@settings(max_examples=60, deadline=None)
@given(purchase_lists, request_lists, st.integers(1, 8))
def test_nothing_at_or_after_the_request_nothing_too_old_newest_first(
    purchases: list[Purchase], requests: list[tuple[int, dt.datetime]], window_days: int
) -> None:
    # Each purchase gets its own product id, which leads back to its user and time.
    purchases = [(user, row, time) for row, (user, _, time) in enumerate(purchases)]
    for (user, time), found in zip(
        requests, products(histories(purchases, requests, window_days)), strict=True
    ):
        bought = [purchases[product] for product in found]
        assert all(buyer == user for buyer, _, _ in bought)
        assert all(time - window_days * DAY <= at < time for _, _, at in bought)
        assert [at for _, _, at in bought] == sorted((at for _, _, at in bought), reverse=True)
