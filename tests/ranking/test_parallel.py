"""A step on several cores gives the gradients of the plain one."""

from contextlib import closing

import pytest
import torch
import torch.nn.functional as F
from tiny_ranker import changed, take_requests, tiny_batch, tiny_ranker

from ranking import parallel
from ranking.parallel import ParallelStep

LENGTHS = [3, 1, 0, 5, 1, 2, 4, 4]
HISTORIES = [2, 0, 1, 7, 3, 0, 2, 5]
SHAPES = {"frozen": {}, "random": {"tables": "random"}, "history counts": {"history_counts": True}}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


@pytest.fixture
def small_shares(monkeypatch):
    monkeypatch.setattr(parallel, "_SHARE_ROWS", 3)


def assert_same_step(ranker, other):
    """Both have the same gradients of dense parameters and the same tables, updated already."""
    for mine, its in zip(ranker.dense_parameters(), other.dense_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-5, atol=1e-6)
    updated = other.trained_state()
    for name, tensor in ranker.trained_state().items():
        torch.testing.assert_close(tensor, updated[name], rtol=1e-4, atol=1e-5, msg=name)


@every_shape
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.usefixtures("small_shares")
def test_gradients_equal_those_of_plain_autograd(shape, threads):
    ranker, plain = tiny_ranker(**shape), tiny_ranker(**shape)
    batch = ranker.encode(tiny_batch(LENGTHS, HISTORIES))
    weight = batch.weight[batch.request_of_candidate()]
    losses = F.binary_cross_entropy_with_logits(plain(batch), batch.clicked, reduction="none")
    expected = (weight * losses).sum() / weight.sum()
    expected.backward()
    with closing(ParallelStep(ranker, threads, bfloat16=False)) as step:
        assert step(batch) == pytest.approx(expected.item(), rel=1e-6)
    assert_same_step(ranker, plain)


@every_shape
@pytest.mark.usefixtures("small_shares")
def test_a_request_of_weight_3_counts_as_three_of_weight_1(shape):
    counts = [1, 3, 2, 1, 1, 2, 3, 1]
    once = changed(tiny_batch(LENGTHS, HISTORIES), weight=torch.tensor(counts).float())
    places = [place for place, count in enumerate(counts) for _ in range(count)]
    repeated = changed(take_requests(once, places), weight=torch.ones(len(places)))
    one, other = tiny_ranker(**shape), tiny_ranker(**shape)
    with (
        closing(ParallelStep(one, 2, bfloat16=False)) as weighted,
        closing(ParallelStep(other, 2, bfloat16=False)) as plain,
    ):
        assert weighted(one.encode(once)) == pytest.approx(plain(other.encode(repeated)), rel=1e-5)
    assert_same_step(one, other)


def test_only_the_ratio_of_weights_matters():
    batch = tiny_batch(LENGTHS, HISTORIES)
    heavier = changed(batch, weight=batch.weight * 4)
    one, other = tiny_ranker(), tiny_ranker()
    losses = []
    for ranker, given in ((one, batch), (other, heavier)):
        with closing(ParallelStep(ranker, 1, bfloat16=False)) as step:
            losses.append(step(ranker.encode(given)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert_same_step(one, other)


def test_an_error_in_a_share_reaches_the_caller():
    ranker = tiny_ranker()
    batch = ranker.encode(tiny_batch(LENGTHS, HISTORIES))
    broken = batch.reorder(torch.arange(len(LENGTHS)))
    broken.product.fill_(10**6)
    with (
        closing(ParallelStep(ranker, 2, bfloat16=False)) as step,
        pytest.raises((IndexError, RuntimeError)),
    ):
        step(broken)


def test_requests_without_candidates_add_nothing():
    ranker = tiny_ranker()
    with closing(ParallelStep(ranker, 2, bfloat16=False)) as step:
        assert step(ranker.encode(tiny_batch([0, 0], [1, 2]))) == 0
    assert all((parameter.grad == 0).all() for parameter in ranker.dense_parameters())
