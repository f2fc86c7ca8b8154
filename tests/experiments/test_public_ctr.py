"""The whole public mode on tiny files: cache, resume, comparison with BARS, page and settings."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import public_ctr, public_ctr_config
from experiments.public_ctr import print_public, run_public
from experiments.public_ctr_config import REFERENCES, PublicConfig, reference_for, spread
from features.config_file import from_toml, to_toml
from features.errors import BadInputError

CONFIG = PublicConfig(
    cross_layers=1, deep=(8,), batch_size=32, epochs=2, seeds=(0, 1), threads=1, dropout=0.1
)


def write_folder(folder: Path, rows: int = 120) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in ("train", "valid", "test"):
        codes = rng.integers(0, 5, (rows, 2))
        lines = [f"{(a + b) % 2},{a},{b}" for a, b in codes]
        (folder / f"{split}.csv").write_text("\n".join(["label,user,item", *lines]) + "\n")
    return folder


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that were trained, not taken from an earlier run."""
    seeds = []
    train = public_ctr._train_seed

    def counted(data: Any, config: Any, seed: int, checkpoint: Path) -> dict[str, Any]:
        seeds.append(seed)
        return train(data, config, seed, checkpoint)

    monkeypatch.setattr(public_ctr, "_train_seed", counted)
    return seeds


def test_finished_seeds_are_never_repeated(tmp_path: Path, trained: list[int]) -> None:
    folder, output = write_folder(tmp_path / "data"), tmp_path / "out"
    first = run_public(folder, output, CONFIG)
    text = (output / "public.json").read_bytes(), (output / "public.md").read_bytes()
    assert trained == [0, 1]
    assert run_public(folder, output, CONFIG) == first
    assert ((output / "public.json").read_bytes(), (output / "public.md").read_bytes()) == text
    assert trained == [0, 1]
    more = run_public(folder, output, dataclasses.replace(CONFIG, seeds=(1, 2)))
    assert trained == [0, 1, 2]
    assert more["seeds"][0] == first["seeds"][1]
    assert not list(output.rglob("*.safetensors"))


def test_other_settings_or_data_are_trained_anew(tmp_path: Path, trained: list[int]) -> None:
    folder, output = write_folder(tmp_path / "data"), tmp_path / "out"
    run_public(folder, output, CONFIG)
    run_public(folder, output, dataclasses.replace(CONFIG, threads=2))
    assert trained == [0, 1]
    run_public(folder, output, dataclasses.replace(CONFIG, embedding_l2=0.01))
    assert trained == [0, 1] * 2
    with (folder / "test.csv").open("a") as file:
        file.write("1,3,4\n")
    run_public(folder, output, CONFIG)
    assert trained == [0, 1] * 3


def test_document_has_means_and_facts(tmp_path: Path) -> None:
    document = run_public(write_folder(tmp_path / "data"), tmp_path / "out", CONFIG)
    assert json.loads((tmp_path / "out" / "public.json").read_text()) == json.loads(
        json.dumps(document)
    )
    aucs = [one["auc"] for one in document["seeds"]]
    assert document["metrics"]["auc_mean"] == pytest.approx(np.mean(aucs))
    assert document["metrics"]["auc_std"] == pytest.approx(np.std(aucs, ddof=1))
    assert document["data"]["rows"] == {"train": 120, "valid": 120, "test": 120}
    assert (document["data"]["categorical"], document["data"]["numeric"]) == (2, 0)
    assert document["data"]["table_rows"] == 12  # two fields of five values and an unknown one
    assert document["reference"] is None
    page = (tmp_path / "out" / "public.md").read_text()
    assert "here, mean of 2 seeds" in page
    assert "BARS" not in page


def test_one_seed_has_no_deviation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(CONFIG, seeds=(4,))
    document = run_public(write_folder(tmp_path / "data"), tmp_path / "out", config)
    assert document["metrics"]["auc_std"] is None
    page = (tmp_path / "out" / "public.md").read_text()
    assert f"| here, mean of 1 seed | {document['seeds'][0]['auc']:.5f} |" in page
    print_public(document)
    assert "±" not in capsys.readouterr().out


def test_bars_stands_beside_what_bears_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "frappe-X1")
    document = run_public(folder, tmp_path / "out", CONFIG)
    reference = document["reference"]
    assert reference["name"] == "Frappe_x1"
    assert (
        "its split has 202,027, 57,722, 28,860 rows, this one 120, 120, 120"
        in (reference["differences"])
    )
    assert "its cross_layers is 4, here 1" in reference["differences"]
    page = (tmp_path / "out" / "public.md").read_text()
    assert "| BARS, mean of 5 runs | 0.98382 ± 0.00049 | 0.15204 ± 0.00231 |" in page
    assert "not comparable here" in page
    assert "difference" not in page.split("## Seeds")[0]
    print_public(document)
    shown = capsys.readouterr()
    assert "0.98382 ± 0.00049" in shown.out
    assert "not comparable with BARS: its split" in shown.err

    same = dataclasses.replace(REFERENCES[0], config=CONFIG, rows=(120, 120, 120))
    monkeypatch.setattr(public_ctr_config, "REFERENCES", (same,))
    document = run_public(folder, tmp_path / "out")  # its settings without being asked
    assert document["reference"]["differences"] == []
    gap = document["metrics"]["auc_mean"] - spread(list(same.auc))[0]
    assert f"| difference | {gap:+.5f} |" in (tmp_path / "out" / "public.md").read_text()


@pytest.mark.parametrize(
    ("name", "auc", "auc_std", "log_loss"),
    [
        ("Frappe_x1", 0.98382, 0.00049, 0.15204),
        ("MovielensLatest_x1", 0.96866, 0.00040, 0.21614),
        ("Criteo_x1", 0.81394, 0.00022, 0.43809),
        ("Avazu_x1", 0.76364, 0.00188, 0.36733),
    ],
)
def test_references_have_the_published_means(
    name: str, auc: float, auc_std: float, log_loss: float
) -> None:
    reference = reference_for(name.upper().replace("_", " "))
    assert reference is not None
    assert reference.name == name
    assert spread(reference.auc) == (pytest.approx(auc, abs=5e-6), pytest.approx(auc_std, abs=5e-6))
    assert spread(reference.log_loss)[0] == pytest.approx(log_loss, abs=5e-6)
    assert reference_for("Frappe") is None


def test_settings_survive_toml(tmp_path: Path) -> None:
    for config in (CONFIG, *(one.config for one in REFERENCES)):
        (tmp_path / "public.toml").write_text(to_toml(config))
        assert from_toml(tmp_path / "public.toml", PublicConfig) == config


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seeds": (1, 2, 1)}, "'seeds' names 1 twice"),
        ({"numeric": ("I1", "I1")}, "'numeric' names 'I1' twice"),
        ({"seeds": ()}, "'seeds' must name one or more"),
        ({"deep": ()}, "'deep' must name one or more"),
        ({"deep": (4, 0)}, "'deep' must be 1 or more"),
        ({"dropout": 1.0}, "'dropout' must be below 1"),
        ({"batch_size": 1}, "'batch_size' must be 2 or more"),
        ({"embedding_l2": -0.1}, "'embedding_l2' must be 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        PublicConfig(**wrong)
