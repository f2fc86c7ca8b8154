from dataclasses import fields, is_dataclass
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from embeddings.config import (
    AlignmentConfig,
    CroppingConfig,
    DashClipTraining,
    PretrainingConfig,
    StageConfig,
    StartConfig,
)
from embeddings.sampling import SamplingConfig
from features.config_file import from_toml, to_toml
from features.errors import BadInputError


def changed(kind):
    """Return a configuration no field of which has its default."""
    hints, values = get_type_hints(kind), {}
    for field in fields(kind):
        hint = hints[field.name]
        default = field.default
        if is_dataclass(hint):
            values[field.name] = changed(hint)
        elif get_origin(hint) is Literal:
            values[field.name] = next(v for v in get_args(hint) if v != default)
        elif hint is bool:
            values[field.name] = not default
        elif field.name in ("image_size", "batch"):
            values[field.name] = default * 2
        elif hint is int:
            values[field.name] = default + 1
        elif hint is float:
            values[field.name] = default / 2 or 0.5
        else:
            values[field.name] = f'a "folder"\\of mine\n{field.name} ü'
    values |= {"accumulate": 2} if "accumulate" in values else {}
    if "mined_products" in values:  # they need `symmetric`, which is turned off above
        values["mined_products"] = 0
    return kind(**values)


def written(tmp_path, text):
    path = tmp_path / "training.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_setting_is_read_as_it_was_written(tmp_path):
    config = changed(DashClipTraining)
    for part in (config, config.start, config.pretraining, config.cropping, config.alignment):
        defaults = type(part)()
        for field in fields(part):
            if field.name != "mined_products":
                assert getattr(part, field.name) != getattr(defaults, field.name), field.name
    assert from_toml(written(tmp_path, to_toml(config)), DashClipTraining) == config


def test_the_paper_s_settings_are_the_defaults(tmp_path):
    config = from_toml(written(tmp_path, ""), DashClipTraining)
    assert config == DashClipTraining()
    assert config.pretraining.momentum == 0.995
    assert config.pretraining.queue == 57_600
    assert config.pretraining.alpha == 0.4
    assert config.pretraining.frozen_layers == config.alignment.frozen_layers == 8 / 12
    sampling = config.alignment.sampling
    assert (sampling.positives, sampling.negatives) == (110, 10)
    assert (sampling.most_high, sampling.most_moderate) == (73, 37)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        (StartConfig, {"image_size": 100}, "'image_size' must be a multiple of 32, got 100"),
        (StartConfig, {"image_size": 0}, "'image_size' must be a multiple of 32, got 0"),
        (StartConfig, {"image_layers": 0}, "'image_layers' must be 1 or more, got 0"),
        (StartConfig, {"max_tokens": 0}, "'max_tokens' must be 1 or more, got 0"),
        (StageConfig, {"batch": 0}, "'batch' must be 1 or more, got 0"),
        (StageConfig, {"epochs": -1}, "'epochs' must be 0 or more, got -1"),
        (StageConfig, {"limit": -1}, "'limit' must be 0 or more, got -1"),
        (StageConfig, {"batch": 10, "accumulate": 4}, "multiple of 'accumulate', got 10 and 4"),
        (StageConfig, {"learning_rate": -1e-4}, "'learning_rate' must be 0 or more"),
        (StageConfig, {"learning_rate": float("nan")}, "'learning_rate' must be 0 or more"),
        (StageConfig, {"warmup": 1.5}, "'warmup' must be 1 or less, got 1.5"),
        (StageConfig, {"frozen_layers": 8.0}, "'frozen_layers' must be 1 or less, got 8.0"),
        (PretrainingConfig, {"momentum": 1.1}, "'momentum' must be 1 or less"),
        (PretrainingConfig, {"alpha": 2.0}, "'alpha' must be 1 or less"),
        (PretrainingConfig, {"held_out": -0.1}, "'held_out' must be 0 or more"),
        (PretrainingConfig, {"queue": 0}, "'queue' must be 1 or more"),
        (PretrainingConfig, {"patience": 0}, "'patience' must be 1 or more"),
        (PretrainingConfig, {"batch": 10, "accumulate": 4}, "multiple of 'accumulate'"),
        (CroppingConfig, {"temperature": 0.0}, "'temperature' must be above 0, got 0.0"),
        (AlignmentConfig, {"temperature": 0.0}, "'temperature' must be above 0, got 0.0"),
        (AlignmentConfig, {"frozen_layers": -0.1}, "'frozen_layers' must be 0 or more"),
        (SamplingConfig, {"positives": 1}, "positives is at least 2, got 1"),
        (DashClipTraining, {"threads": 0}, "'threads' must be 1 or more, got 0"),
        (DashClipTraining, {"cache_gib": -1.0}, "'cache_gib' must be 0 or more"),
        (DashClipTraining, {"held_out_queries": 1.2}, "'held_out_queries' must be 1 or less"),
        (DashClipTraining, {"max_broken_images": 2.0}, "'max_broken_images' must be 1 or less"),
    ],
)
def test_a_value_out_of_its_range(kind, changes, said):
    with pytest.raises(BadInputError, match=said):
        kind(**changes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[alignment]\ntemperatur = 0.1", "'temperatur'.*'temperature'"),
        ("[pretrainin]\nepochs = 1", "'pretrainin'.*'pretraining'"),
        ("[pretraining]\nepochs = 1.5", "'epochs' must be int, got 1.5"),
        ("[pretraining]\nmatching = 1", "'matching' must be bool, got 1"),
        ("[start]\nimage_trunk = 'resnet'", "'image_trunk' must be one of efficientnet-lite0"),
        ("precision = 'float16'", "'precision' must be one of auto, float32, bfloat16"),
        ("[alignment.sampling]\npositives = 1", "alignment.*sampling.*positives is at least 2"),
        ("pretraining = 3", "'pretraining' must be a table, got 3"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, text, said):
    path = written(tmp_path, text)
    with pytest.raises(BadInputError, match=said) as caught:
        from_toml(path, DashClipTraining)
    assert str(caught.value).startswith(str(path))


def test_whole_numbers_stand_for_floats(tmp_path):
    path = written(tmp_path, "cache_gib = 0\n[alignment]\nlearning_rate = 1\n")
    config = from_toml(path, DashClipTraining)
    assert config.cache_gib == 0.0
    assert isinstance(config.alignment.learning_rate, float)


def test_the_same_start_from_another_checkpoint(tmp_path):
    start = StartConfig(max_tokens=12).at(tmp_path)
    assert start == StartConfig(max_tokens=12, checkpoint=str(tmp_path))
