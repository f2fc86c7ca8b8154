from dataclasses import replace

import pytest
from safetensors.torch import load_file
from tiny_dashclip import tiny_catalog, tiny_dashclip, tiny_labels

from embeddings.config import (
    AlignmentConfig,
    CroppingConfig,
    DashClipTraining,
    PretrainingConfig,
    StartConfig,
)
from embeddings.train import begin_at_stage_2, train_dashclip
from features.errors import BadInputError

pytestmark = pytest.mark.filterwarnings("ignore:.*distutils:DeprecationWarning")  # tensorboard


@pytest.mark.parametrize("images", [True, False])
def test_a_run_goes_on_from_what_another_had_before_stage_2(tmp_path, images):
    data = tiny_catalog(tmp_path / "data", images=images)
    start = tiny_dashclip(tmp_path / "tiny", images=images)
    base = DashClipTraining(
        start=StartConfig(checkpoint=str(start)),
        pretraining=PretrainingConfig(epochs=1, batch=8, queue=8),
        cropping=CroppingConfig(batch=8),
        alignment=AlignmentConfig(epochs=1, batch=8, symmetric=False, mined_products=0),
        precision="float32",
        threads=1,
    )
    other = replace(base, alignment=replace(base.alignment, symmetric=True))
    first = train_dashclip(data, tmp_path / "base", config=base)
    begin_at_stage_2(tmp_path / "base", tmp_path / "forked", other)
    forked = train_dashclip(data, tmp_path / "forked", config=other)
    alone = train_dashclip(data, tmp_path / "alone", config=other)
    seconds = [figures["stages"][0]["seconds"] for figures in (first, forked)]
    assert seconds[0] == seconds[1]  # it was not trained again
    assert forked["stages"][1]["losses"] == alone["stages"][1]["losses"]
    assert forked["stages"][1]["losses"] != first["stages"][1]["losses"]
    one, same = (load_file(tmp_path / name / "model.safetensors") for name in ("forked", "alone"))
    assert one.keys() == same.keys()
    assert all(one[name].equal(same[name]) for name in one)
    begin_at_stage_2(tmp_path / "base", tmp_path / "forked", other)  # there is nothing to begin
    assert (tmp_path / "forked" / "training.json").exists()


def test_labels_may_differ_too(tmp_path):
    data = tiny_catalog(tmp_path / "data", images=False)
    labels = tiny_labels(data, tmp_path / "labels")
    config = DashClipTraining(
        start=StartConfig(checkpoint=str(tiny_dashclip(tmp_path / "tiny", images=False))),
        cropping=CroppingConfig(batch=8),
        alignment=AlignmentConfig(epochs=1, batch=8, mined_products=0),
        precision="float32",
        threads=1,
    )
    train_dashclip(data, tmp_path / "base", config=config)
    begin_at_stage_2(tmp_path / "base", tmp_path / "forked", config, labels=labels)
    forked = train_dashclip(data, tmp_path / "forked", config=config, labels=labels)
    alone = train_dashclip(data, tmp_path / "alone", config=config, labels=labels)
    assert forked["stages"][1]["losses"] == alone["stages"][1]["losses"]


def test_only_stage_2_may_differ(tmp_path):
    config = DashClipTraining()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "training.toml").write_text("seed = 1\n")
    with pytest.raises(BadInputError, match="base: its configuration differs in more than stage 2"):
        begin_at_stage_2(tmp_path / "base", tmp_path / "new", config)
    assert not (tmp_path / "new").exists()
