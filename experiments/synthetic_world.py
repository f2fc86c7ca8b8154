r"""A made-up market in which the probability of every click is known.

Products and queries are points around the centres of categories, on the unit sphere. A click on
candidate ``c`` of a request ``r`` has the logit

.. math:: b + f_r + f_c + f_r \times f_c + w_q \cos(c, q) + w_h \cos(c, \bar h)

with effects ``f`` of the declared features of request and candidate, crosses of a feature of one
with a feature of the other, the query ``q`` and the mean ``h`` of the products that the user bought
in the 84 days before. All of it can be told from what the ranker reads, so that a ranker which
learns it all reaches the metrics of the true probabilities, and none can do better.

Legend: ``P`` products, ``Q`` queries, ``D`` embedding dimension, ``B`` requests, ``C`` candidates.
"""

import datetime as dt
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from features.config_file import check_least
from features.schema import DatasetSchema, Feature, Weeks

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

NAME = "synthetic"
FIRST_DAY = dt.date(2024, 1, 1)
WEEKS = 20  # the last one is evaluated
WINDOW_DAYS = 84
DAY = 86_400
WEEK = 7 * DAY
START = int(dt.datetime.combine(FIRST_DAY, dt.time(), dt.UTC).timestamp())
END = START + WEEKS * WEEK

STORES, HOURS, SEGMENTS, BRANDS = 50, 24, 8, 100
MOST_CANDIDATES = 30

_SPREAD = 0.9  # how far, in units of the centre's length, points lie from their centre
_QUERIES_A_CATEGORY = 20
_BIAS = -4.6
_QUERY_WEIGHT, _HISTORY_WEIGHT = 3.0, 2.5
_POSITION_WEIGHT = -0.4
_RATING_WEIGHT, _RATING_MEAN = 0.35, 3.8
_PRICE_MEAN, _PRICE_SPREAD = 1.2, 0.7  # of the logarithm

# Streams of random numbers: each (seed, stream, number …) is a generator of its own.
WORLD, USERS, PURCHASES, REQUESTS = range(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticConfig:
    """What decides the content of a generated dataset.

    Attributes:
        impressions: about how many to write; their number is met to within a percent.
        products: size of the catalog.
        dimension: of the products' and queries' latent vectors, which are the embedding tables.
        seed: the same configuration writes the same bytes.

    Raises:
        BadInputError: a number is too small.
    """

    impressions: int = 1_000_000
    products: int = 100_000
    dimension: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_least(self, {"impressions": 10_000, "products": 500, "dimension": 4})


def schema() -> DatasetSchema:
    """Return what ``dataset.toml`` says."""
    return DatasetSchema(
        name=NAME,
        licence="none: a random number generator",
        provenance="python -m experiments.synthetic",
        caveat="generated: users, products and clicks are made up",
        weeks=Weeks(first_day=FIRST_DAY, evaluate=WEEKS, train=WEEKS - 1),
        features=(
            Feature(name="store", kind="sparse", level="request"),
            Feature(name="hour", kind="sparse", level="request"),
            Feature(name="segment", kind="sparse", level="request"),
            Feature(name="brand", kind="sparse", level="candidate"),
            Feature(name="position", kind="sparse", level="candidate"),
            Feature(name="price", kind="dense", level="candidate"),
            Feature(name="discount", kind="dense", level="candidate"),
            Feature(name="rating", kind="dense", level="candidate"),
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What a click on each of C candidates depends on.

    Attributes:
        request: [C] the request of each, counted from 0.
        product: [C] rows of the product table.
        position: [C] from 1.
        discount: [C] share of the price.
    """

    request: Ints
    product: Ints
    position: Ints
    discount: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """What B requests are made of.

    Attributes:
        query: [B] rows of the query table.
        store: [B] from 0.
        hour: [B] of the day.
        segment: [B] of the user.
        history: [B, D] mean embedding of what the user bought; zero where nothing.
    """

    query: Ints
    store: Ints
    hour: Ints
    segment: Ints
    history: Floats


class World:
    """Products, queries and the effects of features; the same for the same configuration.

    Attributes:
        products: [P, D] float16, what the table of products holds.
        queries: [Q, D] float16.
        product_brand: [P] from 0.
        product_price: [P] float32.
        product_rating: [P] float32, NaN where nobody rated.
        product_values: [P, D] float32, as ``products``.
        demand: cumulative shares of the products of a category, the popular ones first.
    """

    def __init__(self, config: SyntheticConfig) -> None:
        random = generator(config, WORLD)
        self.config = config
        self.categories = int(np.clip(config.products // 500, 10, 200))
        centres = _unit(random.standard_normal((self.categories, config.dimension)))
        self.products = _around(random, centres, np.arange(config.products) % self.categories)
        number = self.categories * _QUERIES_A_CATEGORY
        self.queries = _around(random, centres, np.arange(number) % self.categories)
        self.demand = zipf_cumulative(-(-config.products // self.categories), 0.8)
        self.product_values = self.products.astype(np.float32)
        self._unit_products = _unit(self.products)
        self._unit_queries = _unit(self.queries)
        self.product_brand = _zipf(random, config.products, BRANDS, 0.8)
        prices = np.exp(random.normal(_PRICE_MEAN, _PRICE_SPREAD, config.products))
        self.product_price = (np.ceil(prices * 2) / 2 - 0.01).astype(np.float32)
        rating = np.clip(random.normal(_RATING_MEAN, 0.6, config.products), 1, 5).round(1)
        unrated = random.random(config.products) < 0.1
        self.product_rating = np.where(unrated, np.nan, rating).astype(np.float32)
        self._brand = random.normal(0, 0.5, BRANDS)
        self._store = random.normal(0, 0.2, STORES)
        self._hour = random.normal(0, 0.2, HOURS)
        self._segment = random.normal(0, 0.2, SEGMENTS)
        # Brands differ in one trait, which each segment likes more or less.
        self._brand_of_segment = np.outer(
            random.normal(0, 0.8, SEGMENTS), random.normal(0, 0.3, BRANDS)
        )
        self._price_of_segment = random.normal(-0.3, 0.2, SEGMENTS)
        self._discount_of_store = random.normal(1.5, 0.7, STORES)

    def in_category(self, category: Ints, rank: Ints) -> Ints:
        """Return the products of some ranks, counted from 0, by popularity in their category."""
        product = rank * self.categories + category
        return np.where(product < self.config.products, product, category)

    def cosine_with_query(self, product: Ints, query: Ints) -> Floats:
        """Return [C] cosines of products with queries, both given by rows."""
        return np.einsum("cd,cd->c", self._unit_products[product], self._unit_queries[query])

    def cosine_with_history(self, product: Ints, history: Floats) -> Floats:
        """Return [C] cosines of products with unit vectors [C, D]; 0 with a zero vector."""
        return np.einsum("cd,cd->c", self._unit_products[product], history)

    def logit(self, requests: Requests, candidates: Candidates) -> Floats:
        """Return the true log odds [C] of a click on each candidate."""
        request, product = candidates.request, candidates.product
        store, segment = requests.store[request], requests.segment[request]
        brand = self.product_brand[product]
        price = (np.log(self.product_price[product]) - _PRICE_MEAN) / _PRICE_SPREAD
        rating = np.nan_to_num(self.product_rating[product] - _RATING_MEAN, nan=0.0)
        logit = _BIAS + self._store[store] + self._hour[requests.hour[request]]
        logit += self._segment[segment] + self._brand[brand]
        logit += _RATING_WEIGHT * rating + _POSITION_WEIGHT * np.log(candidates.position)
        logit += self._brand_of_segment[segment, brand] + self._price_of_segment[segment] * price
        logit += self._discount_of_store[store] * candidates.discount
        logit += _QUERY_WEIGHT * self.cosine_with_query(product, requests.query[request])
        history = _unit(requests.history)[request]
        logit += _HISTORY_WEIGHT * self.cosine_with_history(product, history)
        return logit.astype(np.float32)


@lru_cache(maxsize=1)
def world(config: SyntheticConfig) -> World:
    """Return the world of a configuration, made once in a process."""
    return World(config)


def generator(config: SyntheticConfig, *stream: int) -> np.random.Generator:
    """Return the random numbers of one stream, whatever was drawn from the others."""
    return np.random.default_rng([config.seed, *stream])


def zipf_cumulative(size: int, exponent: float) -> npt.NDArray[np.float64]:
    """Return [size] cumulative shares of ranks whose frequency falls as ``rank ** -exponent``."""
    weight = np.arange(1, size + 1, dtype=np.float64) ** -exponent
    share = weight.cumsum()
    return share / share[-1]


def _zipf(random: np.random.Generator, number: int, size: int, exponent: float) -> Ints:
    return np.searchsorted(zipf_cumulative(size, exponent), random.random(number), side="right")


def _around(
    random: np.random.Generator, centres: npt.NDArray[np.float64], category: Ints
) -> npt.NDArray[np.float16]:
    """Return [N, D] float16 of length 1, spread around the centres of N categories."""
    dimension = centres.shape[1]
    noise = random.standard_normal((len(category), dimension), np.float32)
    points = centres[category].astype(np.float32) + noise * (_SPREAD / dimension**0.5)
    return _unit(points).astype(np.float16)


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors [N, D] of length 1, those of length 0 as they are."""
    wide = vectors if vectors.dtype == np.float64 else vectors.astype(np.float32)
    length = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    return wide / np.where(length > 0, length, 1)[:, None]
