"""A step on several cores gives the gradients of the plain one."""

from contextlib import closing

import pytest
import torch
import torch.nn.functional as F
from tiny_ranker import tiny_batch, tiny_ranker

from ranking import parallel
from ranking.parallel import ParallelStep

LENGTHS = [3, 1, 0, 5, 1, 2, 4, 4]
HISTORIES = [2, 0, 1, 7, 3, 0, 2, 5]


@pytest.fixture
def small_shares(monkeypatch):
    monkeypatch.setattr(parallel, "_SHARE_ROWS", 3)


@pytest.mark.parametrize("tables", ["frozen", "random"])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.usefixtures("small_shares")
def test_gradients_equal_those_of_plain_autograd(tables, threads):
    ranker = tiny_ranker(tables=tables)
    plain = tiny_ranker(tables=tables)
    batch = ranker.encode(tiny_batch(LENGTHS, HISTORIES))
    expected = F.binary_cross_entropy_with_logits(plain(batch), batch.clicked)
    expected.backward()
    with closing(ParallelStep(ranker, threads, bfloat16=False)) as step:
        assert step(batch) == pytest.approx(expected.item(), rel=1e-6)
    for mine, other in zip(ranker.dense_parameters(), plain.dense_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-6)
    updated = plain.trained_state()
    for name, tensor in ranker.trained_state().items():
        torch.testing.assert_close(tensor, updated[name], rtol=1e-4, atol=1e-5, msg=name)


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
