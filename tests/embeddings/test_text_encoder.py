import json
import logging
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embeddings.batching import token_batches
from embeddings.text_encoder import TextEncoder
from features.errors import BadInputError

TEXTS = [
    "cheddar cheese",
    "national brand, snack crackers, crackers misc baked food, 7 ounce, manufacturer 159",
    "cheese - cheddar",
    "motor oil",
    "",
    "private label, " + "very " * 300 + "long title",
]


@pytest.fixture(scope="module")
def minilm():
    return TextEncoder.packaged(precision="float32")


@pytest.fixture(scope="module")
def reference(minilm):
    """Encodes one text at a time: no batch, no padding, no mask, float32."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm.folder, local_files_only=True)
    model = AutoModel.from_pretrained(minilm.folder, local_files_only=True).eval()

    def encode(text):
        tokens = tokenizer(
            text, return_tensors="pt", truncation=True, max_length=256, padding=False
        )
        with torch.no_grad():
            mean = model(**tokens).last_hidden_state[0].mean(0)
        return (mean / mean.norm()).numpy()

    return lambda texts: np.stack([encode(text) for text in texts])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a BERT of random weights: 2 layers, 8 dimensions."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "apple", "juice", "milk", "bread"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


def test_equals_one_text_at_a_time(minilm, reference):
    encoded = minilm.encode_queries(TEXTS)
    assert encoded.shape == (6, 384)
    assert encoded.dtype == np.float32
    np.testing.assert_allclose(encoded, reference(TEXTS), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(encoded, axis=1), 1, atol=1e-6)


def test_bfloat16_is_close_to_float32(minilm):
    encoded = TextEncoder.packaged(precision="bfloat16").encode_queries(TEXTS)
    assert (encoded * minilm.encode_queries(TEXTS)).sum(1).min() > 0.999


def test_it_knows_what_words_mean(minilm):
    cheddar, _, cheese, oil = minilm.encode_queries(TEXTS[:4])
    assert cheddar @ cheese > 0.8
    assert cheddar @ oil < 0.3


def test_products_and_queries_share_a_space(minilm):
    titles = minilm.encode_products(TEXTS[:3], images=[b"not looked at", None, None])
    np.testing.assert_array_equal(titles, minilm.encode_queries(TEXTS[:3]))


def test_the_number_of_threads_changes_nothing(minilm):
    texts = [f"{word} {number}" for word in ("milk", "sour cream") for number in range(600)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = minilm.encode_queries(texts[:200])
        torch.set_num_threads(3)
        three = minilm.encode_queries(texts[:200])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(one, three)


def test_no_text_gives_no_vector(minilm):
    assert minilm.encode_queries([]).shape == (0, 384)


def test_a_folder_of_ones_own(tiny):
    encoder = TextEncoder(tiny)
    assert (encoder.dim, encoder.max_tokens) == (8, 16)
    assert encoder.encode_queries(["apple juice", "milk " * 40]).shape == (2, 8)


def test_loading_says_nothing_and_restores_what_it_silenced(tiny, capfd):
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_info()
    try:
        capfd.readouterr()
        TextEncoder(tiny).encode_queries(["apple"])
        assert capfd.readouterr() == ("", "")
        assert transformers_logging.get_verbosity() == logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity_warning()


def test_the_network_is_left_alone(minilm, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert TextEncoder(minilm.folder).encode_queries(["apple"]).any()


def test_a_fingerprint_needs_no_heavy_import():
    code = (
        "import sys; from embeddings.text_encoder import TextEncoder; "
        "print(TextEncoder.packaged().fingerprint); "
        "assert not {'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)"
    )
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    prefix, digest = done.stdout.strip().split("-")
    assert prefix == "text"
    assert len(bytes.fromhex(digest)) == 32


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_fingerprint_changes_with_each_file(copy, tiny, name):
    path = copy / name
    assert TextEncoder(copy).fingerprint == TextEncoder(tiny).fingerprint
    path.write_bytes(path.read_bytes() + b" ")
    assert TextEncoder(copy).fingerprint != TextEncoder(tiny).fingerprint


def test_a_fingerprint_does_not_change_with_the_readme(copy, tiny):
    (copy / "README.md").write_text("a model")
    assert TextEncoder(copy).fingerprint == TextEncoder(tiny).fingerprint


def test_a_missing_folder(tmp_path):
    with pytest.raises(BadInputError, match="absent: no such model folder"):
        TextEncoder(tmp_path / "absent")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.json", r"config\.json: no such file; a sentence encoder has one"),
        ("model.safetensors", r"no weights; expected \*\.safetensors or pytorch_model\*\.bin"),
    ],
)
def test_a_missing_file(copy, name, said):
    (copy / name).unlink()
    with pytest.raises(BadInputError, match=said):
        TextEncoder(copy)


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "not valid JSON"), ("[]", "must be a JSON object"), ("{}", "'hidden_size' is missing")],
)
def test_a_broken_configuration(copy, content, said):
    (copy / "config.json").write_text(content)
    with pytest.raises(BadInputError, match=rf"config\.json: {said}"):
        TextEncoder(copy)


def test_other_pooling_is_refused(copy):
    (copy / "1_Pooling").mkdir()
    path = copy / "1_Pooling" / "config.json"
    for accepted in ({"pooling_mode_mean_tokens": True}, {"pooling_mode": "mean"}):
        path.write_text(json.dumps(accepted))
        TextEncoder(copy)
    for refused in ({"pooling_mode_mean_tokens": False}, {"pooling_mode": "cls"}):
        path.write_text(json.dumps(refused))
        with pytest.raises(BadInputError, match=r"config\.json: pooling must be the mean"):
            TextEncoder(copy)


def test_damaged_weights(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInputError, match="not a readable sentence encoder"):
        TextEncoder(copy).encode_queries(["apple"])


def test_weights_of_another_model(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInputError, match=r"lack 'encoder\.layer\.1\.output\.dense\.weight'"):
        TextEncoder(copy).encode_queries(["apple"])


def test_batches_by_hand():
    batches = token_batches(np.array([5, 2, 9, 2, 3]), budget=8)
    # Sorted by length: 2 2 3 5 9. Three of up to 3 tokens would be 9; 3 and 5 would be 10.
    assert [rows.tolist() for rows in batches] == [[1, 3], [4], [0], [2]]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 100))
def test_batches_hold_each_text_once_within_the_budget(lengths, budget):
    lengths = np.array(lengths, np.int64)
    batches = list(token_batches(lengths, budget))
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    for rows in batches:
        assert len(rows) == 1 or len(rows) * lengths[rows].max() <= budget
