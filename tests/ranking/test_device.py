"""Training on a device as on cores: choice of the device, input, losses, checkpoints, whole runs.

What runs on a GPU runs on the CPU too, by the same code but for streams and places of tables.
"""

import json
import shutil
import threading
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gpu import device, needs_gpu, on_every_device
from tiny_ranker import tiny_batch, tiny_config, tiny_ranker

from features.batch import RequestBatch
from features.config_file import from_toml, to_toml
from features.errors import BadInputError
from features.manifest import RequestsManifest
from features.schema import DatasetSchema
from ranking import device as devices
from ranking.bundle import Bundle, PretrainedTables
from ranking.cli import main
from ranking.config import RankerConfig
from ranking.device import training_device, training_precision
from ranking.device_input import DeviceInput, one_ahead, read_behind
from ranking.device_model import DeviceModel
from ranking.device_step import DeviceStep
from ranking.device_training import DeviceTrainer
from ranking.distributed import begin_sum
from ranking.parallel import ParallelStep
from ranking.ranker import Ranker
from ranking.run import new_ranker, train_ranker
from ranking.step import StepInput
from ranking.training import Trainer
from ranking.training_data import TrainingData

LENGTHS = [3, 1, 0, 5, 1, 2, 4, 4]
HISTORIES = [2, 0, 1, 7, 3, 0, 2, 5]
SHAPES = {
    "frozen": {},
    "random": {"tables": "random"},
    "history counts": {"history_counts": True},
    "dcn": {"embedding_tower": False},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
# Of shapes whose steps are those of cores: trained product tables are updated another way.
WITHOUT_TRAINED = {name: shape for name, shape in SHAPES.items() if name != "random"}
same_steps = pytest.mark.parametrize("shape", WITHOUT_TRAINED.values(), ids=WITHOUT_TRAINED.keys())
CHOSEN = {
    "epochs": 2,
    "chunk_groups": 1,
    "batch_rows": 256,
    "checkpoint_seconds": 0.0,
    "evaluate_week": 6,
    "train_weeks": 3,
}


class StoppedError(Exception):
    """Stands for a kill."""


@dataclass(frozen=True)
class Setting:
    """What all trainings here share."""

    data: TrainingData
    transforms: Any
    tables: PretrainedTables

    def trainer(self, kind, shape, *, budget=None, **training) -> Trainer:
        """Return a trainer on a device, on cores where ``kind`` is None."""
        config = tiny_config(training=CHOSEN | {"validation_week": True} | training, **shape)
        tables = self.tables if config.model.embedding_tower else None
        ranker = new_ranker(config, self.transforms, tables)
        data = self.data
        arguments = (ranker, data.schema, data.train_files(), data.train_rows(), config.training)
        assert data.validation is not None
        watched = data.files(data.validation)
        if kind is None:
            return Trainer(*arguments, watched)
        return DeviceTrainer(*arguments, watched, device=device(kind), budget=budget)


@pytest.fixture(scope="module")
def setting(ranker_data, random_tables):
    config = tiny_config(training=CHOSEN | {"validation_week": True})
    schema = DatasetSchema.load(ranker_data)
    manifest = RequestsManifest.load(ranker_data / "requests")
    data = TrainingData.plan(schema, manifest, config)
    tables = PretrainedTables.read(random_tables)
    return Setting(data, data.fit_transforms(config), tables)


def assert_close(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name].cpu(), other[name].cpu(), msg=name, **tolerance)


LOOSE = {"rtol": 1e-3, "atol": 1e-4}


# Which device.


def test_where_there_is_no_gpu_auto_is_the_cpu_and_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training_device("auto") == training_device("cpu") == torch.device("cpu")
    with pytest.raises(BadInputError, match=r"^'device' is cuda, but torch .* finds no NVIDIA GPU"):
        training_device("cuda")


@pytest.fixture
def one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    builds = {"fbgemm-gpu": "1.8.0"}
    monkeypatch.setattr(devices, "installed_versions", lambda names: builds)
    return builds


@pytest.mark.usefixtures("one_gpu")
def test_a_gpu_is_used_and_computes_in_bfloat16(monkeypatch):
    assert training_device("auto") == training_device("cuda") == torch.device("cuda", 0)
    assert training_device("cpu") == torch.device("cpu")
    assert training_precision("auto", torch.device("cuda", 0)) == "bfloat16"
    assert training_precision("float32", torch.device("cuda", 0)) == "float32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert training_precision("auto", torch.device("cuda", 0)) == "float32"


def test_lookups_for_the_cpu_alone_leave_the_gpu_unused(one_gpu):
    del one_gpu["fbgemm-gpu"]
    assert training_device("auto") == torch.device("cpu")
    with pytest.raises(BadInputError, match=r"fbgemm-gpu-cpu looks tables up on the CPU alone"):
        training_device("cuda")


@pytest.mark.usefixtures("one_gpu")
def test_each_process_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(devices, "world", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert training_device("auto") == torch.device("cpu")
    with pytest.raises(BadInputError, match=r"2 processes have 1 GPU between them"):
        training_device("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert training_device("auto").type == "cuda"


def test_the_command_says_that_there_is_no_gpu(ranker_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = tmp_path / "config.toml"
    config.write_text(to_toml(tiny_config(training={"device": "cuda"})))
    arguments = ["--data", ranker_data, "--config", config, "--output", tmp_path / "run"]
    assert main([str(argument) for argument in arguments]) == 2
    assert "'device' is cuda, but torch" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Input and losses.


def steps(ranker: Ranker, number: int) -> list[StepInput]:
    found = []
    for seed in range(number):
        batch = ranker.encode(tiny_batch(LENGTHS, HISTORIES, seed=seed))
        found.append(StepInput(batch=batch, rows=batch.rows, weight=batch.total_weight()))
    return found


def test_on_the_cpu_batches_come_as_they_are_asked_for():
    ranker = tiny_ranker()
    given = steps(ranker, 3)
    taken = []
    source = (taken.append(number) or step for number, step in enumerate(given))
    found = DeviceInput(torch.device("cpu"), ranker.frozen_lookups)(source)
    assert taken == []
    first = next(found)
    assert taken == [0]
    assert first.batch.candidate_dense is given[0].batch.candidate_dense
    assert len(list(found)) == 2


@on_every_device
@same_steps
def test_batches_and_lookups_arrive_as_they_were(kind, shape):
    ranker, same = tiny_ranker(**shape), tiny_ranker(**shape)
    given = steps(same, 5)
    DeviceModel(ranker, device(kind))
    found = list(DeviceInput(device(kind), ranker.frozen_lookups)(iter(given)))
    assert len(found) == len(given)
    for step, expected in zip(found, given, strict=True):
        assert (step.rows, step.weight) == (expected.rows, expected.weight)
        for name in expected.batch.__dataclass_fields__:
            moved = getattr(step.batch, name)
            assert moved.device == device(kind)
            assert moved.cpu().equal(getattr(expected.batch, name)), name
        assert_close(step.batch.frozen, same.frozen_lookups(expected.batch))


def test_one_ahead():
    taken: list[int] = []
    items = one_ahead(taken.append(number) or number for number in range(3))
    assert next(items) == 0
    assert taken == [0, 1]
    assert list(items) == [1, 2]
    assert list(one_ahead([])) == []


@on_every_device
def test_losses_are_read_in_order_some_steps_later(kind):
    computed = []

    def losses():
        for number in range(6):
            computed.append(number)
            yield 10 + number, torch.tensor(number / 2, device=device(kind))

    read = read_behind(losses(), most=4)
    assert next(read) == (10, 0.0)
    assert computed == [0, 1, 2, 3, 4]
    assert list(read) == [(10 + number, number / 2) for number in range(1, 6)]


# Steps.


def gradients_of(step, ranker, batch):
    with closing(step):
        loss = float(step(batch))
    return loss, {str(n): p.grad for n, p in enumerate(ranker.dense_parameters())}


@on_every_device
@every_shape
def test_a_step_has_the_gradients_of_cores(kind, shape):
    ranker, cores = tiny_ranker(**shape), tiny_ranker(**shape)
    batch = cores.encode(tiny_batch(LENGTHS, HISTORIES))
    expected = gradients_of(ParallelStep(cores, 1, bfloat16=False), cores, batch)
    model = DeviceModel(ranker, device(kind))
    step = DeviceStep(ranker, device(kind), bfloat16=False)
    found = gradients_of(step, ranker, batch.to(device(kind)))
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
    sparse = {n: w for n, w in model.weights().items() if "pretrained" not in n}
    whole = cores.trained_state()
    assert_close(sparse, {name: whole[name] for name in sparse}, rtol=1e-4, atol=1e-5)


@on_every_device
def test_a_trained_table_is_updated_once_by_candidates_and_histories_together(kind):
    """Row-wise Adagrad's first step: each row moves by the rate along g / rms(g)."""
    ranker, plain = tiny_ranker(tables="random"), tiny_ranker(tables="random")
    batch = plain.encode(tiny_batch(LENGTHS, HISTORIES))
    rows = torch.cat([batch.product, batch.history])
    table = plain.pretrained.embedding_bags["product"].weight.detach().clone().requires_grad_()
    history = torch.nn.functional.embedding_bag(
        batch.history, table, batch.history_offsets, mode="mean", include_last_offset=True
    )
    inputs = plain.trained_lookups(batch) | {"product": table[batch.product], "history": history}
    request_c = batch.request_of_candidate()
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        plain.dense(inputs, request_c), batch.clicked, batch.weight[request_c], reduction="sum"
    )
    (gradient,) = torch.autograd.grad(losses / batch.total_weight(), table)
    gradient[0] = 0
    size = gradient.square().mean(1, keepdim=True).sqrt()
    expected = torch.where(size > 0, table - 0.01 * gradient / (size + 1e-8), table).detach()

    model = DeviceModel(ranker, device(kind))
    with closing(DeviceStep(ranker, device(kind), bfloat16=False)) as step:
        step(batch.to(device(kind)))
    name = "pretrained._fused.product.embedding_bags.product.weight"
    torch.testing.assert_close(model.weights()[name].cpu(), expected, rtol=1e-3, atol=1e-4)
    assert len(rows[rows > 0].unique()) > 10
    assert model.weights()[name][0].count_nonzero() == 0


@on_every_device
def test_a_part_without_requests_adds_nothing(kind):
    """As of several processes one may have, when the batch is short."""
    ranker = tiny_ranker(history_counts=True)
    batch = ranker.encode(tiny_batch(LENGTHS, HISTORIES)).select(0, 0)
    DeviceModel(ranker, device(kind))
    with closing(DeviceStep(ranker, device(kind), bfloat16=False)) as step:
        assert float(step(batch.to(device(kind)), 5.0)) == 0
    assert all((p.grad == 0).all() for p in ranker.dense_parameters())


def test_gradients_and_losses_are_summed_over_processes():
    """In a group of one process, whose sum is its own part."""
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=20)
    )
    try:
        ranker, alone = tiny_ranker(), tiny_ranker()
        batch = ranker.encode(tiny_batch(LENGTHS, HISTORIES))
        cpu = torch.device("cpu")
        expected = gradients_of(DeviceStep(alone, cpu, bfloat16=False), alone, batch)
        step = DeviceStep(ranker, cpu, bfloat16=False, begin_sum=begin_sum)
        found = gradients_of(step, ranker, batch)
        assert found[0] == expected[0]
        assert_close(found[1], expected[1], rtol=0, atol=0)
    finally:
        dist.destroy_process_group()


# Trainings.


@on_every_device
@same_steps
def test_training_on_a_device_is_training_on_cores(setting, kind, shape):
    cores, other = setting.trainer(None, shape), setting.trainer(kind, shape)
    seen: list[tuple[int, int]] = []
    expected = cores.run()
    found = other.run(on_step=lambda progress, loss: seen.append((progress.step, progress.rows)))
    assert [rows for rows, _ in found.losses] == [rows for rows, _ in expected.losses]
    np.testing.assert_allclose(
        [loss for _, loss in found.losses], [loss for _, loss in expected.losses], rtol=1e-3
    )
    assert found.validation == pytest.approx(expected.validation, rel=1e-4)
    assert [step for step, _ in seen] == list(range(1, found.step + 1))
    assert_close(other.whole_state(), cores.whole_state(), **LOOSE)
    week = setting.data.files(setting.data.evaluate)
    scores = [trained.predict(week).probability for trained in (cores, other)]
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-3, atol=1e-4)


@on_every_device
def test_bfloat16_trains_to_nearly_the_same(setting, kind):
    exact = setting.trainer(kind, {}, epochs=1).run()
    fast = setting.trainer(kind, {}, epochs=1, precision="bfloat16").run()
    losses = [np.array([loss for _, loss in progress.losses]) for progress in (exact, fast)]
    assert not np.array_equal(*losses)
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)


@needs_gpu
@pytest.mark.parametrize("tables", ["random", "frozen"])
def test_where_the_tables_lie_changes_nothing(setting, tables):
    """All rows in the machine's memory, but for a cache of a few trained ones."""
    shape = {"tables": tables}
    probe = setting.trainer("cuda", shape, budget=10**9)
    assert {place.where for place in probe.model.places.values()} == {"device"}
    trained = sum(len(weight) for weight in probe.model.weights().values())
    frozen = sum(len(bag.weight) for bag in probe.ranker.pretrained.embedding_bags.values())
    least = 8 * trained + 4 * frozen + 500
    beyond = setting.trainer("cuda", shape, budget=least)
    wheres = {place.where for place in beyond.model.places.values()}
    assert wheres & {"cached", "host"}
    expected, found = probe.run(), beyond.run()
    np.testing.assert_allclose(found.validation, expected.validation, rtol=1e-4)
    assert_close(beyond.whole_state(), probe.whole_state(), **LOOSE)


@every_shape
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (None, "cpu"),
        ("cpu", None),
        pytest.param(None, "cuda", marks=needs_gpu),
        pytest.param("cuda", None, marks=needs_gpu),
    ],
)
def test_a_training_goes_on_elsewhere(setting, tmp_path, shape, first, second):
    """Stopped in the second epoch, when there is a best one and momenta of everything."""
    path = tmp_path / "state.safetensors"

    def stop(progress, _loss):
        if progress.epoch == 1 and progress.chunk == 1:
            raise StoppedError

    begun = setting.trainer(first, shape)
    with pytest.raises(StoppedError):
        begun.run(path, stop)
    resumed = setting.trainer(second, shape)
    resumed._restore(path)
    again = setting.trainer(first, shape)
    again._restore(path)
    assert_close(resumed.whole_state(), again.whole_state(), rtol=0, atol=0)
    assert_close(resumed._momenta(), again._momenta(), rtol=0, atol=0)
    assert resumed.progress == again.progress
    expected, found = again.run(path), setting.trainer(second, shape).run(path)
    assert found.step == expected.step
    assert found.validation == pytest.approx(expected.validation, rel=2e-2)


@on_every_device
def test_an_infinite_loss_names_its_own_batch(setting, kind):
    """Though it is found some steps later."""
    with pytest.raises(BadInputError, match=r"loss became (nan|inf) in epoch 1, chunk 1, batch \d"):
        setting.trainer(kind, {}, learning_rate=1e30, warmup=0.0).run()


# Whole runs.


def run(data, tables, output, kind):
    training = {"epochs": 1, "device": kind}
    return train_ranker(data, output, tables=tables, config=tiny_config(training=training))


@pytest.fixture(scope="module")
def cores_run(ranker_data, random_tables, tmp_path_factory):
    """A complete run on cores, and its figures; read only."""
    output = tmp_path_factory.mktemp("cores") / "run"
    return output, run(ranker_data, random_tables, output, "cpu")


def test_a_run_goes_on_with_another_device_named(cores_run, ranker_data, random_tables, tmp_path):
    """It is complete, so that to go on with it is to show its figures."""
    output = tmp_path / "run"
    shutil.copytree(cores_run[0], output)
    config = output / "config.toml"
    assert from_toml(config, RankerConfig).training.device == "cpu"
    assert run(ranker_data, random_tables, output, "auto") == cores_run[1]
    # As one that was begun before there was a choice.
    lines = config.read_text().splitlines(keepends=True)
    assert sum(line.startswith("device = ") for line in lines) == 1
    config.write_text("".join(line for line in lines if not line.startswith("device = ")))
    assert run(ranker_data, random_tables, output, "cpu") == cores_run[1]


def test_a_run_by_the_code_for_a_gpu(cores_run, ranker_data, random_tables, tmp_path, monkeypatch):
    """The device is the CPU, which `DeviceTrainer` takes as well."""
    monkeypatch.setattr("ranking.run.Trainer", DeviceTrainer)
    found = run(ranker_data, random_tables, tmp_path / "run", "cpu")
    for name, figures in cores_run[1]["slices"].items():
        assert found["slices"][name] == pytest.approx(figures, rel=1e-4, nan_ok=True), name


@needs_gpu
@pytest.mark.parametrize("tables", ["frozen", "fine-tuned"])
def test_a_run_on_a_gpu_has_a_bundle_for_the_cpu(ranker_data, random_tables, tmp_path, tables):
    config = tiny_config(training={"epochs": 1, "device": "cuda"}, tables=tables)
    metrics = train_ranker(ranker_data, tmp_path / "run", tables=random_tables, config=config)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    bundle = Bundle.open(tmp_path / "run" / "bundle")
    assert bundle.ranker.device == torch.device("cpu")
    schema, manifest = bundle.schema, RequestsManifest.load(ranker_data / "requests")
    data = TrainingData.plan(
        schema, manifest, from_toml(tmp_path / "run/config.toml", RankerConfig)
    )
    losses, rows = 0.0, 0
    for records in data.files(data.evaluate).chunks(16):
        batch = RequestBatch.from_records(records, schema)
        p = bundle.ranker.score(batch).clamp(1e-7, 1 - 1e-7)
        losses -= torch.where(batch.clicked > 0, p.log(), (1 - p).log()).sum().item()
        rows += len(p)
    assert losses / rows == pytest.approx(metrics["slices"]["all"]["log_loss"], rel=1e-4)


@needs_gpu
def test_input_is_copied_while_the_gpu_computes():
    """The next batch arrives though a long product is still under way."""
    ranker = tiny_ranker()
    given = steps(ranker, 2)
    DeviceModel(ranker, device("cuda"))
    bring = DeviceInput(device("cuda"), ranker.frozen_lookups)
    batches = bring(iter(given))
    next(batches)
    torch.cuda.synchronize()
    long = torch.randn(8192, 8192, device="cuda")
    product = long
    for _ in range(50):
        product = product @ long / 100
    ended = torch.cuda.Event()
    ended.record()
    copied = bring._send(given[1])[2]
    waiting = threading.Thread(target=copied.synchronize)
    waiting.start()
    waiting.join(10)
    arrived_first = not ended.query()
    torch.cuda.synchronize()
    assert arrived_first
