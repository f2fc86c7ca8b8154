"""Bundles: what comes back is what was saved, and what is wrong with one in a sentence."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_ranker import changed, tiny_config, write_tiny_tables

from embeddings.tables import EmbeddingTable, write_table
from features.batch import RecordFiles, RequestBatch
from features.errors import BadInputError
from features.manifest import RequestsManifest
from features.schema import DatasetSchema
from ranking.bundle import Bundle, PretrainedTables
from ranking.ranker import Ranker
from ranking.run import TrainingData
from ranking.training import Trainer, predict, seeded

NEW_PRODUCT = 777_777
MODELS = {
    "frozen": {},
    "no history": {"purchase_history": False},
    "history counts": {"history_counts": True},
    "random": {"tables": "random"},
    "fine-tuned": {"tables": "fine-tuned"},
    "full rank": {"cross_rank": 0},
    "dcn": {"embedding_tower": False},
}


def trained_bundle(data: Path, table_folder: Path, **model: object) -> Bundle:
    config = tiny_config(training={"epochs": 1, "evaluate_week": 6, "train_weeks": 5}, **model)
    schema, manifest = DatasetSchema.load(data), RequestsManifest.load(data / "requests")
    split = TrainingData.plan(schema, manifest, config)
    read = PretrainedTables.read(table_folder) if config.model.embedding_tower else None
    with seeded(0):
        content = read.content if read else None
        ranker = Ranker(config.model, *split.fit_transforms(config), content)
    Trainer(ranker, schema, split.train_files(), split.train_rows(), config.training).run()
    return Bundle(
        ranker=ranker,
        schema=schema,
        config=config,
        window_days=84,
        history_cap=1000,
        table_fingerprint=read.fingerprint if read else "",
        provenance={"data_fingerprint": manifest.fingerprint},
    )


@pytest.fixture(scope="module")
def bundle(ranker_data, random_tables):
    """A trained two-tower model over frozen tables; read only."""
    return trained_bundle(ranker_data, random_tables)


@pytest.fixture(scope="module")
def counting(ranker_data, random_tables, tmp_path_factory):
    """The folder of a bundle whose model counts in the history; read only."""
    folder = tmp_path_factory.mktemp("counting") / "bundle"
    trained_bundle(ranker_data, random_tables, history_counts=True).save(folder)
    return folder


@pytest.fixture
def saved(bundle, tmp_path):
    bundle.save(tmp_path / "bundle")
    return tmp_path / "bundle"


def evaluation_batch(data):
    records = pq.read_table(data / "requests" / "week-0006.parquet")
    return RequestBatch.from_records(records, DatasetSchema.load(data))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_a_bundle_scores_bit_for_bit_as_what_was_trained(
    ranker_data, random_tables, tmp_path, model
):
    trained = trained_bundle(ranker_data, random_tables, **model)
    trained.save(tmp_path / "bundle")
    opened = Bundle.open(tmp_path / "bundle")
    batch = evaluation_batch(ranker_data)
    expected = trained.ranker.score(batch)
    assert expected.std() > 0.01
    assert opened.ranker.score(batch).equal(expected)
    for name in ("schema", "config", "window_days", "history_cap", "table_fingerprint"):
        assert getattr(opened, name) == getattr(trained, name), name
    assert opened.provenance == trained.provenance
    files = RecordFiles.open([ranker_data / "requests" / "week-0006.parquet"])
    predictions = predict(opened.ranker, opened.schema, files)
    np.testing.assert_allclose(predictions.probability, expected.numpy(), atol=1e-6)


def test_saving_what_was_opened_gives_the_same_files(saved, tmp_path):
    Bundle.open(saved).save(tmp_path / "again")
    for name in ("bundle.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes(), name


def test_saving_replaces_an_older_bundle(bundle, saved):
    replace(bundle, history_cap=7).save(saved)
    assert Bundle.open(saved).history_cap == 7
    assert sorted(path.name for path in saved.parent.iterdir()) == ["bundle"]


def test_float16_tables_stay_float16(saved):
    weight = Bundle.open(saved).ranker.pretrained.embedding_bags["product"].weight
    assert weight.dtype == torch.float16


# Newer tables.


def test_the_same_tables_change_nothing(saved, random_tables, ranker_data):
    batch = evaluation_batch(ranker_data)
    opened = Bundle.open(saved, tables=random_tables)
    assert opened.ranker.score(batch).equal(Bundle.open(saved).ranker.score(batch))


def test_a_newer_table_is_counted_with(counting, ranker_data, tmp_path):
    newer = write_tiny_tables(tmp_path / "newer", more_products=[NEW_PRODUCT])
    batch = evaluation_batch(ranker_data)
    old, new = Bundle.open(counting).ranker, Bundle.open(counting, tables=newer).ranker
    torch.testing.assert_close(old.score(batch), new.score(batch), rtol=0, atol=1e-6)
    request = int(batch.history_lengths.argmax())
    place = int(batch.history_lengths[:request].sum())
    bought = changed(batch, history=batch.history.clone())
    bought.history[place] = NEW_PRODUCT
    unknown = changed(batch, history=batch.history.clone())
    unknown.history[place] = NEW_PRODUCT + 1
    torch.testing.assert_close(old.score(bought), old.score(unknown), rtol=0, atol=0)
    affected = (new.score(bought) != new.score(unknown)).nonzero().flatten().tolist()
    first = int(batch.lengths[:request].sum())
    assert affected == list(range(first, first + int(batch.lengths[request])))


def test_a_newer_table_scores_new_products(saved, ranker_data, tmp_path):
    newer = write_tiny_tables(tmp_path / "newer", more_products=[NEW_PRODUCT])
    batch = evaluation_batch(ranker_data)
    product = batch.product.clone()
    product[0] = NEW_PRODUCT
    known = changed(batch, product=product)
    unknown = product.clone()
    unknown[0] = NEW_PRODUCT + 1
    without = changed(batch, product=unknown)
    old, new = Bundle.open(saved).ranker, Bundle.open(saved, tables=newer).ranker
    torch.testing.assert_close(old.score(batch), new.score(batch), rtol=0, atol=1e-6)
    assert old.score(known)[0] == old.score(without)[0]
    assert new.score(known)[0] != new.score(without)[0]
    torch.testing.assert_close(new.score(without), old.score(without), rtol=0, atol=1e-6)


def test_tables_of_another_encoder_are_refused_unless_allowed(saved, ranker_data, tmp_path):
    other = write_tiny_tables(tmp_path / "other", seed=1, fingerprint="other")
    with pytest.raises(BadInputError, match="of encoder other, the bundle was trained with tiny"):
        Bundle.open(saved, tables=other)
    opened = Bundle.open(saved, tables=other, allow_other_tables=True)
    batch = evaluation_batch(ranker_data)
    assert not opened.ranker.score(batch).equal(Bundle.open(saved).ranker.score(batch))


@pytest.mark.parametrize("allow", [True, False])
def test_tables_of_another_dimension_are_always_refused(saved, tmp_path, allow):
    other = write_tiny_tables(tmp_path / "other", dim=12)
    with pytest.raises(BadInputError, match="dimension 12, the bundle was trained with 8"):
        Bundle.open(saved, tables=other, allow_other_tables=allow)


@pytest.mark.parametrize("model", [{"tables": "random"}, {"embedding_tower": False}])
def test_models_without_frozen_tables_take_none(ranker_data, random_tables, tmp_path, model):
    trained_bundle(ranker_data, random_tables, **model).save(tmp_path / "bundle")
    with pytest.raises(BadInputError, match="does not read frozen tables"):
        Bundle.open(tmp_path / "bundle", tables=random_tables)


def write_one(folder, name, ids, dim=8, fingerprint="tiny"):
    vectors = np.zeros((len(ids), dim), np.float32)
    table = EmbeddingTable(ids=ids, embedding=vectors, fingerprint=fingerprint, normalized=False)
    write_table(folder / f"{name}.parquet", table)


@pytest.mark.parametrize(
    ("product", "query", "sentence"),
    [
        ({"fingerprint": "one"}, {"fingerprint": "two"}, "of encoder one .* of two; both must be"),
        ({"dim": 4}, {"dim": 8}, "has dimension 4 and query.parquet 8; both must be the same"),
        ({"ids": pa.array(["7"])}, {}, "product.parquet: column 'id' is string, expected int64"),
        ({}, {"ids": pa.array([7])}, "query.parquet: column 'id' is int64, expected string"),
    ],
)
def test_tables_that_do_not_fit_each_other_are_refused(tmp_path, product, query, sentence):
    write_one(tmp_path, "product", **{"ids": pa.array([7])} | product)
    write_one(tmp_path, "query", **{"ids": pa.array(["tea"])} | query)
    with pytest.raises(BadInputError, match=sentence):
        PretrainedTables.read(tmp_path)


def test_a_missing_table_is_named(tmp_path):
    write_one(tmp_path, "product", ids=pa.array([7]))
    with pytest.raises(BadInputError, match=r"query\.parquet: no such embedding table"):
        PretrainedTables.read(tmp_path)


# Damage.


def test_no_bundle_there(tmp_path):
    with pytest.raises(BadInputError, match=r"no bundle there \(no bundle\.json\)"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", r"bundle\.json: not valid JSON"),
        ("[]", r"bundle\.json: format None, this version reads 1"),
        ("{}", r"bundle\.json: format None, this version reads 1"),
        ('{"format": 2}', r"bundle\.json: format 2, this version reads 1"),
        ('{"format": 1}', r"bundle\.json: lacks 'schema'"),
    ],
)
def test_a_damaged_description_is_named(saved, text, sentence):
    (saved / "bundle.json").write_text(text)
    with pytest.raises(BadInputError, match=sentence):
        Bundle.open(saved)


def test_tensors_that_are_gone_cut_or_foreign_are_named(saved):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(BadInputError, match=r"model\.safetensors: damaged"):
        Bundle.open(saved)
    path.write_bytes(b"")
    with pytest.raises(BadInputError, match=r"model\.safetensors: damaged"):
        Bundle.open(saved)
    path.unlink()
    with pytest.raises(BadInputError, match=r"model\.safetensors: no such file"):
        Bundle.open(saved)


def test_a_file_of_tensors_of_somebody_else_is_named(saved):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, saved / "model.safetensors")
    with pytest.raises(BadInputError, match="not written by this project"):
        Bundle.open(saved)


def test_a_description_of_another_model_is_named(saved):
    path = saved / "bundle.json"
    description = json.loads(path.read_text())
    wider = json.loads(path.read_text())
    wider["config"]["model"]["deep"] = [9, 6]
    path.write_text(json.dumps(wider))
    with pytest.raises(BadInputError, match=r"has shape \(8, \d+\), expected \(9, \d+\)"):
        Bundle.open(saved)
    renamed = description["schema"].replace('"store"', '"shop"')
    path.write_text(json.dumps(description | {"schema": renamed}))
    with pytest.raises(BadInputError, match="lacks tensor 'request/vocabulary/shop'"):
        Bundle.open(saved)
