"""The tables that train-ranker makes for itself, and the recipe of the paper."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_dashclip import tiny_catalog, tiny_dashclip

import embeddings.recipes
from embeddings.config import AlignmentConfig, CroppingConfig, DashClipTraining, StartConfig
from embeddings.dashclip_encoder import DashClipEncoder
from embeddings.default_tables import SMALL_RECIPE, ensure_tables
from embeddings.sampling import SamplingConfig
from embeddings.tables import read_table
from embeddings.text_encoder import TextEncoder
from features.config_file import from_toml

RECIPES = Path(embeddings.recipes.__path__[0])


def test_dashclip_is_trained_where_there_is_relevance(tmp_path):
    data = tiny_catalog(tmp_path / "data", images=False)
    start = StartConfig(checkpoint=str(tiny_dashclip(tmp_path / "start", images=False)))
    recipe = replace(SMALL_RECIPE, start=start, threads=1, cropping=CroppingConfig(epochs=1))

    folder = ensure_tables(data, recipe=recipe)

    encoder = DashClipEncoder(data / "dashclip")
    product = read_table(folder / "product.parquet")
    assert len(product) == 24
    assert (
        product.fingerprint
        == encoder.fingerprint
        == read_table(folder / "query.parquet").fingerprint
    )
    before = (folder / "product.parquet").stat().st_mtime_ns
    assert ensure_tables(data, recipe=recipe) == folder
    assert (folder / "product.parquet").stat().st_mtime_ns == before


def test_without_relevance_the_packaged_encoder_serves(tiny_dataset, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("catalog.parquet", "impressions.parquet"):
        (data / name).symlink_to(tiny_dataset / name)
    table = read_table(ensure_tables(data) / "product.parquet")
    assert table.fingerprint == TextEncoder.packaged().fingerprint
    assert not (data / "dashclip").exists()


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_configuration(recipe):
    assert isinstance(from_toml(recipe, DashClipTraining), DashClipTraining)


def test_the_paper_s_recipe_says_what_the_paper_says():
    config = from_toml(RECIPES / "paper.toml", DashClipTraining)
    assert config.cropping.epochs == 0
    assert config.alignment == AlignmentConfig(
        shared_negatives=False, symmetric=False, mined_products=0, sampling=SamplingConfig()
    )
    assert (config.alignment.sampling.positives, config.alignment.sampling.negatives) == (110, 10)
    assert config.alignment.sampling.proxies
    assert config.pretraining.frozen_layers == config.alignment.frozen_layers == 8 / 12
    assert (config.pretraining.momentum, config.pretraining.alpha) == (0.995, 0.4)
