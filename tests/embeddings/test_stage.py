"""The loop of both stages, on models of a few weights whose steps can be told in advance."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

from embeddings.config import StageConfig
from embeddings.stage import StageLoop, describe
from features.errors import BadInputError

RATE = 0.01


class StoppedError(Exception):
    """Stands for a kill."""


class Weights(nn.Module):
    """A row and a matrix of weights, and some that no stage trains."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.row = nn.Parameter(torch.zeros(1))
        self.matrix = nn.Parameter(torch.ones(1, 1))
        self.idle = nn.Parameter(torch.ones(1, 1))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)


class Slope:
    """Its loss has the batch's mean as the gradient of each weight; nothing else changes it."""

    name = "slope"

    def __init__(self, model, numbers, config, scores=(), noise=0.0):
        self.model = model
        self.config = config
        self.numbers = np.asarray(numbers, np.float64)
        self.examples = len(self.numbers)
        self.scores = list(scores)
        self.noise = noise
        self.counter = torch.zeros(1)

    def prepare(self, batch):
        """Nothing to read."""

    def batches(self, epoch, size):
        numbers = np.random.default_rng(epoch).permutation(self.numbers) if self.noise else None
        numbers = self.numbers if numbers is None else numbers
        for start in range(0, len(numbers) - size + 1, size):
            yield (numbers[start : start + size],)

    def loss(self, batch, *, epoch, seed):
        slope = float(batch[0].mean()) + self.noise * float(torch.randn(()))
        loss = slope * (self.model.row.sum() + self.model.matrix.sum())
        return loss, {"loss": float(loss.detach())}

    def after_step(self):
        self.counter += 1

    def evaluate(self):
        return {"score": self.scores[int(self.counter) // self.steps]} if self.scores else {}

    def state(self):
        return {"counter": self.counter}


def config(**changes):
    plain = {"epochs": 1, "batch": 1, "learning_rate": RATE, "weight_decay": 0.0, "warmup": 0.0}
    return StageConfig(**plain | changes)


def looped(
    tmp_path,
    numbers,
    *,
    scores=(),
    patience=0,
    seconds=math.inf,
    noise=0.0,
    file="state",
    **changes,
):
    model = Weights()
    stage = Slope(model, numbers, config(**changes), scores, noise)
    loop = StageLoop(
        stage,
        model,
        checkpoint=tmp_path / f"{file}.safetensors",
        seconds=seconds,
        patience=patience,
        bfloat16=False,
        seed=3,
    )
    stage.steps = loop.steps
    return loop


def trace(loop):
    """Return the first weight before and after each step."""
    values = [0.0]
    loop.run(lambda progress, figures: values.append(loop.model.row.item()))
    return np.array(values)


def test_the_rate_warms_up_and_falls_to_zero_along_a_cosine(tmp_path):
    # Adam moves a weight by the learning rate as long as its gradient stays the same.
    moved = np.diff(trace(looped(tmp_path, np.ones(5), epochs=2, warmup=0.2)))
    after = [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    np.testing.assert_allclose(moved, -RATE * np.array([0.5, 1, *after]), rtol=2e-4)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_gradients_are_clipped_to_one_norm(tmp_path, size):
    # Two weights with gradients of 1000 each have the norm 1414; clipped, both steps are alike.
    steps = trace(looped(tmp_path, [1e3, size], clip=1e-3, warmup=1.0))
    np.testing.assert_allclose(np.diff(steps), [-RATE / 2, -RATE], rtol=1e-3)


def test_only_matrices_that_are_used_decay(tmp_path):
    loop = looped(tmp_path, [0.0, 0.0], weight_decay=0.5, warmup=1.0)
    loop.run()
    assert loop.model.matrix.item() == pytest.approx((1 - RATE / 4) * (1 - RATE / 2))
    assert loop.model.row.item() == 0
    assert loop.model.idle.item() == loop.model.frozen.item() == 1


def test_parts_of_a_batch_make_the_step_of_the_whole(tmp_path):
    numbers = [1, 2, 3, 8, -5, 1, 0, 2]
    whole = trace(looped(tmp_path, numbers, batch=4))
    parts = trace(looped(tmp_path, numbers, batch=4, accumulate=2, file="parts"))
    np.testing.assert_allclose(parts, whole, rtol=1e-6)


def test_examples_that_fill_no_batch_are_left_out_and_a_batch_shrinks_to_the_data(tmp_path):
    loop = looped(tmp_path, np.ones(7), batch=3, epochs=2)
    assert (loop.batch, loop.steps, loop.total) == (3, 2, 12)
    assert loop.run().examples == 12
    small = looped(tmp_path, np.ones(7), batch=12, accumulate=2)
    assert (small.batch, small.steps) == (6, 1)


def test_a_stage_with_fewer_examples_than_parts_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="slope: 1 examples are fewer than the 2 parts"):
        looped(tmp_path, [1.0], batch=2, accumulate=2)


def test_a_batch_that_does_not_divide_among_the_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("embeddings.distributed.world", lambda: 3)
    with pytest.raises(BadInputError, match=r"batch of 8 does not divide into 6 .*3 processes"):
        looped(tmp_path, np.ones(9), batch=8, accumulate=2)


@pytest.mark.parametrize(("number", "shown"), [(math.nan, "nan"), (math.inf, "(inf|nan)")])
def test_a_loss_that_is_no_number_names_stage_epoch_and_step(tmp_path, number, shown):
    loop = looped(tmp_path, [1.0, number, 1.0])
    with pytest.raises(BadInputError, match=f"slope: the loss became {shown} in epoch 1, step 2"):
        loop.run()
    assert math.isfinite(loop.model.row.item())


def test_the_curve_holds_mean_losses(tmp_path):
    few = looped(tmp_path, [2.0, 0.0, 4.0]).run()
    assert [examples for examples, _ in few.losses] == [1, 2, 3]
    assert few.losses[0] == (1, 2.0)  # 2 * (0 + 1)
    many = looped(tmp_path, np.zeros(250), file="many").run()
    assert len(many.losses) == 125
    assert many.losses[-1] == (250, 0.0)
    assert many.unnoted == []


# --- which model is kept

SCORES = [0.1, 0.9, 0.5, 0.7, 0.6, 0.2]  # before training, and after each epoch


@pytest.mark.parametrize(("patience", "epochs", "best"), [(2, 4, 2), (3, 5, 5), (1, 3, 2)])
def test_the_model_of_the_lowest_score_is_kept(tmp_path, patience, epochs, best):
    loop = looped(tmp_path, np.ones(2), scores=SCORES, patience=patience, epochs=5)
    values = trace(loop)
    assert len(values) == 1 + 2 * epochs
    progress = loop.progress
    assert (progress.epoch, progress.best, progress.done) == (epochs, best, True)
    assert [entry["score"] for entry in progress.evaluations] == SCORES[: epochs + 1]
    assert loop.model.row.item() == values[2 * best]


def test_of_equal_scores_the_later_model_is_kept(tmp_path):
    loop = looped(tmp_path, np.ones(2), scores=[1.0, 0.5, 0.5], patience=2, epochs=2)
    loop.run()
    assert loop.progress.best == 2


@pytest.mark.parametrize("scores", [(), SCORES])
def test_without_patience_or_scores_the_last_model_is_kept(tmp_path, scores):
    loop = looped(tmp_path, np.ones(2), scores=scores, patience=0 if scores else 2, epochs=5)
    values = trace(loop)
    assert len(values) == 11
    assert loop.model.row.item() == values[-1]


def test_evaluations_are_told_when_they_are_made(tmp_path):
    told = []
    loop = looped(tmp_path, np.ones(2), scores=SCORES, epochs=2)
    loop.run(
        lambda progress, figures: told.append(progress.step),
        lambda epoch, found: told.append((epoch, found["score"])),
    )
    assert told == [(0, 0.1), 1, 2, (1, 0.9), 1, 2, (2, 0.5)]


def test_figures_are_described_without_the_score():
    assert describe({"score": 1.0, "itm_loss": 0.5, "recall_at_10": 0.25}) == (
        "itm loss 0.5000, recall at 10 0.2500"
    )


# --- going on


@pytest.mark.parametrize("stop", [1, 5, 7, 14])
@pytest.mark.parametrize("patience", [0, 1])
def test_a_stopped_stage_goes_on_to_the_same_weights(tmp_path, stop, patience):
    setting = {"scores": SCORES, "patience": patience, "epochs": 3, "noise": 0.3}
    numbers = np.linspace(-1, 1, 5)
    expected = looped(tmp_path, numbers, **setting)
    expected.run()
    expected.checkpoint.unlink()

    def interrupt(progress, figures):
        if progress.examples == stop:
            raise StoppedError

    with pytest.raises(StoppedError):
        looped(tmp_path, numbers, seconds=-1, **setting).run(interrupt)
    assert expected.checkpoint.exists() == (stop > 1)
    resumed = looped(tmp_path, numbers, **setting)
    resumed.run()
    for one, other in zip(resumed.model.parameters(), expected.model.parameters(), strict=True):
        assert one.equal(other)
    assert resumed.stage.counter.equal(expected.stage.counter)
    one, other = asdict(resumed.progress), asdict(expected.progress)
    assert one | {"seconds": 0} == other | {"seconds": 0}


def test_a_stage_that_ended_is_not_repeated(tmp_path):
    setting = {"scores": SCORES, "patience": 2, "epochs": 5}
    whole = looped(tmp_path, np.ones(2), **setting)
    whole.run()
    again = looped(tmp_path, np.ones(2), **setting)
    assert len(trace(again)) == 1
    assert again.model.row.equal(whole.model.row)


def test_the_checkpoint_of_another_stage_is_left_alone(tmp_path):
    looped(tmp_path, np.ones(2)).run()
    other = looped(tmp_path, np.ones(2))
    other.stage.name = "another"
    assert len(trace(other)) == 3


def test_a_checkpoint_of_other_weights_is_refused(tmp_path):
    looped(tmp_path, np.ones(2)).run()
    loop = looped(tmp_path, np.ones(2))
    loop.stage.state = dict
    with pytest.raises(BadInputError, match=r"state\.safetensors: .* 'stage/counter'"):
        loop.run()
