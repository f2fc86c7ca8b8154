"""``export-ranker``: the gate, the command, the compiled float model."""

import json
import shutil

import numpy as np
import pytest
import torch

import serving.parity
from features.errors import BadInputError
from ranking.bundle import Bundle
from ranking.explain_sample import Week
from serving.compiled import load_compiled
from serving.embedding_table import EmbeddingTable
from serving.export import ExportConfig, export_ranker
from serving.export_cli import main
from serving.exported import ExportedRanker
from serving.inputs import InputSpec
from serving.manifest import MANIFEST, PT2, TORCHSCRIPT
from serving.parity import Bounds, Sample, Scores, compare, require_parity


@pytest.fixture(scope="module")
def run(tiny_exported):
    return tiny_exported.parent / "run"


def export(run, data, output, *more):
    return main(
        ["--run", str(run), "--data", str(data), "--output", str(output), "--no-pt2", *more]
    )


def test_manifest_tells_the_parity(tiny_exported):
    document = json.loads((tiny_exported / MANIFEST).read_text())
    forms = {form["form"]: form for form in document["parity"]["forms"]}
    assert list(forms) == ["quantised", "scripted", "loaded"]
    assert all(form["passed"] for form in forms.values())
    assert 0 < forms["quantised"]["largest_difference"] < 0.05
    assert forms["loaded"]["largest_difference"] < 1e-6
    edges = {"unknown ids", "missing values", "empty histories", "no candidates"}
    assert edges | {"one candidate", "1,000 candidates"} < forms["loaded"]["differences"].keys()
    assert document["sizes"]["tables"] < document["sizes"]["tables_float32"]
    assert document["files"][TORCHSCRIPT]["bytes"] == (tiny_exported / TORCHSCRIPT).stat().st_size


@pytest.mark.parametrize("tables", ["float32", "int4"])
def test_other_table_types(tables, run, ranker_data, tmp_path, capsys):
    assert export(run, ranker_data, tmp_path / "out", "--tables", tables) == 0
    ranker = ExportedRanker.open(tmp_path / "out")
    assert ranker.manifest.table_dtype == tables
    assert tables in capsys.readouterr().out
    ranker.check_golden()


def test_a_table_out_of_bounds_is_not_written(run, ranker_data, tmp_path, monkeypatch, capsys):
    """A quantised table with one wrong byte a row: the gate sees it, and nothing is there."""
    pack = serving.embedding_table._packed

    def wrong(weight, dtype):
        packed = pack(weight, dtype)
        if dtype == "int8":
            packed.view(len(weight), -1)[:, 5] ^= 0x80
        return packed

    monkeypatch.setattr(serving.embedding_table, "_packed", wrong)
    assert export(run, ranker_data, tmp_path / "out") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("export-ranker: not exported: the quantised model differs")
    assert not list(tmp_path.iterdir())


def test_an_earlier_export_survives_a_failed_one(run, ranker_data, tmp_path, monkeypatch):
    export(run, ranker_data, tmp_path / "out")
    before = (tmp_path / "out" / MANIFEST).read_bytes()
    bounds = dict.fromkeys(serving.parity.BOUNDS, Bounds(0, 0))
    monkeypatch.setattr("serving.export.BOUNDS", bounds)
    with pytest.raises(BadInputError, match="at most 0"):
        export_ranker(run, ranker_data, tmp_path / "out", ExportConfig(pt2=False))
    assert (tmp_path / "out" / MANIFEST).read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": "nowhere"}, "not a finished run"),
        ({"data": "nowhere"}, "nowhere"),
        ({"requests": "0"}, "'requests' must be 1 or more, got 0"),
    ],
)
def test_bad_input_is_one_sentence(change, message, run, ranker_data, tmp_path, capsys):
    options = {"run": str(run), "data": str(ranker_data), "output": str(tmp_path / "out")} | change
    assert main([part for k, v in options.items() for part in (f"--{k}", v)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_compare_by_hand():
    clicked = np.array([True, False, True, False])
    expected = Scores(real=np.array([0.9, 0.1, 0.8, 0.2], np.float32), edges={"edge": np.zeros(2)})
    found = Scores(real=np.array([0.9, 0.85, 0.8, 0.2], np.float32), edges={"edge": np.ones(2) / 2})
    row = compare("other", found, "eager", expected, clicked, Bounds(1, 0.2))
    assert row["auc"] == 0.75  # 3 of 4 pairs in order
    assert row["auc_change"] == -0.25
    assert row["differences"] == {"evaluation requests": 0.75, "edge": 0.5}
    assert not row["passed"]
    with pytest.raises(BadInputError, match=r"0\.75 in probability \(evaluation requests; at most"):
        require_parity([row])
    not_a_number = Scores(real=found.real * np.nan, edges=expected.edges)
    with pytest.raises(ValueError, match="NaN"):
        compare("none", not_a_number, "eager", expected, clicked, Bounds(1, 1))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile ranker.pt2 with")
def test_compiled_model(run, ranker_data, tmp_path):
    """One compiled model takes any number of requests, candidates and purchases."""
    manifest = export_ranker(run, ranker_data, tmp_path / "out", ExportConfig())
    forms = {form["form"]: form for form in manifest.parity["forms"]}
    assert forms["pt2"]["passed"]
    score = load_compiled(tmp_path / "out" / PT2)
    week = Week.open(run, ranker_data)
    sample = Sample.of(week.records(), week.bundle.schema)
    ranker = Bundle.open(run / "bundle").ranker
    for batch in (sample.batches[0], *sample.edges.values()):
        with torch.no_grad():
            torch.testing.assert_close(score(batch), ranker.score(batch), atol=1e-3, rtol=0)


def test_inputs_from_json_are_checked():
    with pytest.raises(BadInputError, match="'inputs' lacks a list 'request'"):
        InputSpec.from_json("here", {"candidate": []})
    entry = {"name": "a", "kind": "sparse", "type": "text"}
    with pytest.raises(BadInputError, match="'type' must be one of int64, string, float32"):
        InputSpec.from_json("here", {"request": [entry], "candidate": []})


def test_rows_are_counted_in_every_type():
    for dtype in ("float32", "float16", "int8", "int4"):
        assert EmbeddingTable(torch.randn(7, 16), dtype).number_of_rows() == 7
