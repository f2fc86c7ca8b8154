import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_dashclip import tiny_model

from embeddings.freezing import freeze
from embeddings.momentum import MomentumEncoders, Queue

CPU = torch.device("cpu")


def test_an_update_by_hand():
    model = tiny_model()
    slow = MomentumEncoders(model, 0.75)
    name = "text_proj.bias"
    with torch.no_grad():
        model.text_proj.bias.fill_(4.0)
    slow.model.text_proj.bias.fill_(8.0)
    slow.update()
    assert slow.state()[name].tolist() == [7.0] * 16  # 0.75 * 8 + 0.25 * 4
    slow.update()
    assert slow.state()[name].tolist() == [6.25] * 16
    assert model.text_proj.bias.tolist() == [4.0] * 16


def test_what_is_frozen_does_not_move():
    model = tiny_model()
    freeze(model, 2 / 3, "stage 1")
    slow = MomentumEncoders(model, 0.5)
    before = {name: p.clone() for name, p in slow.model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    slow.update()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert slow.state().keys() == trained
    for name, parameter in slow.model.named_parameters():
        moved = before[name] + 0.5 if name in trained else before[name]
        torch.testing.assert_close(parameter, moved)
        assert not parameter.requires_grad


def test_the_copy_starts_as_the_model_and_stays_in_evaluation():
    model = tiny_model(dropout=0.5).train()
    slow = MomentumEncoders(model, 0.995)
    assert not any(module.training for module in slow.model.modules())
    assert model.training
    ours = dict(model.named_parameters())
    for name, parameter in slow.model.named_parameters():
        assert torch.equal(parameter, ours[name])
        assert parameter.data_ptr() != ours[name].data_ptr()


def rows(*numbers):
    """Embeddings [n, 2] that tell whose they are: images ``n``, texts ``-n``."""
    image = torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, 2)
    return image, -image, torch.tensor(numbers)


def test_a_ring_by_hand():
    queue = Queue(5, 2, CPU)
    assert [len(part) for part in queue.filled()] == [0, 0, 0]
    queue.push(*rows(1, 2, 3))
    assert queue.filled()[2].tolist() == [1, 2, 3]
    queue.push(*rows(4, 5, 6))  # over the oldest, 1
    image, text, key = queue.filled()
    assert key.tolist() == [6, 2, 3, 4, 5]
    assert image[:, 0].tolist() == [6, 2, 3, 4, 5]
    assert text[:, 1].tolist() == [-6, -2, -3, -4, -5]
    queue.push(*rows(7))
    assert queue.filled()[2].tolist() == [6, 7, 3, 4, 5]


def test_a_batch_larger_than_the_queue_leaves_its_last():
    queue = Queue(3, 2, CPU)
    queue.push(*rows(1))
    queue.push(*rows(2, 3, 4, 5, 6))
    image, _, key = queue.filled()
    assert sorted(key.tolist()) == [4, 5, 6]
    assert image[:, 0].tolist() == key.tolist()
    queue.push(*rows(7))
    assert sorted(queue.filled()[2].tolist()) == [5, 6, 7]


def test_no_queue_takes_nothing():
    queue = Queue(0, 2, CPU)
    queue.push(*rows(1, 2))
    assert queue.filled()[0].shape == (0, 2)


@settings(deadline=None)
@given(st.integers(1, 7), st.lists(st.integers(0, 9), max_size=8))
def test_a_ring_holds_the_latest(size, batches):
    queue, pushed = Queue(size, 2, CPU), []
    for count in batches:
        new = list(range(len(pushed), len(pushed) + count))
        queue.push(*rows(*new))
        pushed += new
    image, text, key = queue.filled()
    assert sorted(key.tolist()) == pushed[-size:]
    assert image[:, 0].tolist() == key.tolist()
    assert (-text[:, 0]).tolist() == key.tolist()


def test_a_restored_ring_goes_on_where_it_was():
    queue, restored = Queue(4, 2, CPU), Queue(4, 2, CPU)
    queue.push(*rows(1, 2, 3))
    queue.push(*rows(4, 5, 6))
    for name, tensor in queue.state().items():
        restored.state()[name].copy_(tensor)
    for one in (queue, restored):
        one.push(*rows(7))
    for name, tensor in queue.state().items():
        assert torch.equal(restored.state()[name], tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_ring_keeps_float32_without_gradient(dtype):
    queue = Queue(2, 2, CPU)
    image, text, key = rows(1, 2)
    queue.push(image.to(dtype).requires_grad_(), text.to(dtype), key)
    assert queue.image.dtype == torch.float32
    assert not queue.image.requires_grad
