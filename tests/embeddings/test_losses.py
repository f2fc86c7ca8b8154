import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.losses import (
    contrast,
    hard_negatives,
    product_query_contrast,
    similarities,
    soft_targets,
)

LOG = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).log()


def test_soft_targets_by_hand():
    similarity = torch.tensor([[0.0, math.log(3)]])  # softmax: a quarter and three quarters
    same = torch.tensor([[True, False]])
    found = soft_targets(similarity, same, 0.4)
    assert found[0].tolist() == pytest.approx([0.4 * 0.25 + 0.6, 0.4 * 0.75])
    assert soft_targets(similarity, same, 0.0).tolist() == [[1, 0]]


def test_products_of_one_title_share_the_target():
    same = torch.tensor([[True, True, False, False], [False, False, True, False]])
    found = soft_targets(torch.zeros(2, 4), same, 0.4)
    assert found[0].tolist() == pytest.approx([0.4, 0.4, 0.1, 0.1])
    assert found[1].tolist() == pytest.approx([0.1, 0.1, 0.7, 0.1])


@settings(deadline=None)
@given(st.floats(0, 1), st.integers(0, 1000))
def test_soft_targets_sum_to_one(alpha, seed):
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randn(5, 7, generator=generator) * 20
    same = (torch.rand(5, 7, generator=generator) < 0.3) | torch.eye(5, 7, dtype=torch.bool)
    targets = soft_targets(similarity, same, alpha)
    assert targets.min() >= 0
    torch.testing.assert_close(targets.sum(1), torch.ones(5))


def test_contrast_by_hand():
    similarity = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])
    targets = torch.tensor([[0.7, 0.3], [1.0, 0.0]])
    wanted = [0.7 * math.log(4) + 0.3 * math.log(4 / 3), math.log(2)]
    assert contrast(similarity, targets).tolist() == pytest.approx(wanted)


def test_contrast_with_one_hot_targets_is_cross_entropy():
    similarity = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)) * 30
    targets = torch.eye(6, 9)
    wanted = torch.nn.functional.cross_entropy(similarity, torch.arange(6), reduction="none")
    torch.testing.assert_close(contrast(similarity, targets), wanted)


# --- hard negatives


def draw(similarity, same, count, seed=0):
    rows = (count, similarity.shape[1])
    noise = torch.rand(rows, generator=torch.Generator().manual_seed(seed))
    return hard_negatives(similarity.expand(rows), same.expand(rows), noise)


def test_negatives_follow_the_softmax_and_are_never_the_row_s_own():
    same = torch.tensor([[False, False, False, True]])
    found, any_negative = draw(LOG, same, 60_000)
    counts = found.bincount(minlength=4).double()
    assert counts[3] == 0
    wanted = torch.tensor([1, 2, 3]) / 6 * 60_000
    chi_square = ((counts[:3] - wanted) ** 2 / wanted).sum()
    assert chi_square < 13.8  # 1 in 1,000 by chance, with 2 degrees of freedom
    assert any_negative.all()


def test_a_row_without_any_negative_says_so():
    same = torch.tensor([[True, True], [True, False]])
    found, any_negative = hard_negatives(torch.zeros(2, 2), same, torch.full((2, 2), 0.5))
    assert any_negative.tolist() == [False, True]
    assert found[1] == 1


def test_the_noise_decides_the_draw():
    same = torch.zeros(1, 4, dtype=torch.bool)
    for place in range(4):
        noise = torch.full((1, 4), 0.01)
        noise[0, place] = 0.999
        assert hard_negatives(LOG, same, noise)[0].item() == place
    # The ends of the interval leave everything finite: equal noise leaves the most similar.
    for end in (0.0, 1 - 2**-24):
        assert hard_negatives(LOG, same, torch.full((1, 4), end))[0].item() == 3
    assert torch.equal(draw(LOG, same, 50)[0], draw(LOG, same, 50)[0])


def test_a_draw_has_no_gradient():
    similarity = torch.zeros(2, 2, requires_grad=True)
    found, _ = hard_negatives(similarity, torch.eye(2, dtype=torch.bool), torch.rand(2, 2))
    assert found.tolist() == [1, 0]
    assert not found.requires_grad


# --- product-query contrast

COSINE = torch.tensor([[0.8, 0.5, 0.2, 0.3]])


def pqc(positive, negatives, **changes):
    return product_query_contrast(
        changes.pop("cosine", COSINE),
        torch.tensor(positive),
        torch.tensor(negatives),
        changes.pop("temperature", 0.1),
        **changes,
    )


def test_equation_1_by_hand():
    """Cosines .8 against .5 and .2 at temperature .1: e^8 against e^5 and e^2."""
    wanted = math.log(1 + math.exp(-3) + math.exp(-6))
    assert wanted == pytest.approx(0.0509, abs=1e-4)
    assert pqc([0], [[1, 2]]).item() == pytest.approx(wanted, rel=1e-5)
    wanted = -math.log(math.exp(0.2) / (math.exp(0.2) + math.exp(0.8) + math.exp(0.5)))
    assert pqc([2], [[0, 1]], temperature=1.0).item() == pytest.approx(wanted, rel=1e-5)


def test_each_row_has_its_own_positive_and_negatives():
    cosine = torch.tensor([[0.8, 0.5, 0.2], [0.1, 0.9, 0.6]])
    found = pqc([0, 2], [[1, 2], [0, 1]], cosine=cosine)
    wanted = [
        math.log(1 + math.exp(-3) + math.exp(-6)),
        math.log(1 + math.exp(-5) + math.exp(3)),
    ]
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)


def test_negatives_that_are_none():
    wanted = math.log(1 + math.exp(-3))
    assert pqc([0], [[1, -1]]).item() == pytest.approx(wanted, rel=1e-5)
    cosine = COSINE.clone().requires_grad_()
    loss = pqc([0], [[-1, -1]], cosine=cosine)
    loss.sum().backward()
    assert loss.item() == 0
    assert cosine.grad.tolist() == [[0, 0, 0, 0]]


def test_shared_negatives_count_once_beside_the_row_s_own():
    everything = torch.ones(1, 4, dtype=torch.bool)
    wanted = math.log(1 + math.exp(-3) + math.exp(-6) + math.exp(-5))
    assert pqc([0], [[1, 2]], shared=everything).item() == pytest.approx(wanted, rel=1e-5)
    relevant_too = torch.tensor([[True, True, True, False]])  # the last one is no negative
    wanted = math.log(1 + math.exp(-3) + math.exp(-6))
    assert pqc([0], [[1, 2]], shared=relevant_too).item() == pytest.approx(wanted, rel=1e-5)


def test_the_gradient_of_equation_1():
    cosine = COSINE.double().requires_grad_()

    def loss(cosine):
        shared = torch.tensor([[True, True, True, False]])
        return pqc([0], [[1]], cosine=cosine, temperature=0.5, shared=shared)

    assert torch.autograd.gradcheck(loss, (cosine,))
    loss(cosine).sum().backward()
    assert cosine.grad[0, 0] < 0 < cosine.grad[0, 1]
    assert cosine.grad[0, 3] == 0


def test_similarities_stay_in_float32():
    """In bfloat16 the second one would be 0.9961."""
    rows, candidates = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.8], [0.998, 0.0]])
    with torch.autocast("cpu", torch.bfloat16):
        found = similarities(rows, candidates)
    assert found.dtype == torch.float32
    assert found[0].tolist() == pytest.approx([0.5, 0.998], abs=1e-6)
