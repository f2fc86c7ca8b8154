"""A small dataset folder with a planted click effect, generated and seeded.

A click is likelier on a product whose title answers the query, on a product of an aisle from which
the user bought in the 84 days before, and on a popular product. A ranker must find all three.
"""

import datetime as dt
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

KINDS = {  # what can be searched for -> its aisle
    "apple juice": "drinks",
    "orange soda": "drinks",
    "tomato soup": "canned goods",
    "baked beans": "canned goods",
    "potato chips": "snacks",
    "salted nuts": "snacks",
    "cheddar cheese": "dairy",
    "whole milk": "dairy",
    "wheat bread": "bakery",
    "butter rolls": "bakery",
    "dish soap": "household",
    "paper towels": "household",
}
BRANDS = ("Alder", "Birch", "Cedar", "Dogwood", "Elm")
PRODUCTS = len(KINDS) * len(BRANDS)
UNKNOWN_PRODUCT = 999_999  # bought now and then, in no catalog
FIRST_DAY = dt.date(2024, 1, 1)
WINDOW_DAYS = 84

_SECONDS_A_DAY = 86_400
_START = int(dt.datetime.combine(FIRST_DAY, dt.time(), dt.UTC).timestamp())
_QUERIES = np.array(list(KINDS))
_AISLES = np.array(sorted(set(KINDS.values())))
_AISLE_OF_KIND = np.searchsorted(_AISLES, list(KINDS.values()))
_KIND = np.arange(PRODUCTS) % len(KINDS)
_BRAND = np.arange(PRODUCTS) // len(KINDS)
_AISLE = _AISLE_OF_KIND[_KIND]
_PRODUCT_ID = 1000 + 7 * np.arange(PRODUCTS)


def write_tiny_dataset(
    folder: Path,
    *,
    requests: int = 600,
    seed: int = 0,
    weeks: int = 6,
    users: int = 40,
    candidates: int = 8,
) -> Path:
    """Write a complete dataset folder and return it.

    Args:
        folder: is made where missing.
        requests: number of searches, spread evenly over the weeks.
        seed: the same seed writes the same bytes.
        weeks: weeks 1 to ``weeks``; the last one is the evaluated one.
        users: one in ten of them never buys anything.
        candidates: mean number of products that a search shows (two more or less).
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    popularity = rng.normal(0, 0.7, PRODUCTS)
    taste = rng.integers(0, len(_AISLES), (users, 2))
    buyer, bought, bought_at = _purchases(rng, taste, weeks)
    _write_catalog(folder, rng)
    _write_relevance(folder)
    unknown = rng.random(len(buyer)) < 0.01
    purchases = {
        "user_id": pa.array(buyer + 1),
        "product_id": pa.array(np.where(unknown, UNKNOWN_PRODUCT, _PRODUCT_ID[bought])),
        "purchased_at": _timestamps(bought_at),
    }
    pq.write_table(pa.table(purchases), folder / "purchases.parquet")

    searched_at = _START + np.sort(rng.integers(0, weeks * 7 * _SECONDS_A_DAY, requests))
    user = rng.integers(0, users, requests)
    kind = rng.integers(0, len(KINDS), requests)
    row, shown = _candidates(rng, kind, candidates)
    recently = _bought_recently(
        buyer[~unknown], _AISLE[bought[~unknown]], bought_at[~unknown], user, searched_at
    )
    match = _KIND[shown] == kind[row]
    logit = -3.0 + 2.2 * match + 1.6 * recently[row, _AISLE[shown]] + popularity[shown]
    clicked = rng.random(len(row)) < 1 / (1 + np.exp(-logit))
    history = recently.sum(axis=1)
    price = (100 + 10 * _BRAND[shown] + rng.integers(0, 50, len(row))) / 100
    impressions = {
        "request_id": pa.array(10_000 + row),
        "user_id": pa.array(user[row] + 1),
        "query": pa.array(_QUERIES[kind[row]]),
        "product_id": pa.array(_PRODUCT_ID[shown]),
        "requested_at": _timestamps(searched_at[row]),
        "clicked": pa.array(clicked),
        "store": pa.array(1 + user[row] % 4),
        "hour": pa.array(searched_at[row] % _SECONDS_A_DAY // 3600),
        "query_type": pa.array(_AISLES[_AISLE_OF_KIND[kind[row]]]),
        "product": pa.array(_PRODUCT_ID[shown]),
        "brand": pa.array(np.array(BRANDS)[_BRAND[shown]], mask=rng.random(len(row)) < 0.05),
        "aisles_bought": pa.array(history[row].astype(np.float64), mask=history[row] == 0),
        "price": pa.array(price.astype(np.float32), mask=rng.random(len(row)) < 0.1),
        "title_match": pa.array(match.astype(np.float32)),
    }
    pq.write_table(pa.table(impressions), folder / "impressions.parquet", row_group_size=1000)
    (folder / "dataset.toml").write_text(
        _TOML.format(first=FIRST_DAY, last=weeks, train=max(weeks - 1, 1))
    )
    return folder


_TOML = """\
name = "tiny"
licence = "none"
provenance = "a random number generator"
caveat = "generated for tests"

[weeks]
first_day = {first}
evaluate = {last}
train = {train}

[features.sparse]
request = ["store", "hour", "query_type"]
candidate = ["product", "brand"]

[features.dense]
request = ["aisles_bought"]
candidate = ["price", "title_match"]
"""


def _purchases(
    rng: np.random.Generator, taste: np.ndarray, weeks: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return buyer, product (both counted from 0) and time of each purchase, in time order."""
    users, favourites = taste.shape
    days = WINDOW_DAYS + 7 * weeks
    buyer = np.repeat(np.arange(users), rng.integers(5, 40, users) * (np.arange(users) % 10 != 9))
    aisle = taste[buyer, rng.integers(0, favourites, len(buyer))]
    of_aisle = np.argsort(_AISLE, kind="stable").reshape(len(_AISLES), -1)
    product = of_aisle[aisle, rng.integers(0, of_aisle.shape[1], len(buyer))]
    time = _START + rng.integers(-WINDOW_DAYS, days - WINDOW_DAYS, len(buyer)) * _SECONDS_A_DAY
    time += rng.integers(0, _SECONDS_A_DAY, len(buyer))
    order = np.argsort(time, kind="stable")
    return buyer[order], product[order], time[order]


def _candidates(
    rng: np.random.Generator, kind: np.ndarray, mean: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return request row and product of each impression; products that match come more often."""
    score = rng.random((len(kind), PRODUCTS)) + 0.6 * (_KIND[None, :] == kind[:, None])
    ranked = np.argsort(-score, axis=1)[:, : mean + 2]
    count = rng.integers(mean - 2, mean + 3, len(kind))
    row, place = np.nonzero(np.arange(mean + 2)[None, :] < count[:, None])
    return row, ranked[row, place]


def _bought_recently(
    buyer: np.ndarray, aisle: np.ndarray, bought_at: np.ndarray, user: np.ndarray, time: np.ndarray
) -> np.ndarray:
    """Return ``[requests, aisles]``: did the user buy from the aisle in the 84 days before?"""
    span = 1 << 34  # more seconds than any time has
    keys = np.sort((buyer * len(_AISLES) + aisle) * span + bought_at)
    asked = (user[:, None] * len(_AISLES) + np.arange(len(_AISLES))) * span
    before = np.searchsorted(keys, asked + time[:, None])
    too_old = np.searchsorted(keys, asked + time[:, None] - WINDOW_DAYS * _SECONDS_A_DAY)
    return before > too_old


def _write_catalog(folder: Path, rng: np.random.Generator) -> None:
    size = rng.choice(["small", "large", "family"], PRODUCTS)
    title = [f"{BRANDS[b]} {_QUERIES[k]} {s}" for b, k, s in zip(_BRAND, _KIND, size, strict=True)]
    aisle = pa.array(_AISLES[_AISLE], mask=np.arange(PRODUCTS) == PRODUCTS - 1)  # one is unknown
    table = {"product_id": pa.array(_PRODUCT_ID), "title": pa.array(title), "aisle": aisle}
    pq.write_table(pa.table(table), folder / "catalog.parquet")


def _write_relevance(folder: Path) -> None:
    """Grade all pairs: 2 for the kind that was searched for, 1 for its aisle, 0 for others."""
    query, product = np.divmod(np.arange(len(KINDS) * PRODUCTS), PRODUCTS)
    label = (_AISLE_OF_KIND[query] == _AISLE[product]).astype(np.int8)
    label += _KIND[product] == query
    table = {
        "query": pa.array(_QUERIES[query]),
        "product_id": pa.array(_PRODUCT_ID[product]),
        "label": pa.array(label),
        "source": pa.array(["derived"] * len(query)),
    }
    pq.write_table(pa.table(table), folder / "relevance.parquet")


def _timestamps(seconds: np.ndarray) -> pa.Array:
    return pa.array(seconds * 1_000_000, pa.int64()).cast(pa.timestamp("us"))
