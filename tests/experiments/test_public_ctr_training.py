"""The network against a plain reference, and a seed's training: steps, plateau, resume."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from experiments.public_ctr_config import PublicConfig
from experiments.public_ctr_data import EncodedData, EncodedSplit
from experiments.public_ctr_files import Fields
from experiments.public_ctr_model import ParallelDCNv2
from experiments.public_ctr_training import Plateau, SeedRun
from features.errors import BadInputError

SMALL = PublicConfig(
    cross_layers=2,
    deep=(16, 8),
    batch_size=64,
    epochs=3,
    learning_rate=0.01,
    dropout=0.2,
    threads=1,
)


def split(rows: int, seed: int, *, numeric: int = 1) -> EncodedSplit:
    """A click where the two fields' parities differ: neither field alone tells anything."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(1, 7, (rows, 2))
    clicked = (codes.sum(axis=1) % 2 == 1) ^ (rng.random(rows) < 0.05)
    return EncodedSplit(
        table_rows=(codes + np.array([0, 7])).astype(np.int32),
        values=rng.normal(size=(rows, numeric)).astype(np.float32),
        clicked=clicked,
    )


def dataset(rows: int = 600, numeric: int = 1) -> EncodedData:
    parts = {"train": rows, "valid": 300, "test": 300}
    return EncodedData(
        fields=Fields(categorical=("a", "b"), numeric=("x", "y")[:numeric]),
        sizes=(7, 7),
        splits={name: split(n, i, numeric=numeric) for i, (name, n) in enumerate(parts.items())},
        fingerprint="f",
    )


def weights(run: SeedRun) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


@pytest.mark.parametrize("numeric", [0, 2])
def test_network_is_the_formula(numeric: int) -> None:
    torch.manual_seed(1)
    model = ParallelDCNv2(14, 2, numeric, SMALL).eval()
    torch.nn.init.normal_(model.table.weight)  # so that the crosses are not all tiny
    rows = torch.tensor([[1, 9], [3, 7]], dtype=torch.int32)
    values = torch.randn(2, numeric)
    expected = []
    for r, v in zip(rows.tolist(), values, strict=True):
        parts = [model.table.weight[i] for i in r] + [
            v[i] * model.numeric[i] for i in range(numeric)
        ]
        x_0 = torch.cat(parts)
        x = x_0
        for kernel, bias in zip(model.cross.net.kernels, model.cross.net.bias, strict=True):
            x = x_0 * (kernel @ x + bias.squeeze(1)) + x
        hidden = x_0
        for linear, norm in ((model.deep[0], model.deep[1]), (model.deep[4], model.deep[5])):
            # Fresh running statistics: mean 0, variance 1.
            hidden = F.relu((linear.weight @ hidden + linear.bias) / (1 + norm.eps) ** 0.5)
        expected.append(model.output.weight[0] @ torch.cat([x, hidden]) + model.output.bias[0])
    torch.testing.assert_close(model(rows, values), torch.stack(expected))


def test_network_has_the_size_that_bars_reports_for_frappe() -> None:
    # BARS's log counts 458,391 parameters: 404,501 in 4 cross layers of 100, three deep layers of
    # 400 with batch normalisation and the output, which leaves 5,389 embeddings of 10.
    model = ParallelDCNv2(5389, 10, 0, PublicConfig())
    assert sum(p.numel() for p in model.parameters()) == 458_391


def test_numeric_fields_alone_are_enough() -> None:
    model = ParallelDCNv2(0, 0, 2, SMALL).eval()
    assert model(torch.zeros(3, 0, dtype=torch.int32), torch.ones(3, 2)).shape == (3,)


def test_plateau_by_hand() -> None:
    assert Plateau.of([]) == Plateau(best=-1, stale=0, drops=0)
    assert Plateau.of([0.7]) == Plateau(best=0, stale=0, drops=0)
    assert Plateau.of([0.7, 0.6, 0.8]) == Plateau(best=2, stale=0, drops=1)
    assert Plateau.of([0.7, 0.8, 0.8, 0.79]) == Plateau(best=1, stale=2, drops=2)
    assert Plateau.of([0.7, 0.7 + 5e-7]) == Plateau(best=0, stale=1, drops=1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_plateau_agrees_with_torch_scheduler(tenths: list[int]) -> None:
    aucs = [tenth / 10 for tenth in tenths]
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max", factor=0.5, patience=0, threshold=1e-6, threshold_mode="abs", eps=0
    )
    for auc in aucs:
        scheduler.step(auc)
    found = Plateau.of(aucs)
    assert optimizer.param_groups[0]["lr"] == 0.5**found.drops
    assert found.stale == len(aucs) - 1 - found.best
    assert found.best == aucs.index(max(aucs))


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_step_is_adam_on_clipped_loss_with_embedding_l2(scale: float) -> None:
    """Fused Adam's weight decay against the term written into the loss and unfused Adam."""
    # Without batch normalisation, before which a bias has no gradient but rounding.
    config = PublicConfig(
        deep=(8,), cross_layers=1, dropout=0.0, batch_norm=False, embedding_l2=0.05, threads=1
    )
    data = dataset()
    ours, plain = SeedRun(data, config, 3), SeedRun(data, config, 3).model
    train = data.splits["train"]
    rows, clicked = torch.from_numpy(train.table_rows), torch.from_numpy(train.clicked).float()
    values = torch.from_numpy(train.values) * scale
    adam = torch.optim.Adam(plain.parameters(), lr=1e-3)
    ours.model.train()
    plain.train()
    norms = []
    for _ in range(5):
        ours._step(rows, values, clicked)
        adam.zero_grad()
        F.binary_cross_entropy_with_logits(plain(rows, values), clicked).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 10.0)))
        for embedding in plain.embeddings():
            embedding.grad += 0.05 * embedding.detach()
        adam.step()
    assert (min(norms) > 10) == (scale > 1)
    for (name, found), expected in zip(
        ours.model.named_parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, msg=lambda text, n=name: f"{n}: {text}")


def test_training_learns_an_interaction(tmp_path: Path) -> None:
    config = PublicConfig(
        cross_layers=2,
        deep=(32,),
        dropout=0.0,
        embedding_l2=1e-6,
        batch_size=64,
        epochs=20,
        learning_rate=0.01,
        threads=1,
    )
    run = SeedRun(dataset(2000), config, 0)
    before = run.scores("test")[0]
    run.train(tmp_path / "checkpoint.safetensors")
    auc, loss = run.scores("test")
    assert before < 0.7
    assert auc > 0.9  # 5 % of the labels are noise
    assert loss < 0.35


def test_best_epoch_is_restored_and_rates_fall(tmp_path: Path) -> None:
    config = PublicConfig(
        deep=(16,), cross_layers=1, batch_size=50, epochs=12, learning_rate=0.05, threads=1
    )
    run = SeedRun(dataset(), config, 1)
    run.train(tmp_path / "checkpoint.safetensors")
    assert run.done
    best = run.history[run.plateau.best]
    assert run.scores("valid") == (best.auc, best.log_loss)
    assert run.plateau.stale == 2
    for number, epoch in enumerate(run.history):
        drops = Plateau.of([one.auc for one in run.history[:number]]).drops
        assert epoch.learning_rate == pytest.approx(max(0.05 * 0.1**drops, 1e-6))


class KilledError(Exception):
    """Stands for a killed process."""


@pytest.mark.parametrize("numeric", [0, 1])
def test_killed_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numeric: int
) -> None:
    data = dataset(numeric=numeric)
    whole = SeedRun(data, SMALL, 5)
    whole.train(tmp_path / "whole.safetensors")

    killed = SeedRun(data, SMALL, 5)
    steps = killed._step

    def step(*batch: Tensor) -> float:
        if len(killed.history) == 2:
            raise KilledError
        return steps(*batch)

    monkeypatch.setattr(killed, "_step", step)
    with pytest.raises(KilledError):
        killed.train(tmp_path / "killed.safetensors")
    resumed = SeedRun(data, SMALL, 5)
    resumed.train(tmp_path / "killed.safetensors")

    assert [e.auc for e in resumed.history] == [e.auc for e in whole.history]
    assert [e.loss for e in resumed.history] == [e.loss for e in whole.history]
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name


def test_seeds_differ_and_repeat(tmp_path: Path) -> None:
    runs = []
    for number, seed in enumerate((0, 0, 1)):
        run = SeedRun(dataset(), SMALL, seed)
        run.train(tmp_path / f"{number}.safetensors")
        runs.append(weights(run)["table.weight"])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_every_row_is_trained_on_once_but_for_a_last_one_alone() -> None:
    run = SeedRun(dataset(), SMALL, 0)
    order = np.random.default_rng(0).permutation(64 * 3 + 1)
    batches = list(run._batches(order))
    assert [len(batch) for batch in batches] == [64, 64, 64]
    assert sorted(np.concatenate(batches).tolist()) == sorted(order[:-1].tolist())
    assert [len(batch) for batch in run._batches(order[:66])] == [64, 2]


def test_infinite_loss_is_told(tmp_path: Path) -> None:
    data = dataset()
    data.splits["train"].values[:] = 3e38
    with pytest.raises(BadInputError, match=r"seed 0: the loss became \w+ in epoch 1, batch 1"):
        SeedRun(data, SMALL, 0).train(tmp_path / "checkpoint.safetensors")
