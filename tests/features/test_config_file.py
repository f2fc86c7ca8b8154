from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.config_file import from_dict, from_toml, to_toml
from features.errors import BadInputError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@dataclass(frozen=True, kw_only=True)
class Shelf:
    name: str
    width: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Shop:
    town: str
    doors: int
    shelves: tuple[Shelf, ...] = ()
    window: Shelf = Shelf(name="window")


SHELVES = st.builds(Shelf, name=TEXTS, width=st.floats(-1e9, 1e9))
SHOPS = st.builds(
    Shop,
    town=TEXTS,
    doors=st.integers(-(2**62), 2**62),
    shelves=st.lists(SHELVES, max_size=3).map(tuple),
    window=SHELVES,
)


def test_dataclasses_in_a_tuple_are_a_list_of_tables():
    shop = Shop(town="Hanau", doors=2, shelves=(Shelf(name="low"), Shelf(name="high", width=2.5)))
    assert to_toml(shop) == (
        'town = "Hanau"\ndoors = 2\n'
        '\n[[shelves]]\nname = "low"\nwidth = 1.0\n'
        '\n[[shelves]]\nname = "high"\nwidth = 2.5\n'
        '\n[window]\nname = "window"\nwidth = 1.0\n'
    )


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(SHOPS)
def test_what_is_written_is_read_again(tmp_path, shop):
    path = tmp_path / "shop.toml"
    path.write_text(to_toml(shop), encoding="utf-8", newline="")
    assert from_toml(path, Shop) == shop


def test_control_characters_are_escaped(tmp_path):
    town = "".join(map(chr, range(32))) + '\x7f\x80"\\'
    path = tmp_path / "shop.toml"
    path.write_text(to_toml(Shop(town=town, doors=1)), encoding="utf-8", newline="")
    assert from_toml(path, Shop).town == town


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"town": "Hanau"}, "^shop: 'doors' is missing$"),
        ({"doors": 1}, "^shop: 'town' is missing$"),
        ({"town": "Hanau", "doors": 1, "window": {}}, "^shop: 'window': 'name' is missing$"),
        (
            {"town": "Hanau", "doors": 1, "shelves": [{"name": "low"}, {"width": 1.0}]},
            "^shop: 'shelves': 'name' is missing$",
        ),
        ({"town": "Hanau", "doors": 1, "shelves": {}}, "'shelves' must be a list"),
        ({"town": "Hanau", "doors": 1, "shelves": [1]}, "'shelves' must be a table, got 1"),
        ({"town": "Hanau", "doors": True}, "'doors' must be int, got True"),
        ({"town": "Hanau", "doors": 1, "floor": 1}, "floor"),
    ],
)
def test_what_does_not_fit_is_one_sentence(content, message):
    with pytest.raises(BadInputError, match=message):
        from_dict("shop", content, Shop)
