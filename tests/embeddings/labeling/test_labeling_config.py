from dataclasses import fields

import pytest

from embeddings.labeling.config import (
    CausalConfig,
    CrossEncoderConfig,
    EndpointConfig,
    SimilarityConfig,
    read_grader_config,
    write_grader_config,
)
from features.errors import BadInputError

CONFIGS = [
    SimilarityConfig(),
    CrossEncoderConfig(model="encoder", epochs=2),
    CausalConfig(model="model", adapter='with "quotes"', rank=0),
    EndpointConfig(model="small", mode="batch", logprobs=True, requests_per_minute=1.5),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_grader_is_read_as_it_was_written(tmp_path, config):
    write_grader_config(tmp_path / "grader.toml", config)
    assert read_grader_config(tmp_path / "grader.toml") == config
    assert read_grader_config(tmp_path) == config  # a folder holds a file of that name


@pytest.mark.parametrize("config", CONFIGS)
def test_no_setting_is_kept_from_the_file(tmp_path, config):
    write_grader_config(tmp_path / "grader.toml", config)
    text = (tmp_path / "grader.toml").read_text()
    assert all(f"\n{setting.name} = " in text for setting in fields(config))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'kind' must be one of similarity, cross-encoder, causal, endpoint, got None"),
        ("kind = 1", "'kind' must be one of .* got 1"),
        ('kind = "casual"', "unknown kind 'casual'.*causal"),
        ('kind = "causal"', "'model' is missing"),
        ('kind = "causal"\nmodel = "m"\nrang = 4', "unknown key 'rang'.*rank"),
        ('kind = "causal"\nmodel = "m"\nrank = -1', "'rank' must be 0 or more, got -1"),
        ('kind = "endpoint"\nmodel = "m"\nmode = "fast"', "'mode' must be one of chat, batch"),
        ('kind = "endpoint"\nmodel = "m"\nconcurrency = 0', "'concurrency' must be 1 or more"),
        ('kind = "cross-encoder"\nepochs = "4"', "'epochs' must be int, got '4'"),
        ('kind = "similarity', "not valid TOML"),
    ],
)
def test_a_bad_grader_is_one_sentence_with_its_file(tmp_path, text, message):
    path = tmp_path / "grader.toml"
    path.write_text(text)
    with pytest.raises(BadInputError, match=message) as error:
        read_grader_config(path)
    assert str(error.value).startswith(str(path))


def test_a_grader_that_is_not_there_is_told(tmp_path):
    for path in (tmp_path, tmp_path / "none.toml"):
        with pytest.raises(BadInputError, match="no such file; it says which grader it is"):
            read_grader_config(path)
