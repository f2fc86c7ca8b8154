"""Search against plain numpy, metrics against hand-made rankings and scikit-learn."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from embeddings import retrieval
from embeddings.relevance import Relevance
from embeddings.retrieval import (
    METRICS,
    answerable_queries,
    best_possible,
    bootstrap_means,
    rank_scores,
    recall_at_k_pairs,
    score_random,
    score_ranking,
    top_k,
)
from features.errors import BadInputError


def relevance_of(grades):
    """Make relevance of ``{query: {catalog row: grade}}``."""
    queries = sorted(grades)
    pairs = [
        (number, row, grade)
        for number, query in enumerate(queries)
        for row, grade in grades[query].items()
    ]
    query, product, label = zip(*pairs, strict=True)
    return Relevance(
        queries=queries,
        query=np.array(query, np.int32),
        product=np.array(product, np.int64),
        label=np.array(label, np.int8),
    )


# "bolt" has nothing relevant and is left out; product 9 is judged for nobody.
SHOP = relevance_of(
    {
        "bolt": {1: 0},
        "drill": {1: 2, 2: 1, 3: 0, 4: 2},
        "paint": {4: 1, 5: 0},
    }
)


# --- search


def plain_top_k(queries, products, k):
    scores = queries @ products.T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return rows, np.take_along_axis(scores, rows, 1)


@pytest.mark.parametrize("k", [1, 7, 50, 90])
def test_search_is_that_of_a_plain_sort_in_any_blocks(k, monkeypatch):
    monkeypatch.setattr(retrieval, "_PRODUCTS_AT_ONCE", 13)
    monkeypatch.setattr(retrieval, "_SCORES_AT_ONCE", 40)
    rng = np.random.default_rng(0)
    queries, products = (rng.normal(size=(n, 8)).astype(np.float32) for n in (17, 50))
    rows, scores = top_k(queries, products, k)
    expected_rows, expected_scores = plain_top_k(queries, products, k)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5)
    assert rows.dtype == np.int64
    assert scores.dtype == np.float32


@given(
    st.integers(1, 12).flatmap(
        lambda products: st.tuples(
            st.lists(st.integers(-2, 2), min_size=products, max_size=products),
            st.integers(1, 14),
            st.integers(1, 5),
        )
    )
)
def test_of_equal_scores_the_lower_row_comes_first(drawn):
    values, k, block = drawn
    products = np.array(values, np.float32)[:, None]
    queries = np.array([[1], [-1], [0]], np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "_PRODUCTS_AT_ONCE", block)
        rows, _ = top_k(queries, products, k)
    np.testing.assert_array_equal(rows, plain_top_k(queries, products, k)[0])
    np.testing.assert_array_equal(rows, rank_scores(queries @ products.T, k))


def test_faiss_finds_the_same():
    pytest.importorskip("faiss", reason="FAISS is an optional extra")
    rng = np.random.default_rng(1)
    queries, products = (rng.normal(size=(n, 16)).astype(np.float32) for n in (30, 400))
    exact, fast = (top_k(queries, products, 10, search=search) for search in ("exact", "faiss"))
    np.testing.assert_array_equal(exact[0], fast[0])
    np.testing.assert_allclose(exact[1], fast[1], rtol=1e-5, atol=1e-6)


def test_faiss_puts_the_lower_row_first_too():
    pytest.importorskip("faiss", reason="FAISS is an optional extra")
    products = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], np.float32)
    rows, _ = top_k(np.array([[0, 1]], np.float32), products, 4, search="faiss")
    assert rows.tolist() == [[1, 3, 0, 2]]


def test_missing_faiss_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    vectors = np.ones((2, 2), np.float32)
    with pytest.raises(BadInputError, match=r"pip install 'dashclip-ranker\[faiss\]'"):
        top_k(vectors, vectors, 1, search="faiss")


def test_empty_sides_give_empty_lists():
    vectors = np.ones((3, 2), np.float32)
    assert top_k(vectors[:0], vectors, 2)[0].shape == (0, 2)
    assert top_k(vectors, vectors[:0], 2)[0].shape == (3, 0)


@pytest.mark.parametrize(
    ("queries", "products", "k", "message"),
    [
        (np.ones((1, 2)), np.ones((1, 3)), 1, "one dimension, got 2 and 3"),
        (np.ones((1, 2)), np.ones((1, 2)), 0, "k must be 1 or more, got 0"),
        (np.full((1, 2), np.nan), np.ones((1, 2)), 1, "finite"),
        (np.ones(2), np.ones((1, 2)), 1, r"\[rows, D\], got \[2\]"),
    ],
)
def test_what_cannot_be_searched_is_refused(queries, products, k, message):
    with pytest.raises(ValueError, match=message):
        top_k(queries, products, k)


# --- metrics


def test_only_queries_with_a_relevant_product_count():
    assert [SHOP.queries[query] for query in answerable_queries(SHOP)] == ["drill", "paint"]


def test_the_metrics_by_hand():
    # drill: grades 1, 0 (judged), 0 (unjudged); paint: 0 (unjudged), 0 (unjudged), 1
    found = score_ranking(np.array([[2, 3, 9], [1, 9, 4]]), SHOP, 3)
    assert found["graded_relevance"].tolist() == [1 / 5, 1 / 1]
    assert found["recall"].tolist() == [1 / 3, 1 / 1]
    assert found["precision"].tolist() == [1 / 3, 1 / 3]
    assert found["unjudged"].tolist() == [1, 2]
    ideal = 3 + 3 / np.log2(3) + 1 / np.log2(4)  # grades 2, 2, 1
    np.testing.assert_allclose(found["ndcg"], [1 / ideal, 1 / np.log2(4)])


def test_the_best_ranking_reaches_the_best_possible():
    found = score_ranking(np.array([[1, 4, 2, 3], [4, 5, 1, 2]]), SHOP, 2)
    best = best_possible(SHOP, 2)
    assert best == {
        "graded_relevance": 1,
        "recall": pytest.approx((2 / 3 + 1) / 2),
        "precision": pytest.approx((1 + 1 / 2) / 2),
        "ndcg": 1,
    }
    assert {metric: found[metric].mean() for metric in METRICS} == pytest.approx(best)


def test_a_list_shorter_than_k_is_filled_with_nothing():
    found = score_ranking(np.array([[1], [4]]), SHOP, 4)
    assert found["precision"].tolist() == [1 / 4, 1 / 4]
    assert found["graded_relevance"].tolist() == [2 / 5, 1]
    assert found["unjudged"].tolist() == [0, 0]


@pytest.mark.parametrize("k", [1, 5, 10])
def test_ndcg_is_that_of_scikit_learn(k):
    rng = np.random.default_rng(2)
    grades = rng.integers(0, 3, (20, 12))
    grades[:, 0] = 1
    scores = rng.normal(size=grades.shape)
    relevance = relevance_of(
        {f"q{query:02}": dict(enumerate(row.tolist())) for query, row in enumerate(grades)}
    )
    found = score_ranking(rank_scores(scores, k), relevance, k)["ndcg"]
    expected = [ndcg_score(2.0 ** grades[[query]] - 1, scores[[query]], k=k) for query in range(20)]
    np.testing.assert_allclose(found, expected)


def test_random_is_the_mean_of_all_rankings():
    pool = np.array([1, 2, 3, 4, 5, 7])
    rng = np.random.default_rng(3)
    drawn = [
        score_ranking(np.stack([rng.permutation(pool) for _ in range(2)]), SHOP, 3)
        for _ in range(4000)
    ]
    expected = score_random(SHOP, len(pool), 3)
    for metric in (*METRICS, "unjudged"):
        means = np.mean([found[metric] for found in drawn], axis=0)
        np.testing.assert_allclose(means, expected[metric], rtol=0.06)
    np.testing.assert_allclose(expected["precision"], [3 / 6 * 3 / 3, 3 / 6 * 1 / 3])


@pytest.mark.parametrize(
    ("ranked", "message"),
    [
        ([[1, 2]], "lists of 2 queries with a relevant product, got 1"),
        ([[1, 2], [4, 4]], "a list holds a product twice"),
    ],
)
def test_rankings_that_break_a_rule_are_refused(ranked, message):
    with pytest.raises(ValueError, match=message):
        score_ranking(np.array(ranked), SHOP, 2)


def test_a_pair_judged_twice_is_refused():
    twice = SHOP.take(np.array([1, 1]))
    with pytest.raises(ValueError, match="query 'drill' and catalog row 1 are judged twice"):
        score_ranking(np.array([[1]]), twice, 1)


# --- intervals


def test_bootstrap_means_spread_as_the_standard_error_says():
    values = np.random.default_rng(4).normal(size=(400, 1))
    means = bootstrap_means(values, samples=3000)
    assert means.mean() == pytest.approx(values.mean(), abs=0.005)
    assert means.std() == pytest.approx(values.std() / 20, rel=0.06)


def test_bootstrap_draws_are_the_same_for_all_columns_and_calls():
    values = np.random.default_rng(5).normal(size=(30, 1))
    means = bootstrap_means(np.concatenate([values, 2 * values], axis=1), samples=50, seed=7)
    np.testing.assert_allclose(means[:, 1], 2 * means[:, 0])
    np.testing.assert_allclose(means[:, :1], bootstrap_means(values, samples=50, seed=7))
    assert not np.allclose(means[:, :1], bootstrap_means(values, samples=50, seed=8))


# --- partners


def test_recall_of_pairs_counts_partners_among_the_nearest():
    a = np.eye(3, dtype=np.float32)
    b = np.array([[1, 0, 0], [0, 0, 1], [0, 0.9, 1]], np.float32)
    # nearest to row 0: 0; to row 1: 2, then 0 of the tied ones; to row 2: 1, then 2
    assert recall_at_k_pairs(a, b, 1) == pytest.approx(1 / 3)
    assert recall_at_k_pairs(a, b, 2) == pytest.approx(2 / 3)
    assert recall_at_k_pairs(a, b, 3) == 1


def test_a_row_of_the_same_group_is_a_partner():
    a = np.eye(3, dtype=np.float32)
    b = np.array([[1, 0, 0], [0, 0, 1], [0, 0.9, 1]], np.float32)
    assert recall_at_k_pairs(a, b, 1, groups=np.array([0, 1, 1])) == 1
    with pytest.raises(ValueError, match="as rows, 1 or more, got 3, 3 and 2"):
        recall_at_k_pairs(a, b, 1, groups=np.array([0, 1]))
