import pytest
import torch
from tiny_dashclip import tiny_model

from embeddings.text_bank import TextBank

TOKENS = [[2, 6, 12, 3], [2, 3], [2, 7, 13, 18, 18, 18, 3], [2, 8, 3], [2, *[9] * 20, 3]]
ROWS = torch.tensor([2, 0, 1, 2, 4])
LARGE = 1e9


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def bank(model, depth, room=LARGE, *, query=False, bfloat16=False):
    return TextBank(TOKENS, model, depth=depth, query=query, room=room, bfloat16=bfloat16)


@torch.no_grad()
def alone(model, row, *, query=False, last=None):
    """States [T, H] of one text by itself: no padding, nothing kept."""
    ids = torch.tensor([TOKENS[row]])
    states = model.embed_text(ids, query=query)
    return model.run_text(states, torch.ones_like(ids), query=query, last=last)[0]


@pytest.mark.parametrize("query", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
@torch.no_grad()
def test_kept_states_are_those_of_each_text_alone(model, query, depth):
    kept = bank(model, depth, query=query)
    assert kept.bytes == sum(map(len, TOKENS)) * 32 * 2
    computed = bank(model, depth, room=0, query=query)
    assert computed.bytes == 0
    for found, tolerance in ((kept.states(ROWS), 5e-3), (computed.states(ROWS), 1e-5)):
        states, mask = found
        assert mask.sum(1).tolist() == [7, 4, 2, 7, 22]
        assert states.dtype == torch.float32
        for row, state, here in zip(ROWS.tolist(), states, mask, strict=True):
            wanted = alone(model, row, query=query, last=depth)
            torch.testing.assert_close(state[here], wanted, rtol=0, atol=tolerance)


def test_kept_states_are_rounded_to_float16(model):
    states, mask = bank(model, 1).states(torch.tensor([0]))
    wanted = alone(model, 0, last=1).half().float()
    torch.testing.assert_close(states[mask], wanted, rtol=0, atol=2e-3)  # a unit in the last place
    assert torch.equal(states, states.half().float())


def test_room_that_is_just_enough(model):
    need = sum(map(len, TOKENS)) * 32 * 2
    assert bank(model, 1, room=need).bytes == need
    assert bank(model, 1, room=need - 1).bytes == 0


def test_bfloat16_is_close(model):
    exact, mask = bank(model, 2).states(ROWS)
    fast, _ = bank(model, 2, bfloat16=True).states(ROWS)
    difference = (fast - exact)[mask].abs().max()
    assert 0 < difference < 0.1


@torch.no_grad()
def test_pooled_texts_are_those_of_each_alone(model):
    for depth, room, tolerance in ((0, LARGE, 1e-5), (2, 0, 1e-5), (2, LARGE, 5e-3)):
        found = bank(model, depth, room).pooled(ROWS)
        wanted = torch.stack([alone(model, row).mean(0) for row in ROWS.tolist()])
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


@torch.no_grad()
def test_many_texts_in_parts_of_like_length_keep_their_order(model):
    rows = torch.randint(0, 5, (200,), generator=torch.Generator().manual_seed(0))
    texts = bank(model, 0)
    widths = []
    found = texts.by_length(rows, lambda part: _noted(texts, rows, part, widths))
    assert sorted(width for width, _ in widths) == [width for width, _ in widths]
    assert len(widths) > 2
    assert sum(count for _, count in widths) == 200
    torch.testing.assert_close(found[:, 0], rows.float())


def _noted(texts, rows, part, widths):
    widths.append((int(texts.lengths[rows[part]].max()), len(part)))
    return rows[part].float()[:, None]


def test_token_ids_are_padded(model):
    ids, mask = bank(model, 0).ids(torch.tensor([1, 0]))
    assert ids.tolist() == [[2, 3, 0, 0], [2, 6, 12, 3]]
    assert mask.tolist() == [[True, True, False, False], [True] * 4]


@pytest.mark.parametrize("room", [0, LARGE])
def test_gradients_go_down_to_the_frozen_layers(room):
    model = tiny_model()
    for depth in (0, 2):
        model.zero_grad()
        bank(model, depth, room).pooled(ROWS).square().sum().backward()
        layers = [layer.output.dense.weight.grad for layer in model.text_encoder.encoder.layer]
        assert [gradient is not None for gradient in layers] == [n >= depth for n in range(3)]
        words = model.text_encoder.embeddings.word_embeddings.weight.grad
        assert (words is not None) == (depth == 0)


@torch.no_grad()
def test_another_model_runs_all_that_is_not_frozen(model):
    """The momentum encoders have layers of their own, and embeddings where nothing is frozen."""
    other = tiny_model(seed=1)
    found = bank(model, 0).pooled(ROWS, other)
    wanted = torch.stack([alone(other, row).mean(0) for row in ROWS.tolist()])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
