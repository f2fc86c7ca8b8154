"""Derived relevance: natural short queries over catalogued attributes, and what answers them.

A query names a product type and any of gender, colour and usage, as in "women handbags", "black
casual shoes" or "men navy blue shirts". Nobody searched or graded anything: the labels follow from
the attributes, and are called derived wherever they stand.

================  ===================================================================
highly relevant   the type and all named attributes match
moderately        the type matches and a named attribute does not, or another type of the
                  same sub-category has all the named attributes
irrelevant        any other product of another type
================  ===================================================================

Unisex products match both "men" and "women". Of each grade a bounded sample is kept, chosen by a
hash of query and product, so that it depends neither on the order of the rows nor on chance. Half
of the irrelevant ones are hard: of the same master category, or of the colour that the query names.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from experiments.datasets.published import tidy

if TYPE_CHECKING:
    import pandas as pd

HIGHLY, MODERATELY, IRRELEVANT = 20, 20, 30  # products kept per query
ENOUGH = 5  # products that a query must describe
TELLING = 0.9  # a usage is named only where at most this share of what else matches has it

NAMED = ("gender", "baseColour", "usage")  # in the order of the words
_UNISEX = "Unisex"
_ADULTS = ("Men", "Women")
_WORDS = {"Multi": "multicolour"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A product type, and the value of each named attribute."""

    article: str
    named: dict[str, str]

    @property
    def text(self) -> str:
        """The words of the query."""
        words = [self.named[name] for name in NAMED if name in self.named]
        return " ".join(_WORDS.get(word, word).lower() for word in [*words, self.article])


class Attributes:
    """The products' attributes as masks of shape [N]."""

    def __init__(self, frame: "pd.DataFrame") -> None:
        self.frame = frame
        self.product_id = frame["id"].to_numpy(np.int64)
        self._codes = {}
        self._values = {}
        for name in (*NAMED, "articleType", "subCategory", "masterCategory"):
            codes, values = tidy(frame[name]).factorize()
            self._codes[name] = codes
            self._values[name] = {value: code for code, value in enumerate(values)}

    def has(self, name: str, value: str) -> np.ndarray:
        """Return [N] bool: which products have this value, or fit it."""
        mask = self._codes[name] == self._values[name].get(value, -1)
        if name == "gender" and value in _ADULTS:
            mask |= self._codes[name] == self._values[name].get(_UNISEX, -1)
        return mask

    def has_all(self, named: dict[str, str]) -> np.ndarray:
        """Return [N] bool: which products have all the named attributes."""
        mask = np.ones(len(self.product_id), bool)
        for name, value in named.items():
            mask &= self.has(name, value)
        return mask

    def like(self, name: str, mask: np.ndarray) -> np.ndarray:
        """Return [N] bool: which products have the commonest value of ``name`` under ``mask``."""
        codes = self._codes[name]
        return codes == np.bincount(codes[mask]).argmax()

    def values(self, name: str, mask: np.ndarray) -> list[str]:
        """Return the values of ``name`` under ``mask`` that a query may name, sorted."""
        names = list(self._values[name])
        found = (names[code] for code in np.unique(self._codes[name][mask]))
        return sorted(value for value in found if value and value != _UNISEX)


def queries(products: Attributes) -> list[Query]:
    """Return the queries with distinct texts that describe enough products, sorted by text."""
    found: dict[str, Query] = {}
    everything = np.ones(len(products.product_id), bool)
    for article in products.values("articleType", everything):
        for query in _queries_of(products, article):
            other = found.get(query.text)
            if other is None or len(query.named) < len(other.named):
                found[query.text] = query
    return [found[text] for text in sorted(found)]


def _queries_of(products: Attributes, article: str) -> Iterator[Query]:
    of_type = products.has("articleType", article)
    for number in range(len(NAMED) + 1):
        for names in combinations(NAMED, number):
            for named in _choices(products, of_type, names):
                matching = of_type & products.has_all(named)
                if matching.sum() >= ENOUGH and _telling(products, of_type, matching, named):
                    yield Query(article=article, named=named)


def _choices(
    products: Attributes, mask: np.ndarray, names: Sequence[str]
) -> Iterator[dict[str, str]]:
    """Yield the combinations of values of ``names`` under ``mask`` with enough products."""
    if not names:
        yield {}
        return
    for value in products.values(names[0], mask):
        narrower = mask & products.has(names[0], value)
        if narrower.sum() >= ENOUGH:
            for rest in _choices(products, narrower, names[1:]):
                yield {names[0]: value, **rest}


def _telling(
    products: Attributes, of_type: np.ndarray, matching: np.ndarray, named: dict[str, str]
) -> bool:
    """Whether the usage, if it is named, tells products apart that else match alike."""
    rest = {name: value for name, value in named.items() if name != "usage"}
    return rest == named or matching.sum() <= TELLING * (of_type & products.has_all(rest)).sum()


def grade(products: Attributes, query: Query) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the products that are kept for a query, and their labels.

    Returns:
        ``rows`` [K] int64 and ``labels`` [K] of 0, 1 and 2.
    """
    of_type = products.has("articleType", query.article)
    fitting = products.has_all(query.named)
    related = ~of_type & products.like("subCategory", of_type) & fitting
    other = ~of_type & ~related
    near = products.like("masterCategory", of_type)
    if "baseColour" in query.named:
        near |= products.has("baseColour", query.named["baseColour"])
    order = _order(query.text, products.product_id)
    kept = (
        _take(order, IRRELEVANT, other & near, other & ~near),
        _take(order, MODERATELY, of_type & ~fitting, related),
        _take(order, HIGHLY, of_type & fitting),
    )
    return np.concatenate(kept), np.repeat([0, 1, 2], [len(rows) for rows in kept])


def _order(text: str, product_ids: np.ndarray) -> np.ndarray:
    """Return [N] uint64: a hash of the query and each product (the finaliser of SplitMix64)."""
    seed = np.frombuffer(hashlib.md5(text.encode()).digest(), np.uint64, count=1)
    mixed = product_ids.astype(np.uint64) + seed
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def _take(order: np.ndarray, limit: int, *groups: np.ndarray) -> np.ndarray:
    """Return up to ``limit`` rows, an equal share of each group; where one is short, of the rest.

    Args:
        order: [N] the rows with the smallest values come first.
        limit: rows to return.
        groups: disjoint masks of shape [N].
    """
    share = limit // len(groups)
    ranked = []
    for group in groups:
        rows = np.flatnonzero(group)
        if len(rows) > limit:
            rows = rows[np.argpartition(order[rows], limit)[:limit]]
        ranked.append(rows[np.argsort(order[rows], kind="stable")])
    spare = np.concatenate([rows[share:] for rows in ranked])
    first = [rows[:share] for rows in ranked]
    return np.concatenate([*first, spare[np.argsort(order[spare], kind="stable")]])[:limit]


def relevance(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Return ``query``, ``product_id`` and ``label`` for all queries that the products allow.

    Args:
        frame: columns ``id``, ``gender``, ``masterCategory``, ``subCategory``, ``articleType``,
            ``baseColour`` and ``usage``; an empty text is unknown and matches nothing.
    """
    import pandas as pd

    products = Attributes(frame)
    parts = []
    for query in queries(products):
        rows, labels = grade(products, query)
        parts.append(
            pd.DataFrame(
                {"query": query.text, "product_id": products.product_id[rows], "label": labels}
            )
        )
    if not parts:
        return pd.DataFrame({"query": [], "product_id": [], "label": []})
    return pd.concat(parts, ignore_index=True)
