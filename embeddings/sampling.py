"""Tuples of product, relevant query and negative queries to align the encoders on (Section 3.2.2).

From the judged pairs of a dataset:

- *Positives.* Of each product with at least one moderately (MR) or highly relevant (HR) query, at
  most 110 queries are drawn, HR : MR = 2 : 1, which makes 73 HR and 37 MR.
  NOTE: the paper does not say what happens where one kind is scarce. Here h drawn HR queries bring
  at most ceil(h / 2) MR queries, and a product that has MR queries only gives up to 37 of them.
- *Negatives.* Ten to each positive, drawn without replacement from the queries that were judged for
  that product: for an HR positive from the irrelevant (IR) and the MR ones, for an MR positive from
  the IR ones.
- *Proxies.* Where a product has fewer than ten, the rest are HR queries of random products of
  another aisle. Where all ten are IR, a random one of them gives way to such a proxy.
  NOTE: the paper does not say what a missing aisle is. Here it differs from every known one, and
  from the missing aisle of any other product. Where no product of another aisle has an HR query,
  the proxy is an MR query of one, then an HR or MR query of any other product.
  NOTE: nor does it say that a proxy may be relevant to the product by chance. Here it never is one
  that was judged so, nor repeats a query of its tuple as long as the dataset has another one: it is
  redrawn a few times, and then is any query that is not relevant to the product.

Legend: ``T`` tuples, ``K`` negatives a tuple, ``P`` judged pairs, ``A`` anchors: the products with
a relevant query, ``M`` members: what a proxy is drawn from.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from embeddings.relevance import HIGH, IRRELEVANT, MODERATE, Relevance
from features.errors import BadInputError

_DRAWS = 8  # of one proxy before it becomes any query that is not relevant
_CELLS = 1 << 22  # of the largest matrix of proxies and queries


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How many tuples to draw.

    Attributes:
        positives: the most positive queries of a product, at least 2.
        negatives: negative queries of each positive, ``K``.
        block_products: products whose tuples are drawn, and shuffled, together.
        proxies: without, a tuple has but the negatives that were judged for its product.

    Raises:
        BadInputError: a number is too small.
    """

    positives: int = 110
    negatives: int = 10
    block_products: int = 1024
    proxies: bool = True

    def __post_init__(self) -> None:
        for name, least in (("positives", 2), ("negatives", 1), ("block_products", 1)):
            if getattr(self, name) < least:
                raise BadInputError(f"{name} is at least {least}, got {getattr(self, name)}")

    @property
    def most_high(self) -> int:
        """The most HR positives of a product: two thirds, rounded."""
        return (2 * self.positives + 1) // 3

    @property
    def most_moderate(self) -> int:
        """The most MR positives of a product: what the HR ones leave."""
        return self.positives - self.most_high


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tuples:
    """Products, each with a relevant query and queries that are less relevant.

    Attributes:
        product: [T] int64, row of the catalog.
        positive: [T] int32, position in the relevance's ``queries``.
        negative: [T, K] int32, likewise, in no order that means anything; -1 where there is none.
    """

    product: np.ndarray
    positive: np.ndarray
    negative: np.ndarray

    def __len__(self) -> int:
        return len(self.product)

    def __getitem__(self, part: slice | np.ndarray) -> "Tuples":
        return Tuples(
            product=self.product[part], positive=self.positive[part], negative=self.negative[part]
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Judged:
    """The judged pairs by product, and in a product IR before MR before HR queries.

    Of product i the IR queries are ``query[begin[i, 0] :][: size[i, 0]]``, the MR ones
    ``query[begin[i, 1] :][: size[i, 1]]``, and so on.
    """

    product: np.ndarray  # [products] int64 rows of the catalog, ascending
    begin: np.ndarray  # [products, 3] int64
    size: np.ndarray  # [products, 3] int64
    query: np.ndarray  # [P] int32


class TupleSampler:
    """Draws the tuples of an epoch in blocks, the same for the same seed, epoch and block.

    Only one block is in memory besides the judged pairs.

    Args:
        relevance: the pairs to draw from; no query without a pair here is ever drawn.
        aisles: [N] int32 of each row of the catalog; -1 where it is missing.
        config: how many to draw.
        seed: not negative.

    Raises:
        BadInputError: no product has a relevant query, or one has no proxy: all are relevant.
    """

    def __init__(
        self, relevance: Relevance, aisles: np.ndarray, config: SamplingConfig, *, seed: int
    ) -> None:
        self._config = config
        self._seed = seed
        judged = _by_product(relevance)
        relevant = judged.size[:, MODERATE] + judged.size[:, HIGH]
        anchors = np.flatnonzero(relevant)
        if not len(anchors):
            raise BadInputError("no product has a moderately or highly relevant query to train on")
        self._used = np.unique(relevance.query)
        if config.proxies:
            _check_negatives(judged.product, relevant, len(self._used))
        self._query = judged.query
        self._product = judged.product[anchors]
        self._begin = judged.begin[anchors]
        self._size = judged.size[anchors]
        self._proxies = _Proxies(judged, anchors, aisles, self._used)
        self._stride = len(relevance.queries)
        is_relevant = relevance.label >= MODERATE
        keys = self._key(relevance.product[is_relevant], relevance.query[is_relevant])
        self._relevant = np.append(np.sort(keys), np.iinfo(np.int64).max)
        self._quota = self._positives_of_each()

    @property
    def queries(self) -> np.ndarray:
        """The numbers of all judged queries, ascending."""
        return self._used

    @property
    def products(self) -> np.ndarray:
        """The catalog rows of the products with a relevant query, ascending."""
        return self._product

    def __len__(self) -> int:
        """The number of tuples of an epoch, the same for each."""
        return int(self._quota.sum())

    @property
    def block_count(self) -> int:
        """The number of blocks of an epoch."""
        return -(-len(self._product) // self._config.block_products)

    def is_relevant(self, product: np.ndarray, query: np.ndarray) -> np.ndarray:
        """Return whether queries were judged MR or HR for products, as bool.

        Args:
            product: int64 rows of the catalog.
            query: int positions in the relevance's ``queries``; the two are broadcast.
        """
        keys = self._key(product, query)
        return self._relevant[np.searchsorted(self._relevant, keys)] == keys

    def _key(self, product: np.ndarray, query: np.ndarray) -> np.ndarray:
        return np.asarray(product, np.int64) * self._stride + query

    def blocks(self, epoch: int, start: int = 0) -> Iterator[Tuples]:
        """Yield the tuples of an epoch, those of one block of products at a time.

        Each epoch draws anew and goes through the products in an order of its own.

        Args:
            epoch: from 0.
            start: the first block to yield; that of a resumed run.
        """
        order = np.random.default_rng((self._seed, epoch, 0)).permutation(len(self._product))
        for block in range(start, self.block_count):
            rng = np.random.default_rng((self._seed, epoch, block + 1))
            first = block * self._config.block_products
            yield self._draw(rng, np.sort(order[first : first + self._config.block_products]))

    def _draw(self, rng: np.random.Generator, anchors: np.ndarray) -> Tuples:
        """Return the tuples of some anchors, shuffled."""
        anchor, level, positive = self._draw_positives(rng, anchors)
        negative, drawn = self._draw_judged(rng, anchor, level)
        if self._config.proxies:
            self._add_proxies(rng, anchor, negative, drawn)
        else:
            negative[np.arange(len(negative))[:, None] >= drawn] = -1
        order = rng.permutation(len(anchor))
        return Tuples(
            product=self._product[anchor[order]],
            positive=positive[order],
            negative=np.ascontiguousarray(negative.T[order]),
        )

    def _positives_of_each(self) -> np.ndarray:
        """Return how many MR and HR queries of each anchor become positives, [A, 2]."""
        moderate, high = self._size[:, MODERATE], self._size[:, HIGH]
        high = np.minimum(high, self._config.most_high)
        most = np.where(high > 0, (high + 1) // 2, self._config.most_moderate)
        return np.stack([np.minimum(moderate, most), high], axis=1)

    def _draw_positives(
        self, rng: np.random.Generator, anchors: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return anchor, label and query of each tuple, [T] each, in the order of ``anchors``."""
        relevant = slice(MODERATE, HIGH + 1)
        segment, position = _expand(
            self._begin[anchors, relevant].reshape(-1), self._size[anchors, relevant].reshape(-1)
        )
        position = position[np.argsort(segment + rng.random(len(segment)))]
        rank = np.arange(len(segment)) - np.searchsorted(segment, segment)
        kept = rank < self._quota[anchors].reshape(-1)[segment]
        segment = segment[kept]
        return anchors[segment // 2], MODERATE + segment % 2, self._query[position[kept]]

    def _draw_judged(
        self, rng: np.random.Generator, anchor: np.ndarray, level: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return negatives that were judged for the product, and how many each tuple got.

        Returns:
            queries ([K, T] int32), those of a tuple first and anything behind them, and their
            number ([T]), which is below K where proxies have to follow, or nothing can.
        """
        count = self._config.negatives
        irrelevant = self._size[anchor, IRRELEVANT]
        pool = irrelevant + np.where(level == HIGH, self._size[anchor, MODERATE], 0)
        drawn = np.minimum(pool, count)
        chosen = _choose(rng, pool, count)
        if self._config.proxies:
            replaced = np.flatnonzero((drawn == count) & (chosen < irrelevant).all(axis=0))
            chosen[rng.integers(count, size=len(replaced)), replaced] = chosen[-1, replaced]
            drawn[replaced] -= 1
        return self._query[self._begin[anchor, IRRELEVANT] + chosen], drawn

    def _add_proxies(
        self, rng: np.random.Generator, anchor: np.ndarray, negative: np.ndarray, drawn: np.ndarray
    ) -> None:
        """Write proxies into ``negative`` ([K, T]) behind what each tuple has drawn."""
        for slot in range(int(drawn.min(initial=len(negative))), len(negative)):
            pending = np.flatnonzero(drawn <= slot)
            for draw in range(2 * _DRAWS):
                if not len(pending):
                    break
                candidates = self._proxies.any_query if draw >= _DRAWS else self._proxies.draw
                query = candidates(rng, anchor[pending])
                wrong = self.is_relevant(self._product[anchor[pending]], query)
                wrong |= (negative[:slot, pending] == query).any(axis=0)
                negative[slot, pending] = query
                pending = pending[wrong]
            step = max(1, _CELLS // len(self._used))
            for first in range(0, len(pending), step):
                rest = pending[first : first + step]
                earlier = negative[:slot, rest]
                negative[slot, rest] = self._best_of_all(rng, anchor[rest], earlier)

    def _best_of_all(
        self, rng: np.random.Generator, anchor: np.ndarray, earlier: np.ndarray
    ) -> np.ndarray:
        """Return random queries ([n]) that are not relevant, and not ``earlier`` ones if possible.

        It looks at every query of the dataset, for the rare tuple that leaves few to choose from.
        """
        score = rng.random((len(anchor), len(self._used)))
        row = np.arange(len(anchor))
        score[row, np.searchsorted(self._used, earlier)] -= 1
        for level in (MODERATE, HIGH):
            row, position = _expand(self._begin[anchor, level], self._size[anchor, level])
            score[row, np.searchsorted(self._used, self._query[position])] -= 2
        best = score.argmax(axis=1)
        assert (score.max(axis=1, initial=0) >= -1).all()
        return self._used[best]


class _Proxies:
    """Where each anchor's proxies come from.

    A *member* is a run of queries, of which one is drawn: the HR or the MR queries of a product, or
    one query alone. Members lie in five pools, one behind the other; an anchor draws from the first
    pool that has a member of another group than its own:

    ====  ==================  =======
    pool  member              group
    ====  ==================  =======
    0     a product's HR      aisle
    1     a product's MR      aisle
    2     a product's HR      product
    3     a product's MR      product
    4     one query           none
    ====  ==================  =======

    Within a pool the members of a group lie together, so that all others are drawn uniformly by
    leaving out one range.
    """

    def __init__(
        self, judged: _Judged, anchors: np.ndarray, aisles: np.ndarray, used: np.ndarray
    ) -> None:
        self._query = np.concatenate([judged.query, used])
        aisle = aisles[judged.product].astype(np.int64)
        missing = aisle < 0  # each an aisle of its own
        aisle[missing] = aisle.max(initial=0) + 1 + np.flatnonzero(missing)
        begins, sizes, first = [], [], 0
        undecided = np.ones(len(anchors), bool)
        # [A] each: the pool's first member, how many serve, and the range that does not.
        self._first, self._others, self._gap, self._gap_size = np.zeros((4, len(anchors)), np.int64)
        for group in (aisle, np.arange(len(aisle))):
            for level in (HIGH, MODERATE):
                members = np.flatnonzero(judged.size[:, level])
                members = members[np.argsort(group[members], kind="stable")]
                begins.append(judged.begin[members, level])
                sizes.append(judged.size[members, level])
                own = np.searchsorted(group[members], group[anchors], side="left")
                own_size = np.searchsorted(group[members], group[anchors], side="right") - own
                others = len(members) - own_size
                mine = undecided & (others > 0)
                self._first[mine] = first
                self._others[mine] = others[mine]
                self._gap[mine] = first + own[mine]
                self._gap_size[mine] = own_size[mine]
                undecided &= ~mine
                first += len(members)
        begins.append(len(judged.query) + np.arange(len(used)))
        sizes.append(np.ones(len(used), np.int64))
        self._any = (first, len(used))
        self._first[undecided], self._others[undecided] = self._any
        self._gap[undecided] = first
        self._begin, self._size = np.concatenate(begins), np.concatenate(sizes)

    def draw(self, rng: np.random.Generator, anchor: np.ndarray) -> np.ndarray:
        """Return one query ([n] int32) for each anchor from its pool."""
        member = self._first[anchor] + _below(rng, self._others[anchor])
        member += np.where(member >= self._gap[anchor], self._gap_size[anchor], 0)
        return self._query[self._begin[member] + _below(rng, self._size[member])]

    def any_query(self, rng: np.random.Generator, anchor: np.ndarray) -> np.ndarray:
        """Return one of all queries ([n] int32) for each anchor."""
        first, count = self._any
        return self._query[self._begin[first + rng.integers(count, size=len(anchor))]]


def _by_product(relevance: Relevance) -> _Judged:
    order = np.lexsort((relevance.label, relevance.product))
    product, of_pair = np.unique(relevance.product, return_inverse=True)
    size = np.bincount(of_pair * 3 + relevance.label, minlength=3 * len(product))
    begin = np.cumsum(size) - size
    return _Judged(
        product=product,
        begin=begin.reshape(-1, 3),
        size=size.reshape(-1, 3),
        query=relevance.query[order],
    )


def _check_negatives(product: np.ndarray, relevant: np.ndarray, queries: int) -> None:
    hopeless = np.flatnonzero(relevant == queries)
    if len(hopeless):
        raise BadInputError(
            f"the catalog's product in row {product[hopeless[0]] + 1} has no negative query: all "
            f"{queries:,} queries to train on are relevant to it"
        )


def _below(rng: np.random.Generator, limit: np.ndarray) -> np.ndarray:
    """Return a uniform draw from 0 to below each limit (int64, any shape, at least 1 each)."""
    return (rng.random(limit.shape) * limit).astype(np.int64)


def _expand(begin: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return every position of each range, and which range it is of: [sum of sizes] int64 each."""
    owner = np.repeat(np.arange(len(size)), size)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(size) - size, size)
    return owner, begin[owner] + within


def _choose(rng: np.random.Generator, pool: np.ndarray, count: int) -> np.ndarray:
    """Return ``count`` of the numbers below ``pool``, or all where it is smaller.

    Floyd's algorithm (Bentley and Floyd 1987), for all pools at once: no number comes twice, and
    all subsets are alike.

    Args:
        rng: where chance comes from.
        pool: [T] int64.
        count: how many, ``K``.

    Returns:
        [K, T] int64; 0 behind the numbers of a smaller pool.
    """
    chosen = np.zeros((count, len(pool)), np.int64)
    taken = np.minimum(pool, count)
    for step in range(int(taken.max(initial=0))):
        last = pool - taken + step
        number = _below(rng, last + 1)
        number = np.where((chosen[:step] == number).any(axis=0), last, number)
        chosen[step] = np.where(step < taken, number, 0)
    return chosen
