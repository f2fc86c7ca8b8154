"""Fine-tuning of a causal language model: what it learns, how it goes on, what it writes."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embeddings.labeling import causal_model, causal_training, tuning
from embeddings.labeling.causal_training import AnswerTuning, fine_tune
from embeddings.labeling.chat_tokens import ChatTokens
from embeddings.labeling.config import CausalConfig, read_grader_config, write_grader_config
from embeddings.labeling.fine_tune import fine_tune as fine_tune_any
from embeddings.labeling.grades import Pairs, grade_all
from embeddings.labeling.judgements import SCHEMA, judgements
from embeddings.labeling.open_grader import open_grader
from embeddings.labeling.prompts import read_prompt
from features.errors import BadInputError
from tests.tiny_causal import rule_pairs, save_tiny_causal

PROMPT = read_prompt("relevance-1")
ROUND = {0: 1, 1: 2, 2: 0}  # the rule to learn: another one than the model knows


def other_pairs(count, seed):
    pairs, label = rule_pairs(count, seed=seed)
    return pairs, np.array([ROUND[known] for known in label], np.int8)


def table(pairs, label):
    ids = np.arange(len(pairs))
    values = [pairs.queries, ids, pairs.titles, pa.array(label, pa.int8())]
    return pa.table(dict(zip(SCHEMA.names, values, strict=True)), schema=SCHEMA)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("split"), 256, 30)


@pytest.fixture(scope="module")
def small_split(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("small"), 24, 6)


def write_split(folder, training, validation):
    for part, count, seed in (("fine_tuning", training, 1), ("validation", validation, 2)):
        pq.write_table(table(*other_pairs(count, seed)), folder / f"{part}.parquet")
    return folder


@pytest.fixture
def in_float32(monkeypatch):
    monkeypatch.setattr(causal_model, "choose_precision", lambda device: "float32")


def settings(model, **changes):
    found = CausalConfig(model=str(model), threads=1, rank=8, learning_rate=1e-2)
    return replace(found, **changes)


def test_lora_learns_another_rule_and_its_folder_grades_by_it(chat_model, split, tmp_path):
    grader = tmp_path / "start.toml"
    write_grader_config(grader, settings(chat_model, epochs=1))
    figures = fine_tune_any(split, tmp_path / "tuned", grader=grader, command="as given")
    before, after = figures["evaluations"]
    assert before["accuracy"] < 0.1
    assert after["accuracy"] > 0.8
    assert after["loss"] < before["loss"] / 4
    # The model's weights stay where they are.
    tuned = tmp_path / "tuned"
    assert {path.name for path in tuned.iterdir()} == {
        *("adapter", "grader.toml", "metrics.json", "prompt.toml", "run.json", "tensorboard")
    }
    assert (tuned / read_grader_config(tuned).model).resolve() == chat_model
    assert not (tuned / "adapter" / "README.md").exists()
    assert str(chat_model) not in (tuned / "adapter" / "adapter_config.json").read_text()
    assert json.loads((tuned / "metrics.json").read_text()) == json.loads(json.dumps(figures))
    assert figures["command"] == "as given"
    pairs, label = other_pairs(60, 3)
    found = open_grader(tuned)
    grades = grade_all(found, pairs)
    assert (grades.label == label).mean() > 0.8
    # What training said of the validation part is what grading gives.
    pairs, label = other_pairs(30, 2)
    given = grade_all(found, pairs).probability[np.arange(30), label]
    assert -np.log(given).mean() == pytest.approx(after["loss"], abs=0.05)
    assert found.prompt_version == PROMPT.version
    assert found.model.startswith("tuned-")
    assert found.fingerprint != open_grader(grader).fingerprint


def test_all_weights_are_trained_with_rank_0_and_the_folder_needs_no_other(
    chat_model, split, tmp_path
):
    start = shutil.copytree(chat_model, tmp_path / "start")
    config = settings("start", rank=0, learning_rate=2e-3, epochs=1)
    figures = fine_tune(config, tmp_path, split, tmp_path / "tuned")
    assert figures["validation"]["accuracy"] > 0.5 > figures["evaluations"][0]["accuracy"]
    shutil.rmtree(start)
    moved = (tmp_path / "tuned").rename(tmp_path / "moved")
    pairs, label = other_pairs(30, 3)
    assert (grade_all(open_grader(moved), pairs).label == label).mean() > 0.5


def test_an_adapter_is_trained_further(small_split, tmp_path, in_float32):
    save_tiny_causal(tmp_path / "model")
    config = settings("model", epochs=1, batch=8)
    first = fine_tune(config, tmp_path, small_split, tmp_path / "first")
    again = read_grader_config(tmp_path / "first")
    second = fine_tune(again, tmp_path / "first", small_split, tmp_path / "second")
    assert second["evaluations"][0]["loss"] == pytest.approx(first["validation"]["loss"], rel=1e-5)
    assert read_grader_config(tmp_path / "second").model == "../model"


@pytest.mark.parametrize("rank", [4, 0])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(small_split, tmp_path, monkeypatch, rank):
    save_tiny_causal(tmp_path / "model")
    config = settings("model", rank=rank, epochs=2, batch=8, learning_rate=1e-3)
    whole = fine_tune(config, tmp_path, small_split, tmp_path / "whole")
    monkeypatch.setattr(tuning, "_CHECKPOINT_SECONDS", 0.0)
    loss, calls = AnswerTuning.loss, []

    def stopping(self, batch, **more):
        calls.append(batch)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return loss(self, batch, **more)

    monkeypatch.setattr(AnswerTuning, "loss", stopping)
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        fine_tune(config, tmp_path, small_split, stopped)
    assert not (stopped / "grader.toml").exists()
    assert not (stopped / "metrics.json").exists()
    resumed = fine_tune(config, tmp_path, small_split, stopped)
    assert len(calls) == 7  # the fifth and the sixth step
    assert resumed["losses"] == whole["losses"]
    assert resumed["evaluations"] == whole["evaluations"]
    weights = "adapter/adapter_model.safetensors" if rank else "model/model.safetensors"
    assert (stopped / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_the_loss_is_that_of_the_answers_each_by_its_share(tmp_path):
    folder = save_tiny_causal(tmp_path / "model")
    model = causal_model.load_causal(
        str(folder), adapter=None, precision="float32", device=torch.device("cpu")
    )
    chat = ChatTokens(causal_model.load_tokenizer(str(folder)), PROMPT, name="model")
    # Of the first pair two people said 2 and one said 0; of the second, one said 1.
    given = Pairs(queries=["a"] * 3 + ["b"], titles=["door"] * 3 + ["lamp"])
    told = table(given, [2, 0, 2, 1]).set_column(1, "product_id", pa.array([5, 5, 5, 6]))
    found = judgements(tmp_path, told)
    stage = AnswerTuning(model, chat, settings("model"), found, found)
    loss, figures = stage.loss((np.array([0, 1]),), epoch=0.0, seed=0)
    said = np.empty((2, 3))
    for row, question in enumerate(chat.questions(found.pairs)):
        for label, answer in enumerate(chat.answers):
            ids = torch.tensor([*chat.prefix, *question, *answer])
            log = model(ids[None]).logits[0].log_softmax(1)
            at = torch.arange(len(ids) - len(answer) - 1, len(ids) - 1)
            said[row, label] = log[at, torch.tensor(answer)].sum().item()
    expected = -(said[0, 0] / 3 + said[0, 2] * 2 / 3 + said[1, 1]) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert figures["loss"] == pytest.approx(expected, rel=1e-5)


def test_activations_computed_twice_change_no_gradient(tmp_path, monkeypatch):
    save_tiny_causal(tmp_path / "model")
    found = judgements(tmp_path, table(*other_pairs(4, 1)))
    gradients = []
    for large in (10**9, 1):
        monkeypatch.setattr(causal_training, "_LARGE", large)
        monkeypatch.setattr(causal_model, "choose_precision", lambda device: "float32")
        model = causal_training._trainable(settings("model"), str(tmp_path / "model"), tmp_path)
        chat = ChatTokens(
            causal_model.load_tokenizer(str(tmp_path / "model")), PROMPT, name="model"
        )
        model.train()
        stage = AnswerTuning(model, chat, settings("model"), found, found)
        torch.manual_seed(0)
        stage.loss((np.arange(4),), epoch=0.0, seed=0)[0].backward()
        assert any(
            getattr(module, "gradient_checkpointing", False) for module in model.modules()
        ) == (large == 1)
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for kept, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, twice)


def test_what_cannot_be_fine_tuned(chat_model, split, tmp_path, monkeypatch):
    with pytest.raises(BadInputError, match=r"the prompt has \d+ tokens, and .* reads 233"):
        fine_tune(settings(chat_model, max_tokens=233), tmp_path, split, tmp_path / "short")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BadInputError, match=r"pip install 'dashclip-ranker\[labeling\]'"):
        fine_tune(settings(chat_model), tmp_path, split, tmp_path / "none")
    (tmp_path / "adapter").mkdir()
    with pytest.raises(BadInputError, match=r"pip install 'dashclip-ranker\[labeling\]'"):
        causal_model.load_adapter(None, tmp_path / "adapter")
    assert not (tmp_path / "none" / "grader.toml").exists()
