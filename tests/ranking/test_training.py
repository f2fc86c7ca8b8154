"""The training loop on records of a few requests: order, resume, best epoch, what it may change."""

import datetime as dt
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_ranker import KNOWN, tiny_ranker

from features.batch import RecordFiles
from features.errors import BadInputError
from features.schema import DatasetSchema, Feature
from ranking.config import TrainingConfig
from ranking.training import Trainer, predict, seeded

SCHEMA = DatasetSchema(
    name="made-up",
    features=tuple(
        Feature(name=f"{level}_{name}", kind=kind, level=level)
        for level in ("request", "candidate")
        for kind, names in (("sparse", "ab"), ("dense", "xy"))
        for name in names
    ),
)
CONFIG = TrainingConfig(
    epochs=2,
    batch_rows=32,
    chunk_groups=2,
    learning_rate=0.01,
    precision="float32",
    threads=1,
    checkpoint_seconds=0,
)


SHAPES = {
    "frozen": {},
    "random": {"tables": "random"},
    "history counts": {"history_counts": True},
    "dcn": {"embedding_tower": False},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


class StoppedError(Exception):
    """Stands for a kill."""


def write_records(path, *, requests=80, seed=0, shuffled=False):
    """Write requests of 1 to 6 candidates; a high ``candidate_x`` is likelier to be clicked."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 7, requests)
    histories = random.integers(0, 4, requests)
    candidates = lengths.sum()
    x = random.normal(size=candidates)
    clicked = x + random.normal(size=candidates) > 0.5
    clicked = random.permutation(clicked) if shuffled else clicked

    def lists(values, counts=lengths):
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.array(values))

    table = {
        "request_id": pa.array(np.arange(requests)),
        "requested_at": pa.array([dt.datetime(2024, 1, 1)] * requests, pa.timestamp("us")),
        "query": pa.array([f"query {i}" for i in random.integers(0, 9, requests)]),
        "purchase_history": lists(random.integers(100, 100 + KNOWN, histories.sum()), histories),
        "purchase_age_days": lists((np.arange(histories.sum()) % 84).astype(np.int16), histories),
        "product_id": lists(random.integers(100, 100 + KNOWN, candidates)),
        "clicked": lists(clicked),
    }
    for name in ("a", "b"):
        table[f"request_{name}"] = pa.array(random.integers(0, 6, requests))
        table[f"candidate_{name}"] = lists(random.integers(0, 6, candidates))
    for name in ("x", "y"):
        table[f"request_{name}"] = pa.array(random.normal(size=requests))
        table[f"candidate_{name}"] = lists(x if name == "x" else random.normal(size=candidates))
    pq.write_table(pa.table(table), path, row_group_size=10)
    return path


def with_weights(path, weights, target):
    """Copy records with a weight for each request."""
    table = pq.read_table(path)
    table = table.append_column("weight", pa.array(weights, pa.float32()))
    pq.write_table(table, target, row_group_size=10)
    return target


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records") / "week.parquet")


@pytest.fixture(scope="module")
def later(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records") / "later.parquet", seed=1)


def rows_of(path):
    return sum(map(len, pq.read_table(path)["clicked"].to_pylist()))


def trainer(records, config=CONFIG, validation=None, **shape):
    ranker = tiny_ranker(**shape)
    files = RecordFiles.open([records])
    watched = RecordFiles.open([validation]) if validation else None
    return Trainer(ranker, SCHEMA, files, rows_of(records), config, watched)


def state(trained):
    return {name: tensor.clone() for name, tensor in trained.ranker.trained_state().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].equal(other[name]), name


@every_shape
def test_the_same_training_twice_gives_the_same_weights(records, shape):
    first, second = trainer(records, **shape), trainer(records, **shape)
    losses = [trained.run().losses for trained in (first, second)]
    assert losses[0] == losses[1]
    assert_same(state(first), state(second))


def test_another_seed_gives_another_order(records):
    first, second = trainer(records), trainer(records, replace(CONFIG, seed=1))
    assert first.run().losses != second.run().losses


def test_every_row_is_trained_on_once_an_epoch_and_steps_are_counted(records):
    seen = []
    progress = trainer(records).run(on_step=lambda p, loss: seen.append((p.rows, p.step, loss)))
    assert progress.rows == 2 * rows_of(records)
    assert progress.epoch == 2
    assert [step for _, step, _ in seen] == list(range(1, progress.step + 1))
    assert seen[-1][0] == progress.rows
    assert all(math.isfinite(loss) for *_, loss in seen)
    rows = [rows for rows, _ in progress.losses]
    assert rows == sorted(set(rows))
    assert rows[-1] == progress.rows
    assert len(rows) >= 2 * 4  # 8 row groups, two in a chunk


def test_training_learns(records, later):
    trained = trainer(records, replace(CONFIG, epochs=8))
    losses = [loss for _, loss in trained.run().losses]
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    predictions = predict(trained.ranker, SCHEMA, RecordFiles.open([later]))
    p = predictions.probability
    assert p[predictions.clicked].mean() > p[~predictions.clicked].mean() + 0.1


@every_shape
@pytest.mark.parametrize("stop", [1, 5, 12, 17])
def test_a_stopped_training_carries_on_to_the_same_weights(records, later, tmp_path, shape, stop):
    whole = trainer(records, validation=later, **shape)
    expected = whole.run()

    def interrupt(progress, _loss):
        if progress.step == stop:
            raise StoppedError

    path = tmp_path / "state.safetensors"
    with pytest.raises(StoppedError):
        trainer(records, validation=later, **shape).run(path, interrupt)
    assert path.exists() == (stop > 1)
    resumed = trainer(records, validation=later, **shape)
    found = resumed.run(path)
    assert_same(state(resumed), state(whole))
    assert found.losses == expected.losses
    assert found.validation == expected.validation
    assert (found.step, found.rows) == (expected.step, expected.rows)


def test_a_finished_training_is_restored_and_not_repeated(records, later, tmp_path):
    path = tmp_path / "state.safetensors"
    whole = trainer(records, validation=later)
    whole.run(path)
    again = trainer(records, validation=later)
    steps = []
    again.run(path, lambda progress, _loss: steps.append(progress.step))
    assert steps == []
    assert_same(state(again), state(whole))


def test_a_checkpoint_of_another_model_is_refused(records, tmp_path):
    path = tmp_path / "state.safetensors"
    trainer(records).run(path)
    with pytest.raises(BadInputError, match=r"state\.safetensors: .*tensor 'embedding_tower"):
        trainer(records, embedding_tower=False).run(path)
    with pytest.raises(BadInputError, match=r"has shape .* expected"):
        trainer(records, embedding_dim=8).run(path)


@pytest.mark.parametrize(
    "content", [b"", b"not tensors at all", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"]
)
def test_a_damaged_checkpoint_is_named(records, tmp_path, content):
    path = tmp_path / "state.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=r"state\.safetensors: damaged"):
        trainer(records).run(path)


def test_a_cut_checkpoint_is_named(records, tmp_path):
    path = tmp_path / "state.safetensors"
    trainer(records).run(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInputError, match=r"state\.safetensors: damaged"):
        trainer(records).run(path)


def test_training_leaves_frozen_tables_as_they_were(records):
    trained = trainer(records)
    tables = [bag.weight.clone() for bag in trained.ranker.pretrained.embedding_bags.values()]
    trained.run()
    after = [bag.weight for bag in trained.ranker.pretrained.embedding_bags.values()]
    assert all(one.equal(other) for one, other in zip(tables, after, strict=True))


def test_row_0_of_trained_tables_stays_zero_and_rows_never_read_stay(records):
    """The queries of the records have no embedding: the whole query table is never read."""
    trained = trainer(records, tables="random")
    before = state(trained)
    trained.run()
    bags = trained.ranker.pretrained.embedding_bags
    assert bags["product"].weight[0].count_nonzero() == 0
    for name, tensor in state(trained).items():
        if "pretrained" in name and "query" in name:
            assert tensor.equal(before[name])
        elif "pretrained" in name:
            assert not tensor.equal(before[name])


def test_an_infinite_loss_names_the_batch(records):
    config = replace(CONFIG, learning_rate=1e30, warmup=0.0)
    with pytest.raises(BadInputError, match=r"loss became (nan|inf) in epoch 1, chunk 1, batch \d"):
        trainer(records, config).run()


@every_shape
@pytest.mark.parametrize("threads", [2, 3])
def test_several_threads_train_to_the_same(records, shape, threads):
    """Up to the order of sums; the same number of threads gives the same bits."""
    config = replace(CONFIG, threads=threads)
    alone, first, second = (trainer(records, c, **shape) for c in (CONFIG, config, config))
    losses = [[loss for _, loss in trained.run().losses] for trained in (alone, first, second)]
    assert losses[1] == losses[2]
    assert_same(state(first), state(second))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_more_threads_than_requests(records):
    config = replace(CONFIG, threads=3, batch_rows=2)
    few = trainer(records, config).run().losses
    alone = trainer(records, replace(config, threads=1)).run().losses
    np.testing.assert_allclose([x for _, x in few], [x for _, x in alone], rtol=2e-2)


@every_shape
def test_bfloat16_products_train_to_nearly_the_same(records, shape):
    exact = trainer(records, **shape).run()
    fast = trainer(records, replace(CONFIG, precision="bfloat16"), **shape).run()
    losses = [np.array([loss for _, loss in progress.losses]) for progress in (exact, fast)]
    assert not np.array_equal(*losses)
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)


def test_the_best_epoch_is_kept(records, later):
    """At these rates later epochs are worse on new requests; the best one is not the last."""
    config = replace(CONFIG, epochs=6, learning_rate=0.1, sparse_learning_rate=1.0)
    watched = trainer(records, config, validation=later)
    progress = watched.run()
    best = int(np.argmin(progress.validation))
    assert best == len(progress.validation) - 2 < 4, "it stops at the first that is no better"
    predictions = predict(watched.ranker, SCHEMA, RecordFiles.open([later]))
    p = predictions.probability.clip(1e-7, 1 - 1e-7).astype(np.float64)
    loss = -np.where(predictions.clicked, np.log(p), np.log1p(-p)).mean()
    assert loss == pytest.approx(progress.validation[best], rel=1e-6)


def test_the_best_epoch_survives_a_stop(records, later, tmp_path):
    config = replace(CONFIG, epochs=4, learning_rate=0.1, sparse_learning_rate=1.0)
    whole = trainer(records, config, validation=later)
    assert np.argmin(whole.run().validation) < 3

    def interrupt(progress, _loss):
        if progress.epoch == 1:
            raise StoppedError

    path = tmp_path / "state.safetensors"
    with pytest.raises(StoppedError):
        trainer(records, config, validation=later).run(path, interrupt)
    resumed = trainer(records, config, validation=later)
    resumed.run(path)
    assert_same(state(resumed), state(whole))


@every_shape
def test_training_on_a_weight_is_training_on_the_request_as_often(records, tmp_path, shape):
    """In one batch a step, whose order does not matter."""
    config = replace(CONFIG, epochs=4, batch_rows=10**6, chunk_groups=100)
    weights = np.random.default_rng(0).integers(1, 4, 80)
    weighted = with_weights(records, weights, tmp_path / "weighted.parquet")
    repeated = tmp_path / "repeated.parquet"
    table = pq.read_table(records)
    pq.write_table(table.take(pa.array(np.repeat(np.arange(80), weights))), repeated)
    losses = [
        [loss for _, loss in trainer(path, config, **shape).run().losses]
        for path in (weighted, repeated, records)
    ]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert abs(losses[0][-1] / losses[2][-1] - 1) > 1e-3


def test_weights_of_1_change_nothing(records, tmp_path):
    weighted = with_weights(records, np.ones(80), tmp_path / "weighted.parquet")
    first, second = trainer(records), trainer(weighted)
    assert first.run().losses == second.run().losses
    assert_same(state(first), state(second))


def test_weights_are_of_no_use_to_predictions(records, tmp_path):
    weighted = with_weights(records, np.full(80, 5), tmp_path / "weighted.parquet")
    plain, same = (
        predict(tiny_ranker(), SCHEMA, RecordFiles.open([path])) for path in (records, weighted)
    )
    assert plain.probability.tolist() == same.probability.tolist()


def test_without_a_validation_week_the_last_epoch_is_kept(records):
    assert trainer(records).run().validation == []


def test_predictions_are_in_the_order_of_the_files(records):
    ranker = tiny_ranker()
    predictions = predict(ranker, SCHEMA, RecordFiles.open([records, records]))
    table = pq.read_table(records)
    clicked = [click for clicks in table["clicked"].to_pylist() for click in clicks]
    assert predictions.clicked.tolist() == clicked * 2
    assert predictions.lengths.tolist() == [len(c) for c in table["clicked"].to_pylist()] * 2
    histories = [len(h) > 0 for h in table["purchase_history"].to_pylist()]
    assert predictions.with_history.tolist() == histories * 2
    half = len(clicked)
    np.testing.assert_allclose(
        predictions.probability[:half], predictions.probability[half:], atol=1e-6
    )


def test_seeded_weights_leave_the_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with seeded(5):
        first = torch.rand(2)
    assert torch.rand(3).equal(expected)
    with seeded(5):
        assert torch.rand(2).equal(first)
