"""Configurations as TOML, there and back, and what is wrong with one in a sentence."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.config_file import from_dict, from_toml, to_toml
from features.errors import BadInputError
from ranking.config import (
    ModelConfig,
    RankerConfig,
    TrainingConfig,
    TransformConfig,
)

widths = st.lists(st.integers(1, 512), min_size=1, max_size=4).map(tuple)


def written(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def read(tmp_path, text):
    return from_toml(written(tmp_path, text), RankerConfig)


@given(
    config=st.builds(
        RankerConfig,
        model=st.builds(
            ModelConfig,
            embedding_tower=st.booleans(),
            tables=st.sampled_from(["frozen", "fine-tuned", "random"]),
            deep=widths,
            head=widths,
            count_sharpness=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=3).map(tuple),
            count_windows=widths,
        ),
        training=st.builds(
            TrainingConfig,
            learning_rate=st.floats(1e-12, 1e30),
            checkpoint_seconds=st.floats(0, 1e6),
            precision=st.sampled_from(["float32", "bfloat16"]),
            seed=st.integers(0, 1 << 40),
            keep_unclicked=st.floats(1e-6, 1),
        ),
        transforms=st.builds(
            TransformConfig,
            bins=st.integers(0, 100),
            leave_out=st.lists(st.sampled_from(["price", "type_repeats"])).map(tuple),
        ),
    )
)
def test_every_configuration_survives_toml(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert from_toml(path, RankerConfig) == config


def test_the_text_by_hand():
    text = to_toml(RankerConfig(model=ModelConfig(deep=(256, 128))))
    for line in ("embedding_tower = true", 'tables = "frozen"', "deep = [256, 128]", "seed = 0"):
        assert f"\n{line}\n" in text
    assert re.findall(r"^\[(\w+)\]$", text, re.MULTILINE) == [
        "model",
        "training",
        "transforms",
        "history",
    ]


def test_what_is_not_given_keeps_its_default(tmp_path):
    assert read(tmp_path, "") == RankerConfig()
    config = read(tmp_path, "[training]\nlearning_rate = 1\n[model]\nhead = []\n")
    assert config.model == ModelConfig(head=())
    assert config.training == TrainingConfig(learning_rate=1.0)
    assert isinstance(config.training.learning_rate, float)


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RankerConfig().model.deep = ()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "[training]\nlearning_rat = 1.0",
            "unknown key 'learning_rat'; did you mean 'learning_rate'?",
        ),
        ("[modell]\ndeep = []", "unknown key 'modell'; did you mean 'model'?"),
        ("[model]\nzzz = 1", "unknown key 'zzz'; known: embedding_tower, purchase_history"),
        ("model = 3", "'model' must be a table, got 3"),
        (
            "[model]\ntables = 'melted'",
            "'tables' must be one of frozen, fine-tuned, random, got 'melted'",
        ),
        (
            "[model]\ntables = ['frozen']",
            "'tables' must be one of frozen, fine-tuned, random, got ['frozen']",
        ),
        ("[model]\ndeep = 256", "'deep' must be a list, got 256"),
        ("[model]\ndeep = [256, 'wide']", "'deep' must be int, got 'wide'"),
        ("[model]\nembedding_tower = 1", "'embedding_tower' must be bool, got 1"),
        ("[training]\nepochs = 1.5", "'epochs' must be int, got 1.5"),
        ("[training]\nepochs = true", "'epochs' must be int, got True"),
        ("[training]\nlearning_rate = 'fast'", "'learning_rate' must be float, got 'fast'"),
        ("[training]\nlearning_rate = true", "'learning_rate' must be float, got True"),
        ("[transforms]\nbins = '40'", "'bins' must be int, got '40'"),
        ("[model", "not valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, sentence):
    with pytest.raises(BadInputError) as caught:
        read(tmp_path, text)
    assert sentence in str(caught.value)
    assert "config.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_one_that_is_not_text(tmp_path):
    with pytest.raises(BadInputError, match=r"none\.toml: no such configuration file"):
        from_toml(tmp_path / "none.toml", RankerConfig)
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInputError, match=r"binary\.toml: not valid TOML"):
        from_toml(path, RankerConfig)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[training]\nepochs = 0", "'epochs' must be 1 or more, got 0"),
        ("[training]\nbatch_rows = -3", "'batch_rows' must be 1 or more, got -3"),
        ("[training]\nchunk_groups = 0", "'chunk_groups' must be 1 or more, got 0"),
        ("[training]\nthreads = 0", "'threads' must be 1 or more, got 0"),
        ("[training]\nseed = -1", "'seed' must be 0 or more, got -1"),
        ("[training]\nlearning_rate = -0.1", "'learning_rate' must be 0 or more, got -0.1"),
        ("[training]\nlearning_rate = nan", "'learning_rate' must be 0 or more, got nan"),
        ("[training]\nwarmup = 1.5", "'warmup' must be 1 or less, got 1.5"),
        ("[model]\nembedding_dim = 10", "'embedding_dim' must be a multiple of 4, got 10"),
        ("[model]\nembedding_dim = 0", "'embedding_dim' must be 1 or more, got 0"),
        ("[model]\nhead = [8, 0]", "'head' must be 1 or more, got (8, 0)"),
        ("[model]\ndeep = []", "'deep' must name one layer or more, got none"),
        ("[model]\ncross_layers = 0", "'cross_layers' must be 1 or more, got 0"),
        ("[history]\nwindow_days = 0", "'window_days' must be 1 or more, got 0"),
        ("[model]\ncross_rank = -1", "'cross_rank' must be 0 or more, got -1"),
        ("[transforms]\nmin_count = 0", "'min_count' must be 1 or more, got 0"),
        ("[transforms]\nbins = -1", "'bins' must be 0 or more, got -1"),
        (
            "[training]\nkeep_unclicked = 0",
            "'keep_unclicked' must be above 0 and at most 1, got 0.0",
        ),
        (
            "[training]\nkeep_unclicked = 1.5",
            "'keep_unclicked' must be above 0 and at most 1, got 1.5",
        ),
        (
            "[model]\nhistory_counts = true\ntables = 'random'",
            "'history_counts' needs 'purchase_history' and frozen tables, got "
            "purchase_history = true and random tables",
        ),
        (
            "[model]\nhistory_counts = true\ntables = 'fine-tuned'",
            "got purchase_history = true and fine-tuned tables",
        ),
        (
            "[model]\nhistory_counts = true\npurchase_history = false",
            "got purchase_history = false and frozen tables",
        ),
        (
            "[model]\nhistory_counts = true\ncount_windows = []",
            "'count_windows' must name one or more numbers above 0",
        ),
        (
            "[model]\nhistory_counts = true\ncount_windows = [7, 0]",
            "'count_windows' must name one or more numbers above 0",
        ),
        (
            "[model]\nhistory_counts = true\ncount_sharpness = [0.0]",
            "'count_sharpness' must name one or more numbers above 0",
        ),
        ("[model]\ncount_sharpness = [-2.0]", "'count_sharpness' must be 0 or more, got (-2.0,)"),
    ],
)
def test_values_that_make_no_sense_are_named(tmp_path, text, sentence):
    with pytest.raises(BadInputError) as caught:
        read(tmp_path, text)
    assert str(caught.value).endswith(sentence)
    assert str(caught.value).startswith(str(tmp_path / "config.toml"))


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("tower", [True, False])
def test_only_a_model_with_tables_counts_in_the_history(tower, counts):
    config = ModelConfig(embedding_tower=tower, history_counts=counts)
    assert config.counts_history == (tower and counts)


def test_without_tables_the_counts_are_ignored_whatever_they_are():
    config = ModelConfig(embedding_tower=False, history_counts=True, tables="random")
    assert not config.counts_history


def test_a_dict_as_from_json():
    content = {"model": {"deep": [8]}, "training": {"seed": 3}}
    config = from_dict("here", content, RankerConfig)
    assert config.model.deep == (8,)
    assert config.training.seed == 3
