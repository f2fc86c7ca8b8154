"""The partitions of a generated dataset: the purchases of some users, their searches of one week.

A partition depends on the configuration and its own number alone, so that any process may write it
at any time. Users come in groups of `GROUP_USERS`, searches are made `CHUNK_REQUESTS` at a time:
what a process holds in memory is bounded by these, whatever the size of the dataset.

Legend: ``U`` users and ``N`` purchases of a group, ``B`` requests, ``M`` places, ``C`` candidates.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.sparse import csr_matrix

from experiments.synthetic_world import (
    DAY,
    END,
    HOURS,
    MOST_CANDIDATES,
    PURCHASES,
    REQUESTS,
    SEGMENTS,
    START,
    STORES,
    USERS,
    WEEK,
    WEEKS,
    WINDOW_DAYS,
    Candidates,
    Floats,
    Ints,
    Requests,
    SyntheticConfig,
    World,
    generator,
    world,
    zipf_cumulative,
)

GROUP_USERS = 20_000
CHUNK_REQUESTS = 8_192

_IMPRESSIONS_A_USER = 1_000
_MEAN_CANDIDATES = 24
_LEAST_CANDIDATES = 18
_OF_CATEGORY = 20  # places of a page that show products of the query's category
_FAVOURITES = 3
_PURCHASES_A_DAY = 0.25
_FIRST_PURCHASE = START - WINDOW_DAYS * DAY
_HOUR_SHARE = 1 + np.sin((np.arange(HOURS) - 9) / HOURS * 2 * np.pi) * 0.9  # busiest at 15 o'clock
_FIRST_PRODUCT_ID = 1_000


def number_of_users(config: SyntheticConfig) -> int:
    """Return how many users the dataset has."""
    return max(50, config.impressions // _IMPRESSIONS_A_USER)


def number_of_groups(config: SyntheticConfig) -> int:
    """Return how many groups the users come in."""
    return -(-number_of_users(config) // GROUP_USERS)


def _users_before(config: SyntheticConfig, group: int) -> int:
    """Return how many users the groups before one have; groups are of like size."""
    return number_of_users(config) * group // number_of_groups(config)


def product_ids(rows: Ints) -> Ints:
    """Return the raw ids of products given by rows of their table."""
    return rows + _FIRST_PRODUCT_ID


def query_texts(made: World) -> pa.Array:
    """Return the texts of all queries, in the order of their table."""
    return pa.array([f"query {row}" for row in range(len(made.queries))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Some users and what they buy.

    Attributes:
        first: number of the first user.
        segment: [U] of each user.
        activity: [U] cumulative shares of the searches.
        user: [N] buyers, counted from the group's first, ascending.
        product: [N] rows of the product table.
        time: [N] seconds since 1970, ascending within a user.
    """

    first: int
    segment: Ints
    activity: npt.NDArray[np.float64]
    user: Ints
    product: Ints
    time: Ints

    def mean_bought(self, world: World, user: Ints, time: Ints) -> Floats:
        """Return [B, D]: the mean embedding of what users bought before some moments.

        Purchases in ``[time - 84 days, time)`` count, as in `features.history`; users are counted
        from the group's first.
        """
        key = self.user * END + self.time  # no time is later than the end
        asked = user * END + time
        ends = np.searchsorted(key, asked)
        begins = np.searchsorted(key, np.maximum(asked - WINDOW_DAYS * DAY, user * END))
        counts = ends - begins
        offsets = np.concatenate([[0], counts.cumsum()])
        places = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], counts)
        share = np.repeat(1 / np.maximum(counts, 1), counts).astype(np.float32)
        shape = (len(user), len(world.products))
        return csr_matrix((share, self.product[places], offsets), shape) @ world.product_values


@lru_cache(maxsize=1)
def group(config: SyntheticConfig, number: int) -> Group:
    """Return a group of users; the last one asked for is kept."""
    first = _users_before(config, number)
    users = _users_before(config, number + 1) - first
    random = generator(config, USERS, number)
    segment = random.integers(0, SEGMENTS, users)
    favourites = random.integers(0, world(config).categories, (users, _FAVOURITES))
    activity = random.lognormal(0, 0.7, users).cumsum()
    rate = random.lognormal(0, 0.6, users) * (random.random(users) > 0.1)

    random = generator(config, PURCHASES, number)
    days = (END - _FIRST_PURCHASE) / DAY
    user = np.repeat(np.arange(users), random.poisson(rate * _PURCHASES_A_DAY * days))
    category = favourites[user, random.integers(0, _FAVOURITES, len(user))]
    product = _popular(config, category, random.random(len(user)))
    anything = random.random(len(user)) < 0.2
    product[anything] = _anything(config, random, random.random(int(anything.sum())))
    time = random.integers(_FIRST_PURCHASE, END, len(user))
    order = np.lexsort((time, user))
    return Group(
        first=first,
        segment=segment,
        activity=activity / activity[-1],
        user=user[order],
        product=product[order],
        time=time[order],
    )


def purchases(config: SyntheticConfig, number: int) -> pa.Table:
    """Return the rows of ``purchases.parquet`` of one group of users, in the order of time."""
    bought = group(config, number)
    order = np.argsort(bought.time, kind="stable")
    return pa.table(
        {
            "user_id": pa.array((bought.first + bought.user)[order] + 1, pa.int32()),
            "product_id": pa.array(product_ids(bought.product[order]), pa.int32()),
            "purchased_at": _timestamps(bought.time[order]),
        }
    )


def impressions(
    config: SyntheticConfig, week: int, number: int
) -> Iterator[tuple[pa.Table, npt.NDArray[np.float32]]]:
    """Yield the searches of one group of users in a week, in the order of time, in pieces.

    Args:
        config: of the dataset.
        week: from 1.
        number: of the group.

    Yields:
        Rows of ``impressions.parquet``, and the true probability [C] that each is clicked.
    """
    first, last = _request_numbers(config, week, number)
    random = generator(config, REQUESTS, week, number)
    time = _times(random, week, last - first)
    for start in range(0, last - first, CHUNK_REQUESTS):
        piece = time[start : start + CHUNK_REQUESTS]
        yield _piece(config, group(config, number), random, first + start, piece)


def _piece(
    config: SyntheticConfig, users: Group, random: np.random.Generator, first: int, time: Ints
) -> tuple[pa.Table, npt.NDArray[np.float32]]:
    """Return the impressions of requests at some moments, numbered from ``first`` on."""
    made = world(config)
    user = np.searchsorted(users.activity, random.random(len(time)), side="right")
    requests = Requests(
        query=_query(made, random, len(time)),
        store=_store(users.first + user),
        hour=(time - START) % DAY // 3600,
        segment=users.segment[user],
        history=users.mean_bought(made, user, time),
    )
    shown = _candidates(config, random, requests.query)
    probability = (1 / (1 + np.exp(-made.logit(requests, shown)))).astype(np.float32)
    clicked = random.random(len(probability), np.float32) < probability
    of = shown.request
    rows = {
        "request_id": pa.array((first + np.arange(len(time)))[of]),
        "user_id": pa.array((users.first + user + 1)[of], pa.int32()),
        "query": pa.DictionaryArray.from_arrays(
            requests.query[of].astype(np.int32), query_texts(made)
        ),
        "product_id": pa.array(product_ids(shown.product), pa.int32()),
        "requested_at": _timestamps(time[of]),
        "clicked": pa.array(clicked),
        "store": pa.array(requests.store[of], pa.int8()),
        "hour": pa.array(requests.hour[of], pa.int8()),
        "segment": pa.array(requests.segment[of], pa.int8()),
        "brand": pa.array(made.product_brand[shown.product], pa.int8()),
        "position": pa.array(shown.position, pa.int8()),
        "price": pa.array(made.product_price[shown.product]),
        "discount": pa.array(shown.discount),
        "rating": pa.array(made.product_rating[shown.product], from_pandas=True),
    }
    return pa.table(rows), probability


def _request_numbers(config: SyntheticConfig, week: int, number: int) -> tuple[int, int]:
    """Return the first request of a group in a week, and the one after its last."""
    users = number_of_users(config)
    total = round(config.impressions / _MEAN_CANDIDATES)
    before = [_users_before(config, group) for group in (number, number + 1)]
    first, last = (total * ((week - 1) * users + n) // (WEEKS * users) for n in before)
    return first, last


def _times(random: np.random.Generator, week: int, number: int) -> Ints:
    """Return moments [B] of a week in seconds since 1970, ascending, more of them by day."""
    day = random.integers(0, 7, number)
    share = _HOUR_SHARE.cumsum()
    hour = np.searchsorted(share / share[-1], random.random(number), side="right")
    second = random.integers(0, 3600, number)
    return np.sort(START + (week - 1) * WEEK + day * DAY + hour * 3600 + second)


def _store(user: Ints) -> Ints:
    """Return the store of each user: few of them have most."""
    return (user * 2_654_435_761 % 2**32) ** 2 // 2**32 * STORES // 2**32


def _query(made: World, random: np.random.Generator, number: int) -> Ints:
    """Return queries [B] by rows, the frequent ones first in the table."""
    cumulative = zipf_cumulative(len(made.queries), 0.6)
    return np.searchsorted(cumulative, random.random(number), side="right")


def _candidates(config: SyntheticConfig, random: np.random.Generator, query: Ints) -> Candidates:
    """Return the pages of some queries, without repeats, in the order of position.

    Each place draws from its own slice of the distribution of products, so that a page shows few
    products twice; these, and what a page is too short for, are left out.
    """
    requests = len(query)
    category = query % world(config).categories
    inside = _slices(random, requests, _OF_CATEGORY)
    outside = _slices(random, requests, MOST_CANDIDATES - _OF_CATEGORY)
    found = (_popular(config, category[:, None], inside), _anything(config, random, outside))
    shuffle = random.random((requests, MOST_CANDIDATES), np.float32).argsort(1, kind="stable")
    shown = np.take_along_axis(np.concatenate(found, axis=1), shuffle, axis=1)
    first = _first_of_each(shown)
    position = first.cumsum(axis=1)
    length = random.integers(_LEAST_CANDIDATES, MOST_CANDIDATES + 1, requests)
    request, place = np.nonzero(first & (position <= length[:, None]))
    reduced = random.random(len(request), np.float32) < 0.3
    discount = np.where(reduced, random.integers(1, 11, len(request)), 0) * np.float32(0.05)
    return Candidates(
        request=request,
        product=shown[request, place],
        position=position[request, place],
        discount=discount.astype(np.float32),
    )


def _slices(random: np.random.Generator, number: int, slices: int) -> npt.NDArray[np.float64]:
    """Return [number, slices]: in each row one draw from each of as many slices of [0, 1)."""
    return (random.random((number, slices), np.float32) + np.arange(slices)) / slices


def _first_of_each(values: Ints) -> npt.NDArray[np.bool_]:
    """Return [B, M] whether a value stands for the first time in its row."""
    order = values.argsort(axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    repeats = np.zeros(values.shape, bool)
    repeats[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    first = np.empty(values.shape, bool)
    np.put_along_axis(first, order, ~repeats, axis=1)
    return first


def _popular(config: SyntheticConfig, category: Ints, draw: npt.NDArray[np.float64]) -> Ints:
    """Return products of some categories, at ``draw`` in [0, 1) of their shares of the demand."""
    made = world(config)
    rank = np.searchsorted(made.demand, draw, side="right")
    return made.in_category(category, rank)


def _anything(config: SyntheticConfig, random: np.random.Generator, draw: np.ndarray) -> Ints:
    """Return products of any category, popular ones more often."""
    category = random.integers(0, world(config).categories, draw.shape)
    return _popular(config, category, draw)


def _timestamps(seconds: Ints) -> pa.Array:
    return pa.array(seconds * 1_000_000, pa.int64()).cast(pa.timestamp("us"))
