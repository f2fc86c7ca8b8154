import json

import pyarrow.parquet as pq
import pytest
import torch
from tiny_dashclip import tiny_catalog, tiny_dashclip, tiny_model

from embeddings.catalog import read_catalog
from embeddings.config import AlignmentConfig, DashClipTraining, PretrainingConfig, StartConfig
from embeddings.relevance import read_relevance
from experiments.dashclip_speed import blip_base, measure_peak, measure_stage, sample_dataset
from experiments.dashclip_throughput import paper_run, throughput
from features.errors import BadInputError


def config_of(start, **changes):
    values = {
        "start": StartConfig(checkpoint=str(start)),
        "pretraining": PretrainingConfig(batch=6, queue=8),
        "alignment": AlignmentConfig(batch=6),
        "precision": "float32",
        "threads": 1,
    }
    return DashClipTraining(**values | changes)


def test_both_stages_and_encoding_are_measured(tmp_path, capsys):
    data = tiny_catalog(tmp_path / "data")
    config = config_of(tiny_dashclip(tmp_path / "tiny"))
    document = throughput(
        data, tmp_path / "out", config=config, steps=2, dollars_an_hour=3.0, peak_side=64
    )
    one, two = document["stages"]
    assert (one["name"], two["name"]) == ("stage 1", "stage 2")
    for stage in (one, two):
        assert (stage["batch"], stage["steps"]) == (6, 2)
        assert stage["pairs_per_second"] == pytest.approx(6 / stage["seconds_per_step"])
        rate = stage["flops_per_pair"] * stage["pairs_per_second"]
        assert stage["flops_per_second"] == pytest.approx(rate)
        peak = document["peak_flops_per_second"]["float32"]
        assert stage["share_of_peak"] == pytest.approx(stage["flops_per_second"] / peak)
        assert stage["frozen_kept"]
    assert all(rate > 0 for rate in document["encoded_per_second"].values())
    seconds = document["seconds_for_400k_products"]["products_text_only"]
    rate = document["encoded_per_second"]["products_text_only"]
    assert seconds == pytest.approx(400_000 / rate)
    assert document["paper_run"]["dollars"] == pytest.approx(
        3 * document["paper_run"]["hours"]["total"]
    )
    assert json.loads((tmp_path / "out" / "throughput.json").read_text()) == document
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["throughput.json"]
    assert document["machine"]["threads"] == 1
    assert "share of the float32 peak" in capsys.readouterr().out


def test_a_catalog_without_images_has_stage_2_only(tmp_path):
    data = tiny_catalog(tmp_path / "data", images=False)
    config = config_of(tiny_dashclip(tmp_path / "tiny", images=False), precision="bfloat16")
    document = throughput(data, tmp_path / "out", config=config, steps=1, peak_side=16)
    assert [stage["name"] for stage in document["stages"]] == ["stage 2"]
    assert document["paper_run"] is None
    assert document["encoded_per_second"]["products_with_image"] is None
    assert document["precision"] == "bfloat16"


def test_too_little_to_measure(tmp_path):
    data = tiny_catalog(tmp_path / "data")
    config = config_of(tiny_dashclip(tmp_path / "tiny"))
    with pytest.raises(BadInputError, match="stage 1: 8 examples make one batch of 6; measure"):
        throughput(data, tmp_path / "out", config=config, steps=2, products=8, peak_side=16)
    with pytest.raises(BadInputError, match="must be 1 or more, got 0 and 2048"):
        throughput(data, tmp_path / "out", config=config, steps=0)


class OneLinear:
    """A stage whose step is a product of [4, 32] and [32, 16], forward and back."""

    name = "one linear"
    examples = 40
    config = AlignmentConfig(batch=4, epochs=1)

    def __init__(self, model):
        self.layer = model.product_proj
        self.steps = 0

    def prepare(self, batch):
        """Nothing to read."""

    def batches(self, epoch, size):
        for start in range(0, self.examples, size):
            yield (torch.arange(start, start + size).numpy(),)

    def loss(self, batch, *, epoch, seed):
        loss = self.layer(torch.ones(len(batch[0]), 32)).square().sum()
        return loss, {"loss": float(loss.detach())}

    def after_step(self):
        self.steps += 1

    def evaluate(self):
        return {}

    def state(self):
        return {}


def test_arithmetic_is_counted_forward_and_backward(tmp_path):
    model = tiny_model(images=False).requires_grad_(False)
    model.product_proj.requires_grad_(True)
    stage = OneLinear(model)
    found = measure_stage(stage, model, steps=4, bfloat16=False, scratch=tmp_path)
    # 2 * 4 * 32 * 16 forward and again for the weight's gradient; the input needs none.
    assert found["flops_per_pair"] == 2 * 2 * 32 * 16
    assert found["steps"] == 4
    assert stage.steps == 1 + 3 + 5  # to warm up, under the counter, and on the clock
    assert not any(tmp_path.iterdir())  # no checkpoint was written


def test_the_peak_is_that_of_a_matrix_product():
    peak = measure_peak(torch.device("cpu"), 64)
    assert set(peak) == {"float32", "bfloat16"}
    assert all(value > 1e6 for value in peak.values())


def test_the_papers_run_by_hand():
    stage = {
        "pairs_per_second": 1000.0,
        "flops_per_pair": 1e9,
        "frozen_seconds_per_product": 0.0,
        "frozen_bytes_per_product": 2**30 / 400_000,
    }
    stages = [
        {**stage, "name": "stage 1", "frozen_seconds_per_product": 0.009},
        {**stage, "name": "stage 2"},
    ]
    config = DashClipTraining(
        pretraining=PretrainingConfig(epochs=9), alignment=AlignmentConfig(epochs=18)
    )
    found = paper_run(stages, config, 2.0)
    # Stage 1: 3.6 million pairs, and 3,600 s for what is frozen. Stage 2: 25.2 million pairs.
    assert found["hours"] == pytest.approx({"stage 1": 2.0, "stage 2": 7.0, "total": 9.0})
    assert found["dollars"] == pytest.approx(18.0)
    assert found["flops"] == pytest.approx(28.8e15)
    assert found["paper"]["dollars_per_t4_hour"] == pytest.approx(0.9375)
    share = found["paper"]["share_of_t4_peak_for_these_flops"]
    assert share == pytest.approx(28.8e15 / (65e12 * 160 * 3600))
    assert any("1.0 GiB" in line for line in found["assumptions"])
    assert paper_run(stages[:1], config, None) is None


def test_a_sample_is_a_dataset_of_relevant_products(tmp_path):
    data = tiny_catalog(tmp_path / "data")
    labels = pq.read_table(data / "relevance.parquet")
    relevant = {1002, 1011, 1012, 1020}
    ours = [i for i, p in enumerate(labels["product_id"].to_pylist()) if p in relevant]
    pq.write_table(labels.take(ours), data / "relevance.parquet")
    catalog = read_catalog(sample_dataset(data, tmp_path / "sample", 6))
    ids = catalog.product_ids.to_pylist()
    assert len(ids) == 6
    assert relevant < set(ids)
    assert catalog.any_image()
    found = read_relevance(tmp_path / "sample", catalog)
    assert len(found.product) == len(ours)


def test_the_shape_of_blip_base():
    with torch.device("meta"):  # shapes without numbers
        start = blip_base(224, seed=0)
    config = start.model.config
    vision, text = start.model.vision_model, start.model.text_encoder
    # ViT-B/16 has 86 million weights, BERT-base without its pooler 109 million, and its
    # cross-attention in 12 layers another 28 million.
    assert sum(p.numel() for p in vision.parameters()) == pytest.approx(86e6, rel=0.01)
    assert sum(p.numel() for p in text.parameters()) == pytest.approx(137e6, rel=0.01)
    assert (config.vision_config.image_size, config.projection_dim) == (224, 256)
    assert config.grounded_token_id == 30_523
