import sys
from types import SimpleNamespace

import pytest

from embeddings.open_encoder import open_encoder
from embeddings.text_encoder import TextEncoder
from features.errors import BadInputError


def test_no_folder_means_minilm():
    encoder = open_encoder(None)
    assert encoder.fingerprint == TextEncoder.packaged().fingerprint
    assert encoder.dim == 384


def test_the_config_tells_a_dashclip_model(tmp_path, monkeypatch):
    module = SimpleNamespace(DashClipEncoder=lambda folder: ("dashclip", folder))
    monkeypatch.setitem(sys.modules, "embeddings.dashclip_encoder", module)
    (tmp_path / "config.json").write_text('{"model_type": "dashclip"}')
    assert open_encoder(tmp_path) == ("dashclip", tmp_path)


def test_any_other_folder_is_a_sentence_encoder():
    folder = TextEncoder.packaged().folder
    assert isinstance(open_encoder(folder), TextEncoder)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "no such file; a sentence encoder has one"),
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ('{"model_type": "vit"}', "'hidden_size' is missing; not a text encoder"),
    ],
)
def test_a_folder_that_holds_neither(tmp_path, config, said):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(BadInputError, match=said):
        open_encoder(tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(BadInputError, match="absent: no such model folder"):
        open_encoder(tmp_path / "absent")
