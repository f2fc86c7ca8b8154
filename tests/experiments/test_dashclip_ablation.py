import json
from dataclasses import replace

import pytest
from tiny_dashclip import tiny_catalog, tiny_dashclip

from embeddings.config import (
    AlignmentConfig,
    CroppingConfig,
    DashClipTraining,
    PretrainingConfig,
    StartConfig,
)
from embeddings.sampling import SamplingConfig
from experiments.dashclip_ablation import ablation, variants_of
from features.errors import BadInputError

pytestmark = pytest.mark.filterwarnings("ignore:.*distutils:DeprecationWarning")  # tensorboard


PAPERS = AlignmentConfig(
    shared_negatives=False, symmetric=False, mined_products=0, sampling=SamplingConfig(proxies=True)
)


def config_of(start):
    return DashClipTraining(
        start=StartConfig(checkpoint=str(start)),
        pretraining=PretrainingConfig(epochs=1, batch=8, queue=8, held_out=0.3),
        cropping=CroppingConfig(batch=8),
        alignment=replace(PAPERS, epochs=1, batch=8, learning_rate=1e-3),
        precision="float32",
        threads=1,
    )


def test_each_variant_changes_one_thing():
    base = DashClipTraining(alignment=PAPERS)
    found = variants_of(base)
    assert list(found) == [
        *("base", "no-stage-1", "no-matching", "no-momentum", "no-averaging", "no-proxies"),
        *("frozen-0-of-12", "frozen-4-of-12", "frozen-8-of-12", "shared-negatives", "symmetric"),
        "mined-products",
    ]
    assert found["frozen-8-of-12"] == found["base"] == base
    assert found["no-stage-1"].pretraining.epochs == found["no-stage-1"].cropping.epochs == 0
    assert not found["no-matching"].pretraining.matching
    assert found["no-momentum"].pretraining.momentum == 0
    assert not found["no-proxies"].alignment.sampling.proxies
    for name, layers in (("frozen-0-of-12", 0), ("frozen-4-of-12", 4)):
        stages = (found[name].pretraining, found[name].cropping, found[name].alignment)
        assert [round(12 * stage.frozen_layers) for stage in stages] == [layers] * 3
    assert found["shared-negatives"].alignment.shared_negatives
    changed = {name for name, config in found.items() if config.pretraining != base.pretraining}
    assert changed == {
        *("no-stage-1", "no-matching", "no-momentum", "frozen-0-of-12", "frozen-4-of-12")
    }


def test_a_base_that_has_a_part_is_compared_with_one_that_does_not():
    changed = replace(
        PAPERS, shared_negatives=True, symmetric=True, sampling=SamplingConfig(proxies=False)
    )
    found = variants_of(DashClipTraining(alignment=changed))
    assert found["proxies"].alignment.sampling.proxies
    assert not found["own-negatives"].alignment.shared_negatives
    assert not found["one-way"].alignment.symmetric
    assert not {"symmetric", "shared-negatives", "no-proxies"} & set(found)


def test_variants_are_trained_compared_and_kept(tmp_path, capsys):
    data, output = tiny_catalog(tmp_path / "data"), tmp_path / "out"
    config = config_of(tiny_dashclip(tmp_path / "tiny"))
    document = ablation(data, output, config=config, variants=["no-proxies"], command="the command")
    assert [row["name"] for row in document["rows"]] == ["untrained start", "base", "no-proxies"]
    start, base, no_proxies = document["rows"]
    assert start["title_recall"] is None
    assert start["seconds"] == {}
    for row in (base, no_proxies):
        before, after = row["title_recall"]["image_to_title_recall_at_10"]
        assert 0 <= before <= 1
        assert 0 <= after <= 1
        assert set(row["seconds"]) == {"stage 1", "stage 2"}
    for row in document["rows"]:
        graded = row["retrieval"]["graded_relevance"]
        assert graded["interval"][0] <= graded["mean"] <= graded["interval"][1]
        assert len(row["aisle_macro_f1"]["values"]) == 3
    means = [row["retrieval"]["ndcg"]["mean"] for row in (base, no_proxies)]
    difference = no_proxies["retrieval"]["ndcg"]["difference"]
    assert difference["mean"] == pytest.approx(means[1] - means[0])
    assert base["retrieval"]["ndcg"]["difference"] is None
    assert (document["products"], document["aisle_products"], document["aisles"]) == (24, 24, 4)
    assert json.loads((output / "ablation.json").read_text()) == document

    # Stage 1 is the base's own: not a second of it was spent again.
    assert no_proxies["seconds"]["stage 1"] == base["seconds"]["stage 1"]
    toml = (output / "no-proxies" / "training.toml").read_text()
    assert "proxies = false" in toml

    trained = {path: path.stat().st_mtime_ns for path in output.glob("*/model.safetensors")}
    again = ablation(data, output, config=config, variants=["symmetric"])
    assert [row["name"] for row in again["rows"]][1:] == ["base", "no-proxies", "symmetric"]
    assert again["rows"][:3] == document["rows"]
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    markdown = (output / "ablation.md").read_text()
    assert "| no-proxies |" in markdown
    assert "no setting was chosen by this table" in markdown
    assert "symmetric" in capsys.readouterr().out


def test_without_images_what_concerns_them_is_the_base(tmp_path):
    data, output = tiny_catalog(tmp_path / "data", images=False), tmp_path / "out"
    config = config_of(tiny_dashclip(tmp_path / "tiny", images=False))
    names = ["no-matching", "no-momentum", "no-stage-1", "no-averaging", "frozen-8-of-12"]
    document = ablation(data, output, config=config, variants=names)
    assert document["same_as_base"] == ["no-matching", "no-momentum", "frozen-8-of-12"]
    base, no_stage_1, no_averaging = document["rows"][1:]
    assert set(base["seconds"]) == {"title crops", "stage 2"}
    assert set(no_stage_1["seconds"]) == {"stage 2"}
    assert base["title_recall"] is None
    assert set(no_averaging["seconds"]) == {"title crops", "stage 2"}
    assert no_averaging["retrieval"] != base["retrieval"]


def test_a_folder_of_another_base_is_refused(tmp_path):
    data, output = tiny_catalog(tmp_path / "data", images=False), tmp_path / "out"
    start = tiny_dashclip(tmp_path / "tiny", images=False)
    ablation(data, output, config=config_of(start), variants=["frozen-8-of-12"])
    other = DashClipTraining(
        start=StartConfig(checkpoint=str(start)),
        alignment=AlignmentConfig(sampling=SamplingConfig(negatives=3)),
    )
    with pytest.raises(BadInputError, match="base: holds another run"):
        ablation(data, output, config=other)
    with pytest.raises(BadInputError, match=r"unknown variant 'frozen-9'; known: base, no-stage-1"):
        ablation(data, output, config=other, variants=["frozen-9"])
