"""Trained tables of a device against plain torch, wherever their rows lie."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gpu import device, needs_gpu, on_every_device
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ranking.device_placement import Place
from ranking.device_tables import DeviceTables

RATE = 0.1
ROWS = {"a": 7, "b": 500}
ON_DEVICE = Place(where="device")
CACHED = Place(where="cached", cache_rows=64)  # of 500: rows come and go


def configs(names=("a", "b")):
    return [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=ROWS[name],
            embedding_dim=8,
            feature_names=[name],
        )
        for name in names
    ]


def tables(kind, place=ON_DEVICE, names=("a", "b")):
    """Return tables of random rows, and a plain copy of each."""
    found = configs(names)
    places = {"a": ON_DEVICE, "b": place}
    made = DeviceTables(found, places, device(kind), RATE)
    torch.manual_seed(0)
    plain = {}
    for name, weight in made.weights().items():
        plain[name] = torch.randn(weight.shape)
        weight.copy_(plain[name])
    return made, plain


def adagrad(weight, momentum, gradient):
    """Row-wise Adagrad, as fbgemm documents it."""
    momentum += gradient.square().mean(1)
    weight -= RATE * gradient / (momentum.sqrt() + 1e-8)[:, None]


every_place = pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("cpu", ON_DEVICE),
        pytest.param("cuda", ON_DEVICE, marks=needs_gpu),
        pytest.param("cuda", CACHED, marks=needs_gpu),
    ],
    ids=["cpu", "gpu", "cache"],
)


@every_place
def test_rows_are_looked_up_and_updated_as_in_plain_torch(kind, place):
    made, plain = tables(kind, place)
    momenta = {name: torch.zeros(rows) for name, rows in ROWS.items()}
    random = np.random.default_rng(0)
    for _ in range(20):
        rows = [torch.from_numpy(random.integers(0, ROWS[name], 30)) for name in ROWS]
        values = torch.cat(rows).to(device(kind))
        features = KeyedJaggedTensor(
            keys=["a", "b"], values=values, offsets=torch.arange(61, device=values.device)
        )
        found = made(features).values()
        leaves = {name: weight.clone().requires_grad_() for name, weight in plain.items()}
        expected = torch.cat([leaves[n][r] for n, r in zip(ROWS, rows, strict=True)], dim=1)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
        (found.square().sum() / 100).backward()
        (expected.square().sum() / 100).backward()
        with torch.no_grad():
            for name, weight in plain.items():
                adagrad(weight, momenta[name], leaves[name].grad)
    for name, weight in made.weights().items():
        torch.testing.assert_close(weight.cpu(), plain[name], rtol=1e-3, atol=1e-4)
    for name, momentum in made.momenta().items():
        torch.testing.assert_close(momentum.cpu(), momenta[name], rtol=1e-3, atol=1e-4)


@every_place
def test_means_count_unknown_rows_and_leave_them_zero(kind, place):
    made, plain = tables(kind, place, names=("b",))
    plain["b"][0] = 0
    made.weights()["b"][0] = 0
    rows = torch.tensor([3, 0, 9, 9, 0, 0, 7])
    offsets = torch.tensor([0, 3, 4, 4, 6, 7])
    found = made.pool(rows.to(device(kind)), offsets.to(device(kind)))
    weight = plain["b"].clone().requires_grad_()
    expected = F.embedding_bag(rows, weight, offsets, mode="mean", include_last_offset=True)
    torch.testing.assert_close(found.cpu(), expected)
    assert found[2].count_nonzero() == found[3].count_nonzero() == 0
    upstream = torch.randn(found.shape)
    found.backward(upstream.to(found.device))
    expected.backward(upstream)
    gradient = weight.grad.clone()
    gradient[0] = 0
    momentum = torch.zeros(ROWS["b"])
    adagrad(plain["b"], momentum, gradient)
    after = made.weights()["b"].cpu()
    torch.testing.assert_close(after, plain["b"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.momenta()["b"].cpu(), momentum, rtol=1e-4, atol=1e-6)
    assert after[0].count_nonzero() == 0


@every_place
def test_what_is_written_over_a_table_is_what_is_read(kind, place):
    """A checkpoint is written while a cache holds rows; they must not come back."""
    made, _ = tables(kind, place, names=("b",))
    rows = torch.arange(1, 31, device=device(kind))
    offsets = torch.arange(31, device=device(kind))
    made.pool(rows, offsets).sum().backward()
    made.weights()["b"].fill_(5)
    with torch.no_grad():
        assert made.pool(rows, offsets).eq(5).all()
    made.pool(rows, offsets).sum().backward()
    assert made.weights()["b"][31:].eq(5).all()


@on_every_device
def test_no_bags(kind):
    made, _ = tables(kind)
    nothing = torch.zeros(0, dtype=torch.int64, device=device(kind))
    start = torch.zeros(1, dtype=torch.int64, device=device(kind))
    features = KeyedJaggedTensor(keys=["a", "b"], values=nothing, offsets=start)
    assert made(features).values().shape == (0, 16)
    means, _ = tables(kind, names=("b",))
    assert means.pool(nothing, start).shape == (0, 8)
    assert (
        means.pool(nothing, torch.zeros(4, dtype=torch.int64, device=device(kind))).tolist()
        == [[0.0] * 8] * 3
    )


def test_a_rate_is_handed_over():
    made, plain = tables("cpu", names=("b",))
    for group in made.optimizer.param_groups:
        group["lr"] = 0.5
    made.optimizer.step()
    made.pool(torch.tensor([2]), torch.tensor([0, 1])).sum().backward()
    # Row-wise Adagrad's first step is the rate along g / rms(g): all ones here.
    torch.testing.assert_close(made.weights()["b"][2], plain["b"][2] - 0.5)
