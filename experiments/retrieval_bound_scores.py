"""What bounds Graded Relevance@K where few products of a query are judged: the measurements.

`experiments.retrieval_bound` is the command and says how to read them.

Legend: ``Q`` queries, ``q`` some of them, ``N`` products of the pool, ``P`` judged pairs, ``D``
embedding dimension, ``K`` length of the list.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from embeddings.retrieval import UNJUDGED, answerable_queries, rank_scores, score_ranking
from experiments.retrieval_rows import DASHCLIP, TOKEN, Bm25, UnavailableError
from experiments.retrieval_task import ProductVectors, RetrievalTask
from features.errors import BadInputError

if TYPE_CHECKING:
    from embeddings.encoder import Encoder

K = 10
DEPTHS = (K, 20, 50, 100)
TWIN_COSINES = (0.8, 0.9)
HYBRID = "DashCLIP + BM25 (stemmed)"

_GRADED = "graded_relevance"
_QUERIES_AT_ONCE = 64

Scores = Callable[[slice], np.ndarray]
"""Gives the scores [q, N], finite, of the pool's products for some of the queries."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judgements:
    """The judged pairs of the queries of a task, by query and then by product.

    Attributes:
        query: [P] place in the task's queries.
        place: [P] place of the product in the pool.
        label: [P] grade 0, 1 or 2.
        best: [Q] the sum of the K highest grades.
    """

    query: np.ndarray
    place: np.ndarray
    label: np.ndarray
    best: np.ndarray

    @classmethod
    def of(cls, task: RetrievalTask) -> "Judgements":
        """Return those of the queries that have a relevant product."""
        relevance, queries = task.relevance, answerable_queries(task.relevance)
        kept = relevance.take(np.isin(relevance.query, queries))
        query = np.searchsorted(queries, kept.query)
        place = np.searchsorted(task.pool, kept.product)
        order = np.lexsort((place, query))
        query, label = query[order], kept.label[order].astype(np.int64)
        best = _sum_of_first(query, label, -label, len(queries))
        return cls(query=query, place=place[order], label=label, best=best)

    @property
    def per_query(self) -> np.ndarray:
        """Number of judged products of each query, [Q]."""
        return np.bincount(self.query, minlength=len(self.best))

    @property
    def relevant_per_query(self) -> np.ndarray:
        """Number of products of each query that are judged relevant, [Q]."""
        return np.bincount(self.query[self.label > 0], minlength=len(self.best))

    def in_random_order(self) -> np.ndarray:
        """Return Graded Relevance@K [Q] to expect where the judged products are shuffled."""
        grades = np.bincount(self.query, self.label, minlength=len(self.best))
        return grades * np.minimum(1, K / self.per_query) / self.best


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Twins:
    """Unjudged products of the lists that resemble a product judged relevant for the query.

    Attributes:
        count: [Q] number of them in the first K.
        graded: [Q] Graded Relevance@K where each has the grade of the product it resembles most,
            of several such the highest. The best possible sum is left as it is, so that the twins
            come for nothing, and the quotient is cut at 1: an upper reading.
    """

    count: np.ndarray
    graded: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Figures:
    """What was measured of one method.

    Attributes:
        graded: [Q] Graded Relevance, by length of the list.
        judged_only: [Q] Graded Relevance@K where only the judged products of a query are ranked.
        unjudged: [Q] number of products among the first K that nobody judged for the query.
        listed: length of the lists, K or the size of a smaller pool.
        twins: by the least cosine of a twin.
    """

    graded: Mapping[int, np.ndarray]
    judged_only: np.ndarray
    unjudged: np.ndarray
    listed: int
    twins: Mapping[float, Twins]


def scores_of(
    task: RetrievalTask, model: "Encoder", minilm: "Encoder"
) -> tuple[dict[str, Scores], np.ndarray]:
    """Return how each method scores the pool, by its name, and MiniLM's vectors of titles.

    The vectors are [N, D] and of norm 1, zeros where a product has no title.

    The hybrid adds the z-scores of the model and of stemmed BM25 with equal weights, which nothing
    was tuned for.

    Raises:
        BadInputError: a package of BM25 is not installed, or no product has what is read.
    """
    try:
        plain, stemmed = (Bm25(task.queries, task.titles, stem=stem) for stem in (False, True))
    except UnavailableError as error:
        raise BadInputError(str(error)) from error
    titles = task.encode_titles(minilm.encode_products)
    products = task.encode_products(model)
    untrained = cosine_scores(task, minilm, titles)
    trained = cosine_scores(task, model, products)
    methods: dict[str, Scores] = {
        "BM25": plain.scores,
        "BM25 (stemmed)": stemmed.scores,
        "MiniLM (untrained)": untrained,
        DASHCLIP: trained,
        HYBRID: lambda part: z_scores(trained(part)) + z_scores(stemmed.scores(part)),
    }
    titles_nd = np.zeros((len(task.pool), minilm.dim), np.float32)
    titles_nd[titles.places] = titles.vectors
    return methods, titles_nd


def cosine_scores(task: RetrievalTask, encoder: "Encoder", products: ProductVectors) -> Scores:
    """Return the scores by cosine of an encoder's query vectors with those of products."""
    if not len(products.places):
        raise BadInputError(f"{task.catalog.path}: no product has a title or an image to encode")
    queries = task.encode_queries(encoder.encode_queries)
    return lambda part: task.cosines(queries[part], products)


def z_scores(scores: np.ndarray) -> np.ndarray:
    """Return scores [q, N] less each query's mean, over its standard deviation.

    A query that scores all products alike gives zeros.
    """
    spread = scores.std(axis=1, keepdims=True)
    return (scores - scores.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)


def measure(
    task: RetrievalTask, judged: Judgements, scores: Scores, titles_nd: np.ndarray
) -> Figures:
    """Return the figures of one method.

    Args:
        task: queries and pool.
        judged: of the task.
        scores: of the method.
        titles_nd: [N, D] unit vectors of titles by whose cosines twins are found.
    """
    places, of_judged = _rank(task, judged, scores)
    scored = {k: score_ranking(task.pool[places], task.relevance, k) for k in DEPTHS}
    grades = _sum_of_first(judged.query, judged.label, -of_judged, len(judged.best))
    graded = scored[K][_GRADED]
    first = places[:, :K]
    return Figures(
        graded={k: found[_GRADED] for k, found in scored.items()},
        judged_only=grades / judged.best,
        unjudged=scored[K][UNJUDGED],
        listed=first.shape[1],
        twins=find_twins(first, judged, titles_nd, graded),
    )


def _rank(task: RetrievalTask, judged: Judgements, scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Return the places of the first products [Q, max(DEPTHS) at most] and the judged ones' scores.

    The scores [P] are those of the judged pairs. Of equal scores the lower place comes first.
    """
    firsts, of_judged = [], []
    for start in range(0, len(task.queries), _QUERIES_AT_ONCE):
        block = scores(slice(start, start + _QUERIES_AT_ONCE))
        firsts.append(rank_scores(block, max(DEPTHS)))
        begin, end = np.searchsorted(judged.query, [start, start + _QUERIES_AT_ONCE])
        of_judged.append(block[judged.query[begin:end] - start, judged.place[begin:end]])
    return np.concatenate(firsts), np.concatenate(of_judged)


def _sum_of_first(
    query: np.ndarray, label: np.ndarray, key: np.ndarray, queries: int
) -> np.ndarray:
    """Return the sum [Q] of the grades of the K pairs of each query that have the lowest key.

    Args:
        query: [P] ascending.
        label: [P].
        key: [P]; of equal ones the earlier pair comes first.
        queries: ``Q``.
    """
    order = np.lexsort((key, query))
    rank = np.arange(len(query)) - np.searchsorted(query, query)
    return np.bincount(query[rank < K], label[order][rank < K], minlength=queries)


def find_twins(
    first: np.ndarray, judged: Judgements, titles_nd: np.ndarray, graded: np.ndarray
) -> dict[float, Twins]:
    """Return the twins among the listed products, by the least cosine of their titles.

    Args:
        first: [Q, K] places in the pool.
        judged: the judged pairs.
        titles_nd: [N, D] unit vectors of titles; a product without one has zeros and no twin.
        graded: [Q] Graded Relevance@K without twins.
    """
    queries = len(first)
    count = {least: np.zeros(queries, np.int64) for least in TWIN_COSINES}
    gained = {least: np.zeros(queries) for least in TWIN_COSINES}
    order = np.lexsort((-judged.label, judged.query))  # of equal cosines the highest grade counts
    begins = np.searchsorted(judged.query, np.arange(queries + 1))
    for query, (begin, end) in enumerate(pairwise(begins)):
        pairs = order[begin:end]
        unjudged = np.setdiff1d(first[query], judged.place[pairs])
        relevant = pairs[judged.label[pairs] > 0]
        cosines = titles_nd[unjudged] @ titles_nd[judged.place[relevant]].T
        grades = judged.label[relevant][cosines.argmax(axis=1)]
        for least in TWIN_COSINES:
            alike = cosines.max(axis=1) >= least
            count[least][query] = alike.sum()
            gained[least][query] = grades[alike].sum()
    return {
        least: Twins(count=count[least], graded=np.minimum(1, graded + gained[least] / judged.best))
        for least in TWIN_COSINES
    }


def kinds_of(queries: Sequence[str]) -> dict[str, np.ndarray]:
    """Return which queries are of each kind, [Q] bool; words are runs of letters and digits."""
    digit = np.array([any(map(str.isdigit, query)) for query in queries], bool)
    words = np.array([len(re.findall(TOKEN, query)) for query in queries])
    return {
        "with a digit": digit,
        "without": ~digit,
        "up to 3 words": words <= 3,
        "4 to 6 words": (words > 3) & (words <= 6),
        "7 words or more": words > 6,
    }
