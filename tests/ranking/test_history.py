"""Counts in the purchase history against a double loop, and by numbers worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_ranker import EMBEDDING_DIM, KNOWN, pretrained_tables, tiny_batch, tiny_ranker

from ranking.encoded import EncodedBatch, offsets
from ranking.history import HistoryCounts
from ranking.pretrained_embeddings import (
    DataType,
    EmbeddingBagConfig,
    PretrainedEmbeddingBagCollection,
    PretrainedTable,
)

SHARPNESS = (0.5, 4.0, 64.0)
WINDOWS = (7, 28, 84)
close = {"rtol": 1e-4, "atol": 1e-4}


def collection(weight: np.ndarray) -> PretrainedEmbeddingBagCollection:
    """Return a frozen product table; row 1 holds the first vector."""
    rows, dim = weight.shape
    config = EmbeddingBagConfig(
        name="product",
        num_embeddings=rows + 1,
        embedding_dim=dim,
        feature_names=["product"],
        data_type=DataType.FP16 if weight.dtype == np.float16 else DataType.FP32,
    )
    content = {"product": PretrainedTable(ids=np.arange(rows) + 100, weight=weight)}
    return PretrainedEmbeddingBagCollection([config], content)


def batch_of(products: list[list[int]], purchases: list[list[tuple[int, int]]]) -> EncodedBatch:
    """Return requests with these rows of products, and rows and ages of purchases."""
    nothing = torch.zeros(0, 0)
    bought = [purchase for history in purchases for purchase in history]
    return EncodedBatch(
        request_rows=nothing,
        request_dense=nothing,
        candidate_rows=nothing,
        candidate_dense=torch.zeros(sum(map(len, products)), 0),
        candidate_offsets=offsets(torch.tensor([len(shown) for shown in products]).long()),
        query=torch.zeros(len(products), dtype=torch.int64),
        history=torch.tensor([row for row, _ in bought], dtype=torch.int64),
        history_age=torch.tensor([float(age) for _, age in bought]),
        history_offsets=offsets(torch.tensor([len(history) for history in purchases]).long()),
        product=torch.tensor([row for shown in products for row in shown], dtype=torch.int64),
        clicked=torch.zeros(0),
        weight=torch.ones(len(products)),
    )


def by_loops(
    weight: np.ndarray, products: list[list[int]], purchases: list[list[tuple[int, int]]]
) -> np.ndarray:
    """Return what `HistoryCounts` should: one candidate, beta, window and purchase at a time."""
    vectors = np.concatenate([np.zeros((1, weight.shape[1])), weight]).astype(np.float64)
    length = np.linalg.norm(vectors, axis=1)
    counts = []
    for shown, history in zip(products, purchases, strict=True):
        for product in shown:
            sums = {(beta, days): 0.0 for beta in SHARPNESS for days in WINDOWS}
            for row, age in history:
                if row == 0 or product == 0:
                    continue
                lengths = length[product] * length[row]
                cosine = vectors[product] @ vectors[row] / lengths if lengths else 0.0
                for beta, days in sums:
                    sums[beta, days] += math.exp(beta * (cosine - 1)) if age < days else 0
            counts.append([math.log1p(total) for total in sums.values()])
    return np.array(counts).reshape(-1, len(SHARPNESS) * len(WINDOWS))


def random_table(dtype: type = np.float32) -> np.ndarray:
    """Ten vectors of dimension 8, of very different length, the last one zero."""
    weight = np.random.default_rng(0).normal(size=(10, 8)) * np.geomspace(0.01, 100, 10)[:, None]
    weight[-1] = 0
    return weight.astype(dtype)


WEIGHT = random_table()
TABLES = collection(WEIGHT)
COUNTS = HistoryCounts(SHARPNESS, WINDOWS)

shown = st.lists(st.integers(0, 10), max_size=5)
bought = st.lists(st.tuples(st.integers(0, 10), st.sampled_from([0, 6, 7, 27, 28, 83, 84, 300])))
requests = st.lists(st.tuples(shown, bought), max_size=20)


@settings(deadline=None, max_examples=150)
@given(requests)
def test_counts_equal_those_of_a_double_loop(requests):
    products, purchases = [r[0] for r in requests], [r[1] for r in requests]
    found = COUNTS(TABLES, batch_of(products, purchases))
    expected = by_loops(WEIGHT, products, purchases)
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, **close)


@pytest.mark.parametrize("number", [1, 7, 8, 9, 40])
def test_many_requests_of_all_lengths(number):
    """More than one padded group, long histories beside short ones."""
    random = np.random.default_rng(number)
    products = [random.integers(0, 11, random.integers(0, 30)).tolist() for _ in range(number)]
    purchases = [
        list(zip(rows.tolist(), random.integers(0, 100, len(rows)).tolist(), strict=True))
        for rows in (random.integers(0, 11, random.integers(0, 200)) for _ in range(number))
    ]
    found = COUNTS(TABLES, batch_of(products, purchases))
    np.testing.assert_allclose(found.numpy(), by_loops(WEIGHT, products, purchases), **close)


def test_half_precision_tables():
    weight = random_table(np.float16)
    products, purchases = [[1, 2, 0], [9, 10]], [[(1, 0), (4, 30)], [(9, 3), (10, 3)]]
    found = COUNTS(collection(weight), batch_of(products, purchases))
    np.testing.assert_allclose(found.numpy(), by_loops(weight, products, purchases), **close)


def test_by_hand():
    """Cosines of (1, 0) with (2, 0), (0, 3) and (-1, 0) are 1, 0 and -1."""
    tables = collection(np.array([[1, 0], [2, 0], [0, 3], [-1, 0]], np.float32))
    counts = HistoryCounts((2.0,), (10, 20))
    found = counts(tables, batch_of([[1]], [[(2, 9), (3, 10), (4, 19), (1, 20)]]))
    newest, all_three = 1, 1 + math.exp(-2) + math.exp(-4)
    expected = torch.tensor([[newest, all_three]]).log1p()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_purchase_of_the_product_itself_counts_1_whatever_beta_is():
    counts = HistoryCounts((0.1, 1.0, 30.0, 1000.0), (84,))
    for times in (1, 2, 50):
        found = counts(TABLES, batch_of([[3]], [[(3, 12)] * times]))
        expected = torch.full((1, 4), math.log(1 + times))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_columns_come_by_beta_and_then_by_window():
    counts = HistoryCounts((1.0, 50.0), (7, 84))
    assert counts.width == 4
    similar = collection(np.array([[1, 0], [0, 1]], np.float32))
    found = counts(similar, batch_of([[1]], [[(2, 30)]]))[0].tolist()
    assert found == pytest.approx([0, math.log1p(math.exp(-1)), 0, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("age", "windows"),
    [(0, 3), (6, 3), (7, 2), (27, 2), (28, 1), (83, 1), (84, 0), (1000, 0)],
)
def test_a_window_of_n_days_holds_ages_below_n(age, windows):
    found = HistoryCounts((4.0,), WINDOWS)(TABLES, batch_of([[1]], [[(1, age)]]))
    assert (found > 0.5).sum() == windows
    assert found[0].sort().values.tolist() == found[0].tolist()


def test_what_is_unknown_counts_nothing():
    batch = batch_of([[0, 1], [2], [0]], [[(0, 1), (1, 1)], [(0, 1)], []])
    found = HistoryCounts((4.0,), (7,))(TABLES, batch)
    torch.testing.assert_close(found[:, 0], torch.tensor([0, math.log(2), 0, 0]))


@pytest.mark.parametrize(
    ("products", "purchases"),
    [
        ([], []),
        ([[]], [[]]),
        ([[1, 2]], [[]]),
        ([[]], [[(1, 2)]]),
        ([[], [], [3]], [[(1, 2)], [], []]),
        ([[], [], [3]], [[(1, 2)], [], [(3, 3)]]),
    ],
)
def test_empty_requests_and_empty_histories(products, purchases):
    found = COUNTS(TABLES, batch_of(products, purchases))
    np.testing.assert_allclose(found.numpy(), by_loops(WEIGHT, products, purchases), **close)


@settings(deadline=None, max_examples=40)
@given(requests.filter(len), st.data())
def test_the_order_of_requests_does_not_matter(requests, data):
    order = data.draw(st.permutations(range(len(requests))))
    found = COUNTS(TABLES, batch_of(*map(list, zip(*requests, strict=True))))
    turned = COUNTS(TABLES, batch_of(*map(list, zip(*(requests[i] for i in order), strict=True))))
    parts = found.split([len(products) for products, _ in requests])
    expected = torch.cat([parts[i] for i in order])
    torch.testing.assert_close(turned, expected, rtol=1e-5, atol=1e-6)


def test_the_order_within_a_history_does_not_matter():
    history = [(1, 3), (2, 30), (3, 0), (3, 60)]
    forward, backward = (COUNTS(TABLES, batch_of([[1, 4]], [h])) for h in (history, history[::-1]))
    torch.testing.assert_close(forward, backward, rtol=1e-5, atol=1e-6)


def test_the_encoded_batch_of_a_ranker_is_what_is_counted():
    """Unknown ids are row 0; ages pass from the records to the counts."""
    ranker = tiny_ranker(history_counts=True)
    raw = tiny_batch([3, 0, 4], [5, 2, 9], seed=3)
    encoded = ranker.encode(raw)
    assert encoded.history_age.tolist() == raw.history_age.tolist()
    assert (encoded.history == 0).tolist() == (raw.history >= 100 + KNOWN).tolist()
    counts = ranker.frozen_lookups(encoded)["history_counts"]
    config = ranker.config
    assert counts.shape == (7, len(config.count_sharpness) * len(config.count_windows))
    assert counts[(encoded.product > 0)].any()
    assert not counts[(encoded.product == 0)].any()
    assert not counts.requires_grad
    older = replace(encoded, history_age=encoded.history_age + 84)
    assert not ranker.frozen_lookups(older)["history_counts"].any()


# Unit vectors.


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_unit_vectors(dtype):
    weight = np.array([[3, 4], [0, 0], [-0.5, 0], [1e-3, 1e-3], [300, 300]], dtype)
    tables = collection(weight)
    rows = torch.tensor([[1, 2, 3], [0, 4, 5]])
    found = tables.unit_vectors("product", rows)
    half = 0.5**0.5
    expected = [[[0.6, 0.8], [0, 0], [-1, 0]], [[0, 0], [half, half], [half, half]]]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_unit_vectors_have_length_1_in_any_shape(dtype):
    tables = collection(random_table(dtype))
    for shape in ((0,), (4,), (2, 0), (2, 3), (1, 2, 5)):
        rows = torch.randint(1, 10, shape)
        found = tables.unit_vectors("product", rows)
        assert found.shape == (*shape, 8)
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(shape), rtol=1e-5, atol=1e-5)


def test_unit_vectors_leave_the_table_as_it_is():
    tables = collection(WEIGHT)
    before = tables.embedding_bags["product"].weight.clone()
    tables.unit_vectors("product", torch.arange(11)).zero_()
    assert tables.embedding_bags["product"].weight.equal(before)


def test_what_unit_vectors_need_is_no_part_of_the_saved_state():
    """It is made of the table when that is loaded."""
    ranker = tiny_ranker(history_counts=True)
    assert not [name for name in ranker.state_dict() if "inverse_norm" in name]
    other = pretrained_tables(seed=1)
    ranker.replace_tables(other)
    found = ranker.pretrained.unit_vectors("product", torch.tensor([1]))
    vector = torch.from_numpy(other["product"].weight[0])
    assert vector.shape == (EMBEDDING_DIM,)
    torch.testing.assert_close(found[0], vector / vector.norm(), rtol=1e-5, atol=1e-6)
