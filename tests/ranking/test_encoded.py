"""Encoded batches: another order, and ranges of requests."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_ranker import changed, tiny_batch, tiny_ranker

from ranking.encoded import offsets


def test_offsets_by_hand():
    assert offsets(torch.tensor([2, 0, 3])).tolist() == [0, 2, 2, 5]
    assert offsets(torch.zeros(0, dtype=torch.int64)).tolist() == [0]


def test_another_order_by_hand():
    batch = tiny_ranker().encode(tiny_batch([2, 0, 1], [1, 2, 0]))
    turned = batch.reorder(torch.tensor([2, 0, 1]))
    assert turned.candidate_offsets.tolist() == [0, 1, 3, 3]
    assert turned.history_offsets.tolist() == [0, 0, 1, 3]
    assert turned.product.tolist() == batch.product[[2, 0, 1]].tolist()
    assert turned.history.tolist() == batch.history[[0, 1, 2]].tolist()
    assert turned.history_age.tolist() == batch.history_age[[0, 1, 2]].tolist()
    assert turned.weight.tolist() == batch.weight[[2, 0, 1]].tolist()
    assert turned.query.tolist() == batch.query[[2, 0, 1]].tolist()
    assert turned.clicked.tolist() == batch.clicked[[2, 0, 1]].tolist()
    assert turned.request_rows.tolist() == batch.request_rows[:, [2, 0, 1]].tolist()
    assert turned.candidate_rows.tolist() == batch.candidate_rows[:, [2, 0, 1]].tolist()


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=8), st.data())
def test_an_order_and_its_inverse_give_the_same_batch(sizes, data):
    lengths, histories = zip(*sizes, strict=True)
    batch = tiny_ranker().encode(tiny_batch(lengths, histories))
    order = torch.tensor(data.draw(st.permutations(range(len(sizes)))))
    back = batch.reorder(order).reorder(order.argsort())
    for name in type(batch).__dataclass_fields__:
        assert torch.equal(getattr(back, name), getattr(batch, name)), name


def test_the_weight_of_a_batch_is_that_of_its_candidates():
    raw = changed(tiny_batch([2, 0, 3], [0, 1, 0]), weight=torch.tensor([1.0, 8.0, 2.5]))
    batch = tiny_ranker().encode(raw)
    assert batch.weight.tolist() == [1, 8, 2.5]
    assert batch.total_weight() == 2 * 1 + 3 * 2.5
    assert batch.select(2, 3).total_weight() == 7.5


def test_ranges_share_the_candidates():
    batch = tiny_ranker().encode(tiny_batch([4, 4, 4, 4], [0, 0, 0, 0]))
    assert batch.edges(2) == [(0, 2), (2, 4)]
    assert batch.edges(1) == [(0, 4)]
    assert batch.edges(9) == [(0, 1), (1, 2), (2, 3), (3, 4)]
