"""Nearest-neighbour retrieval of products for queries, and how good a ranking is.

The retrieval task of Section 4.1: the query's vector is compared with that of every product of a
pool, and the K nearest are a ranked list of candidates. The four metrics of such a list, for one
query with the grades ``g`` (0 irrelevant, 1 moderately, 2 highly relevant), of which ``g_1 … g_K``
are those of the list in its order and ``G_1 ≥ … ≥ G_K`` the K highest of all products:

=====================  ==============================================================
Graded Relevance@K     ``(g_1 + … + g_K) / (G_1 + … + G_K)``
Recall@K               relevant products in the list / all relevant products
Precision@K            relevant products in the list / K
nDCG@K                 ``Σ (2^g_i - 1) / log2(i + 1)`` over ``Σ (2^G_i - 1) / log2(i + 1)``
=====================  ==============================================================

A product is relevant where its grade is 1 or 2. A pair that nobody judged counts as grade 0.
Queries without a relevant product are left out: three of the four are not defined for them.

Legend: ``Q`` queries, ``N`` products, ``D`` embedding dimension, ``K`` length of the list, ``M``
columns, ``S`` bootstrap samples.
"""

import warnings
from typing import Any, Literal

import numpy as np

from embeddings.relevance import Relevance
from features.errors import BadInputError

Search = Literal["exact", "faiss"]

METRICS = ("graded_relevance", "recall", "precision", "ndcg")
UNJUDGED = "unjudged"

_PRODUCTS_AT_ONCE = 1 << 14
_SCORES_AT_ONCE = 1 << 22  # 16 MiB of float32


def top_k(
    query_vectors: np.ndarray, product_vectors: np.ndarray, k: int, *, search: Search = "exact"
) -> tuple[np.ndarray, np.ndarray]:
    """Return the K products of highest inner product with each query, best first.

    ``exact`` multiplies blocks of queries with blocks of products, so that some 50 MiB are needed
    beside the vectors however many there are; of equal scores the lower row comes first, at the end
    of the list too. ``faiss`` is FAISS's flat index, exact as well and the faster for pools of
    hundreds of thousands; of products that tie for the last place it takes any.

    Args:
        query_vectors: [Q, D].
        product_vectors: [N, D].
        k: length of the list, 1 or more.
        search: which of the two.

    Returns:
        Rows of ``product_vectors`` (int64) and their scores (float32), both [Q, min(K, N)].

    Raises:
        ValueError: the shapes do not fit, ``k`` is below 1 or a value is not finite.
        BadInputError: FAISS is asked for and not installed.
    """
    queries_qd, products_nd = (_vectors(v) for v in (query_vectors, product_vectors))
    if queries_qd.shape[1] != products_nd.shape[1]:
        raise ValueError(
            f"queries and products must have one dimension, got {queries_qd.shape[1]} and "
            f"{products_nd.shape[1]}"
        )
    k = min(_positive(k), len(products_nd))
    if not k:
        return np.empty((len(queries_qd), 0), np.int64), np.empty((len(queries_qd), 0), np.float32)
    if search == "faiss":
        rows, scores = _faiss_search(queries_qd, products_nd, k)
        order = np.lexsort((rows, -scores))
        return np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
    rows = np.empty((len(queries_qd), k), np.int64)
    scores = np.empty((len(queries_qd), k), np.float32)
    queries_at_once = max(1, _SCORES_AT_ONCE // min(len(products_nd), _PRODUCTS_AT_ONCE))
    for start in range(0, len(queries_qd), queries_at_once):
        part = slice(start, start + queries_at_once)
        rows[part], scores[part] = _search_block(queries_qd[part], products_nd, k)
    return rows, scores


def rank_scores(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the columns of the K highest scores of each row, best first, int64 [Q, min(K, N)].

    Of equal scores the lower column comes first.

    Args:
        scores: [Q, N], finite.
        k: 1 or more.
    """
    columns = _select(scores, min(_positive(k), scores.shape[1]))
    best = np.take_along_axis(scores, columns, 1)
    return np.take_along_axis(columns, np.argsort(-best, axis=1, kind="stable"), 1)


def _search_block(
    queries_qd: np.ndarray, products_nd: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and scores [Q, K] of a few queries; the best so far stay in the rows' order."""
    rows = np.empty((len(queries_qd), 0), np.int64)
    scores = np.empty((len(queries_qd), 0), np.float32)
    for start in range(0, len(products_nd), _PRODUCTS_AT_ONCE):
        block = queries_qd @ products_nd[start : start + _PRODUCTS_AT_ONCE].T
        found = _select(block, min(k, block.shape[1]))
        rows = np.concatenate([rows, found + start], axis=1)
        scores = np.concatenate([scores, np.take_along_axis(block, found, 1)], axis=1)
        kept = _select(scores, min(k, scores.shape[1]))
        rows = np.take_along_axis(rows, kept, 1)
        scores = np.take_along_axis(scores, kept, 1)
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)


def _select(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the columns [Q, K] of the K highest scores, ascending; lower columns win ties."""
    count = scores.shape[1]
    if k == count:
        return np.broadcast_to(np.arange(count), scores.shape)
    last = np.partition(scores, count - k, axis=1)[:, count - k, None]
    above, tied = scores > last, scores == last
    open_places = k - above.sum(axis=1, keepdims=True)
    if (tied.sum(axis=1, keepdims=True) > open_places).any():
        tied &= np.cumsum(tied, axis=1, dtype=np.int32) <= open_places
    return np.nonzero(above | tied)[1].reshape(-1, k)


def _faiss_search(
    queries_qd: np.ndarray, products_nd: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    index = import_faiss().IndexFlatIP(products_nd.shape[1])
    index.add(products_nd)
    scores, rows = index.search(queries_qd, k)
    return rows, scores


def import_faiss() -> Any:
    """Return the module ``faiss``.

    Raises:
        BadInputError: it is not installed; the message names the command that installs it.
    """
    try:
        with warnings.catch_warnings():  # its generated wrapper warns of itself
            warnings.simplefilter("ignore", DeprecationWarning)
            import faiss
    except ImportError as error:
        raise BadInputError(
            "FAISS is not installed; install it with: pip install 'dashclip-ranker[faiss]'"
        ) from error
    return faiss


def answerable_queries(relevance: Relevance) -> np.ndarray:
    """Return the queries that have a relevant product, ascending indices into ``queries``."""
    return np.unique(relevance.query[relevance.label > 0])


def score_ranking(ranked_rows: np.ndarray, relevance: Relevance, k: int) -> dict[str, np.ndarray]:
    """Return the four metrics of each answerable query's list, by the formulas above.

    Args:
        ranked_rows: [Q, K or more] catalog rows, best first, a row of the array for each of
            `answerable_queries` in their order. A pool of fewer than K products gives shorter
            lists; what they lack counts as irrelevant.
        relevance: the judged pairs, each of them once.
        k: 1 or more.

    Returns:
        Under each of `METRICS` float64 [Q], under ``unjudged`` the number (int64 [Q]) of pairs in
        the list that nobody judged.

    Raises:
        ValueError: the number of lists is not that of the answerable queries, a list holds a
            product twice, or a pair is judged twice.
    """
    judged = _Judgements(relevance, _positive(k))
    ranked_rows = np.asarray(ranked_rows)[:, :k]
    if len(ranked_rows) != len(judged.queries):
        raise ValueError(
            f"expected the lists of {len(judged.queries)} queries with a relevant product, "
            f"got {len(ranked_rows)}"
        )
    if (np.diff(np.sort(ranked_rows, axis=1), axis=1) == 0).any():
        raise ValueError("a list holds a product twice")
    grades, known = judged.look_up(ranked_rows)
    return judged.metrics(
        grades=grades.sum(axis=1),
        hits=(grades > 0).sum(axis=1),
        gain=_discounted_gain(grades),
    ) | {UNJUDGED: (~known).sum(axis=1)}


def score_random(relevance: Relevance, pool: int, k: int) -> dict[str, np.ndarray]:
    """Return what `score_ranking` is expected to give for rankings drawn at random.

    Each of the N products of the pool, all judged ones among them, is at each place with
    probability 1 / N, so that the expectation is exact and no ranking need be drawn.

    Args:
        relevance: the judged pairs.
        pool: ``N``.
        k: 1 or more.
    """
    judged = _Judgements(relevance, _positive(k))
    places = min(k, pool)
    discounts = 1 / np.log2(np.arange(places) + 2)
    gains = judged.sum(2.0**judged.labels - 1)
    return judged.metrics(
        grades=judged.sum(judged.labels) * places / pool,
        hits=judged.relevant * places / pool,
        gain=gains / pool * discounts.sum(),
    ) | {UNJUDGED: places * (1 - judged.sum(np.ones(len(judged.labels))) / pool)}


def best_possible(relevance: Relevance, k: int) -> dict[str, float]:
    """Return the mean of each metric for a perfect ranking.

    It is 1 but for Recall@K where queries have more than K relevant products, and for Precision@K
    where they have fewer.
    """
    judged = _Judgements(relevance, _positive(k))
    perfect = judged.metrics(
        grades=judged.ideal.sum(axis=1),
        hits=(judged.ideal > 0).sum(axis=1),
        gain=_discounted_gain(judged.ideal),
    )
    return {metric: float(values.mean()) for metric, values in perfect.items()}


class _Judgements:
    """The judged pairs of the answerable queries, looked up by query and product."""

    def __init__(self, relevance: Relevance, k: int) -> None:
        self.k = k
        self.queries = answerable_queries(relevance)
        kept = np.isin(relevance.query, self.queries)
        query = np.searchsorted(self.queries, relevance.query[kept])
        product = relevance.product[kept].astype(np.int64)
        order = np.lexsort((product, query))
        self.query, self.product = query[order], product[order]
        self.labels = relevance.label[kept][order].astype(np.int64)
        self.stride = int(self.product.max(initial=0)) + 2
        self.keys = self.query * self.stride + self.product
        if (np.diff(self.keys) == 0).any():
            twice = int(np.argmin(np.diff(self.keys)))
            raise ValueError(
                f"query {relevance.queries[self.queries[self.query[twice]]]!r} and catalog row "
                f"{self.product[twice]} are judged twice"
            )
        self.relevant = self.sum(self.labels > 0)
        self.ideal = self._ideal()

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the sum over each query's pairs, float64 [Q]."""
        return np.bincount(self.query, values, minlength=len(self.queries))

    def _ideal(self) -> np.ndarray:
        """Return the K highest grades of each query, descending, int64 [Q, K]; 0 where fewer."""
        order = np.lexsort((-self.labels, self.query))
        first = np.searchsorted(self.query, np.arange(len(self.queries)))
        place = np.arange(len(order)) - first[self.query]
        kept = place < self.k
        ideal = np.zeros((len(self.queries), self.k), np.int64)
        ideal[self.query[kept], place[kept]] = self.labels[order][kept]
        return ideal

    def look_up(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the grades (0 where unjudged) and whether they were judged, both [Q, K]."""
        rows = np.minimum(rows, self.stride - 1)  # a row beyond all judged ones is none of them
        wanted = np.arange(len(rows))[:, None] * self.stride + rows
        found = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        known = self.keys[found] == wanted
        return np.where(known, self.labels[found], 0), known

    def metrics(
        self, *, grades: np.ndarray, hits: np.ndarray, gain: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return the metrics from each list's sum of grades, relevant products and DCG, all [Q]."""
        values = (
            grades / self.ideal.sum(axis=1),
            hits / self.relevant,
            hits / self.k,
            gain / _discounted_gain(self.ideal),
        )
        return dict(zip(METRICS, values, strict=True))


def _discounted_gain(grades: np.ndarray) -> np.ndarray:
    """Return the DCG [Q] of grades [Q, K]."""
    return (2.0**grades - 1) @ (1 / np.log2(np.arange(grades.shape[1]) + 2))


def bootstrap_means(values: np.ndarray, *, samples: int = 2000, seed: int = 0) -> np.ndarray:
    """Return means of the columns over queries drawn with replacement, float64 [S, M].

    All columns see the same draws, so that the quotient or difference of two columns of the result
    is a paired bootstrap. The 2.5th and 97.5th percentile of a column are a 95 % interval.

    Args:
        values: [Q, M], a row for each query.
        samples: ``S``.
        seed: the same seed gives the same draws.
    """
    rng = np.random.default_rng(seed)
    count = len(values)
    means = np.empty((samples, values.shape[1]))
    for sample in range(samples):
        drawn = np.bincount(rng.integers(0, count, count), minlength=count)
        means[sample] = drawn @ values / count
    return means


def recall_at_k_pairs(
    a: np.ndarray, b: np.ndarray, k: int, groups: np.ndarray | None = None
) -> float:
    """Return the share of rows of ``a`` that find their partner among the K nearest of ``b``.

    The Recall@K of image to title and title to image: row ``i`` of ``b`` is the partner of row
    ``i`` of ``a``, by inner product.

    Args:
        a: [N, D], what searches.
        b: [N, D], what is searched.
        k: 1 or more.
        groups: [N]; any row of ``b`` with the same value is a partner, as for products that bear
            the same title.

    Raises:
        ValueError: ``a`` and ``b`` or ``groups`` differ in length, or are empty.
    """
    groups = np.arange(len(a)) if groups is None else np.asarray(groups)
    if not len(a) or not len(a) == len(b) == len(groups):
        raise ValueError(
            f"expected as many partners and groups as rows, 1 or more, got {len(a)}, {len(b)} and "
            f"{len(groups)}"
        )
    rows, _ = top_k(a, b, k)
    return float((groups[rows] == groups[:, None]).any(axis=1).mean())


def _vectors(vectors: np.ndarray) -> np.ndarray:
    vectors = np.ascontiguousarray(vectors, np.float32)
    if vectors.ndim != 2:
        raise ValueError(f"vectors must be [rows, D], got {list(vectors.shape)}")
    if not np.isfinite(vectors).all():
        raise ValueError("vectors must be finite")
    return vectors


def _positive(k: int) -> int:
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    return k
