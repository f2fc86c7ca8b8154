"""An exported ranker gives the trained ranker's probabilities, or does not load."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from features.batch import RecordFiles, RequestBatch
from features.errors import BadInputError
from ranking.bundle import Bundle
from serving.exported import ExportedRanker
from serving.manifest import GOLDEN, MANIFEST, TORCHSCRIPT


@pytest.fixture(scope="module")
def ranker(tiny_exported):
    return ExportedRanker.open(tiny_exported)


@pytest.fixture
def copy(tiny_exported, tmp_path):
    return shutil.copytree(tiny_exported, tmp_path / "export")


def real_batch(bundle, data):
    week = bundle.config.training.evaluate_week
    files = RecordFiles.open([data / "requests" / f"week-{week:04}.parquet"])
    return RequestBatch.from_records(next(files.chunks(1)), bundle.schema)


def test_scores_are_the_trained_rankers(ranker, tiny_exported, ranker_data):
    bundle = Bundle.open(tiny_exported.parent / "run" / "bundle")
    batch = real_batch(bundle, ranker_data)
    assert len(batch.product) > 100
    assert np.abs(ranker.score(batch) - bundle.ranker.score(batch).numpy()).max() < 0.01


def test_golden_requests_come_out(ranker):
    ranker.check_golden()
    names = {golden.name for golden in ranker.golden}
    assert {"empty history", "no candidates", "one candidate", "request 1"} <= names


def test_tables_are_mapped_from_the_file(ranker, tiny_exported):
    table = ranker.module.core.pretrained.product.weight
    mapped = (tiny_exported / TORCHSCRIPT).resolve()
    assert str(mapped) in Path("/proc/self/maps").read_text()
    place = ranker.manifest.shared_tables["core.pretrained.product.weight"]
    content = (tiny_exported / TORCHSCRIPT).read_bytes()
    stored = content[place["offset"] : place["offset"] + place["bytes"]]
    assert table.numpy().tobytes() == stored


@pytest.mark.parametrize("name", [TORCHSCRIPT, GOLDEN])
def test_changed_file_is_refused(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BadInputError, match=f"{name}.*SHA-256"):
        ExportedRanker.open(copy)


def test_missing_file_is_refused(copy):
    (copy / TORCHSCRIPT).unlink()
    with pytest.raises(BadInputError, match=r"ranker.pt: is missing"):
        ExportedRanker.open(copy)


def test_changed_manifest_is_refused(copy):
    document = json.loads((copy / MANIFEST).read_text())
    document["history_cap"] += 1
    (copy / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(BadInputError, match="fingerprint"):
        ExportedRanker.open(copy)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', '{"format": 99}'])
def test_no_manifest_is_refused(copy, content):
    (copy / MANIFEST).write_text(content)
    with pytest.raises(BadInputError, match=r"manifest\.json"):
        ExportedRanker.open(copy)


def test_other_answers_are_refused(ranker):
    golden = ranker.golden[0]
    wrong = [probability + 1e-3 for probability in golden.probabilities]
    other = ExportedRanker(
        manifest=ranker.manifest,
        golden=(type(golden)(**{**_fields(golden), "probabilities": wrong}),),
        module=ranker.module,
    )
    with pytest.raises(BadInputError, match=r"golden request 'request 1'.*0\.001"):
        other.check_golden()


def _fields(golden):
    return {name: getattr(golden, name) for name in ("name", "request", "titles")}


def test_raw_values_by_name_give_the_same(ranker):
    """The way of clients without Python: texts are hashed within the model."""
    for golden in ranker.golden:
        raw, inputs = golden.request, ranker.manifest.inputs
        ids, strings, values = {}, {}, {}
        request = {name: [value] for name, value in raw["features"].items()}
        columns = request | raw["candidates"].get("features", {})
        for item in (*inputs.request, *inputs.candidate):
            column = columns.get(item.name)
            if column is None:
                continue
            if item.type == "string":
                strings[item.name] = column
            elif item.type == "int64":
                ids[item.name] = torch.tensor(
                    [-(1 << 63) if v is None else v for v in column], dtype=torch.int64
                )
            else:
                values[item.name] = torch.tensor(
                    [np.nan if v is None else v for v in column], dtype=torch.float32
                )
        with torch.inference_mode():
            found = ranker.module(
                [raw["query"]],
                torch.tensor([len(raw["candidates"]["product_id"])]),
                torch.tensor(raw["candidates"]["product_id"], dtype=torch.int64),
                torch.tensor(raw["history"], dtype=torch.int64),
                torch.tensor(raw["history_age_days"], dtype=torch.int16),
                torch.tensor([len(raw["history"])]),
                ids,
                strings,
                values,
            )
        np.testing.assert_allclose(found.numpy(), golden.probabilities, atol=1e-6)
