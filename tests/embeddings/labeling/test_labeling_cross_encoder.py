"""The cross-encoder at work: what it reads, what it says, and whom it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from embeddings.batching import quiet_transformers
from embeddings.labeling import Pairs
from embeddings.labeling.config import CrossEncoderConfig, write_grader_config
from embeddings.labeling.cross_encoder import CrossEncoder, classify, source
from embeddings.labeling.grades import grade_all
from embeddings.labeling.open_grader import open_grader
from embeddings.labeling.pair_classifier import HEAD, PairClassifier, load_pair_classifier
from embeddings.text_encoder import TextEncoder
from features.errors import BadInputError
from tests.tiny_bert import FAMILIES, POSITIONS, save_tiny_bert
from tests.tiny_labels import PRODUCTS, QUERIES

PAIRS = Pairs(
    queries=[QUERIES[i % len(QUERIES)] for i in range(50)],
    titles=[PRODUCTS[7 * i % len(PRODUCTS)] for i in range(50)],
)


def some_head(model: PairClassifier) -> PairClassifier:
    """Give a classifier a head that tells pairs apart, and a temperature."""
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(model.head.weight.shape, generator=drawn))
    model.temperature = 4.0
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A grader's folder, as fine-tuning leaves it."""
    plain = save_tiny_bert(tmp_path / "bert")
    model = some_head(load_pair_classifier(str(plain), max_tokens=POSITIONS))
    model.save(tmp_path / "grader" / "model")
    config = CrossEncoderConfig(model="model", max_tokens=POSITIONS, threads=1)
    write_grader_config(tmp_path / "grader" / "grader.toml", config)
    return tmp_path / "grader"


def plain_logits(folder: Path, model: PairClassifier, query: str, title: str) -> np.ndarray:
    """What transformers' own model gives for one pair, put together in the plainest way."""
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encoder = AutoModel.from_pretrained(folder).eval()
    given = tokenizer(query, title, return_tensors="pt", return_token_type_ids=True)
    kinds = given.pop("token_type_ids")
    if encoder.config.model_type == "bert":
        given["token_type_ids"] = kinds
    with torch.no_grad():
        hidden = encoder(**given).last_hidden_state[0].numpy()
    # "[CLS] query [SEP]" is the one part, "title [SEP]" the other.
    titles_begin = len(tokenizer(query)["input_ids"])
    q, t = hidden[:titles_begin].mean(0), hidden[titles_begin:].mean(0)
    q, t = (vector / np.linalg.norm(vector) * 4.0 for vector in (q, t))  # 4 is the root of 16
    features = np.concatenate([q, t, np.abs(q - t), q * t])
    weight, bias = model.head.weight.detach().numpy(), model.head.bias.detach().numpy()
    return np.asarray(weight @ features + bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_what_transformers_own_model_and_the_formula_give(tmp_path, family, monkeypatch):
    monkeypatch.setattr("embeddings.labeling.cross_encoder.fast_precision", lambda: "float32")
    folder = save_tiny_bert(tmp_path, family=family)
    model = some_head(load_pair_classifier(str(folder), max_tokens=POSITIONS))
    expected = [
        plain_logits(folder, model, *pair) for pair in zip(PAIRS.queries, PAIRS.titles, strict=True)
    ]
    np.testing.assert_allclose(classify(model, PAIRS, threads=1), expected, atol=2e-4)


def test_grades_are_the_softmax_at_the_temperature(folder):
    grader = open_grader(folder)
    grades = grade_all(grader, PAIRS)
    model = load_pair_classifier(str(folder / "model"), max_tokens=POSITIONS)
    logits = torch.from_numpy(classify(model, PAIRS, threads=1))
    np.testing.assert_allclose(
        grades.probability, torch.softmax(logits / 4.0, dim=1).numpy(), atol=1e-6
    )
    np.testing.assert_array_equal(grades.label, logits.argmax(1).numpy())
    assert len(set(grades.label.tolist())) > 1
    assert (grades.label.dtype, grades.probability.dtype) == (np.int8, np.float32)


def test_chunks_come_in_order_and_any_size_gives_the_same(folder, monkeypatch):
    grader = CrossEncoder.open(CrossEncoderConfig(model="model", max_tokens=POSITIONS), folder)
    whole = grade_all(grader, PAIRS)
    monkeypatch.setattr(grader, "chunk_pairs", 20, raising=False)
    chunks = list(grader.grade(PAIRS))
    assert [len(chunk.position) for chunk in chunks] == [20, 20, 10]
    np.testing.assert_array_equal(np.concatenate([c.position for c in chunks]), np.arange(50))
    found = np.concatenate([chunk.probability for chunk in chunks])
    np.testing.assert_allclose(found, whole.probability, atol=2e-2)  # bfloat16, other batches


def test_the_number_of_threads_changes_nothing(folder):
    model = load_pair_classifier(str(folder / "model"), max_tokens=POSITIONS)
    before = torch.get_num_threads()
    one, two = (classify(model, PAIRS, threads=threads) for threads in (1, 2))
    np.testing.assert_array_equal(one, two)
    assert torch.get_num_threads() == before


def test_no_pairs_have_no_grades(folder):
    assert list(open_grader(folder).grade(Pairs(queries=[], titles=[]))) == []


def test_long_pairs_are_cut_at_their_longer_text(folder):
    model = load_pair_classifier(str(folder / "model"), max_tokens=12)
    tokens, title = model.tokenize(["dish soap"] * 2, ["alder " * 40, "elm"])
    assert [len(row) for row in tokens] == [12, 6]
    assert title.tolist() == [4, 4]  # [CLS] dish soap [SEP]
    tokens, title = model.tokenize(["dish " * 40], ["elm " * 40])
    assert len(tokens[0]) == 12
    assert tokens[0][title[0] - 1] == tokens[0][-1] == model.tokenizer.sep_token_id


def test_texts_without_a_known_character_are_graded_too(folder):
    grades = grade_all(open_grader(folder), Pairs(queries=["", "?"], titles=["", ""]))
    assert np.isfinite(grades.probability).all()


def test_the_fingerprint_is_of_weights_and_length(folder, tmp_path):
    config = CrossEncoderConfig(model="model", max_tokens=POSITIONS)
    first = CrossEncoder.open(config, folder)
    assert CrossEncoder.open(config, folder).fingerprint == first.fingerprint
    shorter = CrossEncoderConfig(model="model", max_tokens=POSITIONS - 1)
    assert CrossEncoder.open(shorter, folder).fingerprint != first.fingerprint
    moved = folder.rename(tmp_path / "elsewhere")
    assert CrossEncoder.open(config, moved).fingerprint == first.fingerprint
    model = load_pair_classifier(str(moved / "model"), max_tokens=POSITIONS)
    model.temperature = 5.0
    model.save(moved / "model")
    changed = CrossEncoder.open(config, moved)
    assert changed.fingerprint != first.fingerprint
    assert changed.model.startswith("elsewhere-")


def test_the_packaged_encoder_is_the_start_where_none_is_named(tmp_path):
    assert source(CrossEncoderConfig(), tmp_path) == str(TextEncoder.packaged().folder)
    (tmp_path / "mine").mkdir()
    assert source(CrossEncoderConfig(model="mine"), tmp_path) == str(tmp_path / "mine")


def test_one_that_was_not_fine_tuned_does_not_grade(tmp_path):
    save_tiny_bert(tmp_path / "bert")
    with pytest.raises(BadInputError, match=r"bert: .*fine-tuned: run `label-relevance fine-tune`"):
        CrossEncoder.open(CrossEncoderConfig(model="bert"), tmp_path)


def test_a_length_that_the_encoder_cannot_read_is_refused(folder):
    with pytest.raises(BadInputError, match=f"reads {POSITIONS} tokens .* 'max_tokens' is 33"):
        CrossEncoder.open(CrossEncoderConfig(model="model", max_tokens=33), folder)


@pytest.mark.parametrize("name", ["model.safetensors", HEAD])
def test_damaged_weights_are_refused(folder, name):
    path = folder / "model" / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadInputError, match="damaged"):
        open_grader(folder)


def test_a_missing_weight_is_refused(folder):
    path = folder / "model" / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"num_hidden_layers": 5}))
    with pytest.raises(BadInputError, match=r"the weights lack 'encoder\.layer\.4\."):
        open_grader(folder)


def test_a_hub_name_that_cannot_be_had_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInputError, match="no/such: cannot be read"):
        load_pair_classifier("no/such", max_tokens=8)
