"""Pairs for a model to grade: what searching would show for the training queries.

Of each query, the products that stemmed BM25 and the untrained MiniLM rank highest, taken in turn,
without those that a human graded.

Legend: ``Q`` training queries, ``M`` products that each way of searching is asked for.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from embeddings.catalog import Catalog
from embeddings.relevance import Relevance
from embeddings.retrieval import rank_scores, top_k
from embeddings.text_encoder import TextEncoder
from experiments.retrieval_rows import Bm25, UnavailableError
from features import columns
from features.console import progress_bar, say
from features.errors import BadInputError

_QUERIES_AT_ONCE = 64


def choose_pairs(catalog: Catalog, training: Relevance, products: int) -> pa.Table:
    """Return ``query`` and ``product_id`` of the pairs, by query and then best first.

    Args:
        catalog: products without a title are left out.
        training: the pairs that humans graded of the training queries.
        products: of each query; fewer where the catalog has no more.

    Raises:
        BadInputError: a package is missing, or no title holds a word.
    """
    rows = np.flatnonzero(catalog.titles.is_valid().to_numpy(zero_copy_only=False))
    titles = catalog.titles.take(pa.array(rows)).to_pylist()
    numbers, of_pair = np.unique(training.query, return_inverse=True)
    queries = [training.queries[number] for number in numbers]
    graded: list[set[int]] = [set() for _ in queries]
    for query, product in zip(of_pair.tolist(), training.product.tolist(), strict=True):
        graded[query].add(product)
    depth = min(products + max(map(len, graded)), len(rows))
    found = [
        rows[ranked] for ranked in (_bm25(queries, titles, depth), _minilm(queries, titles, depth))
    ]
    in_turn = np.stack(found, axis=2).reshape(len(queries), -1)
    chosen = [
        [row for row in dict.fromkeys(ranked) if row not in known][:products]
        for ranked, known in zip(in_turn.tolist(), graded, strict=True)
    ]
    of_query = np.repeat(np.arange(len(queries)), [len(some) for some in chosen])
    product = np.concatenate([np.array(some, np.int64) for some in chosen])
    return pa.table(
        {
            columns.QUERY: pa.array(queries, pa.string()).take(pa.array(of_query)),
            columns.PRODUCT_ID: catalog.product_ids.take(pa.array(product)),
        }
    )


def _bm25(queries: Sequence[str], titles: Sequence[str], depth: int) -> np.ndarray:
    """Return the positions [Q, M] of the titles that BM25 ranks highest, best first."""
    try:
        bm25 = Bm25(queries, titles, stem=True)
    except UnavailableError as error:
        raise BadInputError(f"the pairs cannot be chosen: {error}") from error
    ranked = []
    with progress_bar() as bar:
        task = bar.add_task("BM25", total=len(queries))
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            scores = bm25.scores(slice(start, start + _QUERIES_AT_ONCE))
            ranked.append(rank_scores(scores, depth))
            bar.advance(task, len(scores))
    return np.concatenate(ranked)


def _minilm(queries: Sequence[str], titles: Sequence[str], depth: int) -> np.ndarray:
    """Return the positions [Q, M] of the titles whose embeddings are nearest, best first."""
    encoder = TextEncoder.packaged()
    say(f"encoding {len(titles):,} titles and {len(queries):,} queries with the untrained MiniLM")
    vectors = encoder.encode_products(titles)
    return top_k(encoder.encode_queries(queries), vectors, depth)[0]
