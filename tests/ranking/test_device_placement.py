"""Where tables come to lie, by numbers that can be added up by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.errors import BadInputError
from ranking.device_placement import Place, TableSize, plan_tables

DEVICE, HOST = Place(where="device"), Place(where="host")


def table(name, rows, row_bytes, *, trained):
    return TableSize(name=name, rows=rows, row_bytes=row_bytes, trained=trained)


# On the device each takes rows * (row_bytes + 4); elsewhere rows * 8 if trained, rows * 4 if not.
SMALL = table("small", 100, 16, trained=True)  # 2,000, or 800
WORDS = table("words", 1_000, 16, trained=False)  # 20,000, or 4,000
ITEMS = table("items", 1_000, 96, trained=True)  # 100,000, or 8,000
LARGE = table("large", 10_000, 96, trained=True)  # 1,000,000, or 80,000


def test_sizes_by_hand():
    assert (SMALL.on_device, SMALL.elsewhere, SMALL.in_cache) == (2_000, 800, 3_200)
    assert (WORDS.on_device, WORDS.elsewhere) == (20_000, 4_000)
    assert (ITEMS.on_device, ITEMS.elsewhere, ITEMS.in_cache) == (100_000, 8_000, 112_000)


def test_everything_lies_on_the_device_while_it_fits():
    tables = [LARGE, SMALL, ITEMS, WORDS]
    everything = sum(found.on_device for found in tables)
    assert everything == 1_122_000
    assert plan_tables(tables, everything) == dict.fromkeys(
        ("small", "words", "items", "large"), DEVICE
    )


def test_the_largest_goes_first_and_what_is_left_is_its_cache():
    # 2,000 + 20,000 + 100,000 on the device, 80,000 that large needs there anyhow: 202,000.
    places = plan_tables([LARGE, SMALL, ITEMS, WORDS], 202_000 + 112_000)
    assert [places[name] for name in ("small", "words", "items")] == [DEVICE] * 3
    # A cached row takes 96 + 16 bytes.
    assert places["large"] == Place(where="cached", cache_rows=1_000)


def test_a_frozen_table_that_does_not_fit_is_read_where_it_is():
    # SMALL and ITEMS need 2,000 + 8,000, WORDS 4,000 anyhow.
    places = plan_tables([WORDS, SMALL], 2_000 + 4_000)
    assert places == {"small": DEVICE, "words": HOST}


def test_trained_tables_share_the_cache_in_proportion_to_their_rows():
    # Beside their rows 8,000 + 80,000; a tenth of the cache of all rows, 1,232,000 bytes.
    places = plan_tables([ITEMS, LARGE], 88_000 + 123_200)
    # ITEMS would fit now: the smaller table has the device, the larger what is left.
    assert places["items"] == DEVICE
    left = 88_000 + 123_200 - 100_000 - 80_000
    assert places["large"] == Place(where="cached", cache_rows=10_000 * left // 1_120_000)
    # 2 hundredths of 1,232,000 bytes, in which neither fits.
    places = plan_tables([ITEMS, LARGE], 88_000 + 24_640)
    assert places["items"] == Place(where="cached", cache_rows=20)
    assert places["large"] == Place(where="cached", cache_rows=200)


def test_too_small_a_device_is_refused():
    assert plan_tables([ITEMS], 8_000)["items"] == Place(where="cached", cache_rows=0)
    with pytest.raises(BadInputError, match=r"tables of 1,000 rows need 0\.0 GB of"):
        plan_tables([ITEMS], 7_999)


def test_no_tables_need_no_room():
    assert plan_tables([], 0) == {}


sizes = st.lists(
    st.tuples(st.integers(1, 10_000), st.integers(1, 100), st.booleans()), min_size=1, max_size=8
)


@given(sizes, st.integers(0, 10**7))
def test_no_plan_exceeds_the_budget_and_every_table_has_a_place(drawn, more):
    tables = [
        table(str(number), rows, 4 * width, trained=trained)
        for number, (rows, width, trained) in enumerate(drawn)
    ]
    budget = sum(found.elsewhere for found in tables) + more
    places = plan_tables(tables, budget)
    assert places.keys() == {found.name for found in tables}
    used = 0
    for found in tables:
        place = places[found.name]
        assert place.where in (("device", "cached") if found.trained else ("device", "host"))
        used += found.on_device if place.where == "device" else found.elsewhere
        used += place.cache_rows * (found.row_bytes + 16)
        assert 0 <= place.cache_rows <= found.rows
    assert used <= budget
    on_device = [found.on_device for found in tables if places[found.name].where == "device"]
    if budget >= sum(found.on_device for found in tables):
        assert len(on_device) == len(tables)
