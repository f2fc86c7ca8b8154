"""A training that is killed and goes on, or runs in two processes, ends as one that did neither."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_dashclip import tiny_catalog, tiny_dashclip

from embeddings.config import (
    AlignmentConfig,
    DashClipTraining,
    PretrainingConfig,
    StartConfig,
)
from embeddings.sampling import SamplingConfig
from embeddings.train import train_dashclip
from features.config_file import to_toml

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "dashclip_processes.py"


def configuration(folder, *, dropout=0.0, images=True, pretraining=None, alignment=None):
    start = tiny_dashclip(folder / f"start-{dropout}-{images}", dropout=dropout, images=images)
    return DashClipTraining(
        start=StartConfig(checkpoint=str(start)),
        pretraining=PretrainingConfig(
            **{"epochs": 3, "batch": 8, "queue": 16, "held_out": 0.2} | (pretraining or {})
        ),
        alignment=AlignmentConfig(**{"epochs": 2, "batch": 16} | (alignment or {})),
        precision="float32",
        threads=1,
        checkpoint_seconds=0.0,
    )


def figures(folder):
    found = json.loads((folder / "training.json").read_text())
    for stage in found["stages"]:
        del stage["seconds"], stage["pairs_per_second"]
    del found["peak_rss_mb"], found["command"], found["processes"]
    return found


VARIANTS = {
    "photos-paper": {
        "alignment": {
            "shared_negatives": False,
            "symmetric": False,
            "mined_products": 0,
            "sampling": SamplingConfig(proxies=True),
        },
    },
    "photos-further": {
        "pretraining": {"momentum": 0.0},
        "alignment": {"accumulate": 2, "mined_products": 0},
    },
    "texts": {"images": False, "alignment": {"mined_products": 0}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `dashclip_processes` leaves behind."""
    folder = tmp_path_factory.mktemp("processes")
    tiny_catalog(folder / "texts", products=30, images=False)
    tiny_catalog(
        folder / "photos", products=30, without_image=(1, 7), without_title=(2,), broken=(4,)
    )
    (folder / "killed.toml").write_text(to_toml(configuration(folder, dropout=0.1)))
    for name, changes in VARIANTS.items():
        config = configuration(folder, **changes)
        (folder / f"pair-{name}.toml").write_text(to_toml(config))
    done = subprocess.run(
        [sys.executable, PROGRAM, folder],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    printed = [path.read_text() for path in sorted(folder.glob("rank-*.txt"))]
    assert done.returncode == 0, (done.stderr, *printed)
    return folder


def test_killed_at_many_moments(folder):
    killed = json.loads((folder / "killed.json").read_text())
    assert "stage 1 has begun" in killed
    assert "stage 2 has begun" in killed
    assert len(killed) >= 4
    whole, pieces = folder / "whole", folder / "pieces"
    assert (pieces / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert figures(pieces) == figures(whole)
    assert figures(whole)["broken_images"] == 1
    assert {path.name for path in pieces.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_train_what_one_does(folder, variant):
    one = configuration(folder, **VARIANTS[variant])
    alone, both = folder / f"{variant}-alone", folder / f"pair-{variant}"
    train_dashclip(folder / variant.split("-")[0], alone, config=one)
    assert json.loads((both / "training.json").read_text())["processes"] == 2
    for stage, expected in zip(figures(both)["stages"], figures(alone)["stages"], strict=True):
        assert stage["examples"] == expected["examples"]
        for found, loss in zip(stage["losses"], expected["losses"], strict=True):
            assert found == pytest.approx(loss, rel=1e-4)
    compare(load_file(alone / "start" / "model.safetensors"), both, alone)


def test_only_the_first_process_speaks(folder):
    assert (folder / "rank-1.txt").read_text() == ""
    said = (folder / "rank-0.txt").read_text()
    for once, times in (("training on", 3), ("stage 1, after epoch 3", 2), ("peak memory", 3)):
        assert said.count(once) == times, once


def compare(start, both, alone):
    """Weights differ by a thousandth of the way that training moved them, at most."""
    trained, expected = (load_file(folder / "model.safetensors") for folder in (both, alone))
    for name, weight in expected.items():
        if name.endswith(("key.bias", "qkv.bias")):
            continue  # a key's bias has no gradient but rounding, which Adam makes steps of
        moved = (weight - start[name]).norm()
        assert (trained[name] - weight).norm() <= 2e-3 * moved, name
