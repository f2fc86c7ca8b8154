"""The local causal language model as a grader, against the plain way to score answers."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny_causal import (
    CHAT_TEMPLATE,
    FAMILIES,
    rule_pairs,
    save_tiny_causal,
    save_trained_causal,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from embeddings.batching import quiet_transformers
from embeddings.labeling.causal import CausalGrader, softmax
from embeddings.labeling.chat_tokens import ChatTokens
from embeddings.labeling.config import CausalConfig, write_grader_config
from embeddings.labeling.grades import LABELS, Pairs, grade_all
from embeddings.labeling.open_grader import open_grader
from embeddings.labeling.prompts import Example, read_prompt
from features.config_file import to_toml
from features.errors import BadInputError

PROMPT = read_prompt("relevance-1")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random models of all families, and one of each kind of tokenizer."""
    folder = tmp_path_factory.mktemp("causal")
    for family in FAMILIES:
        save_tiny_causal(folder / family, family=family, chat=family != "gpt2")
    return folder


def opened(folder, **settings):
    config = CausalConfig(model=folder.name, threads=1, **settings)
    return CausalGrader.open(config, folder.parent, precision="float32")


def plain_scores(folder, pairs, prompt=PROMPT):
    """Each whole chat as its own template writes it, alone through the model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scores = np.empty((len(pairs), 3))
    for row, (query, title) in enumerate(zip(pairs.queries, pairs.titles, strict=True)):
        for number, label in enumerate(LABELS):
            chat = prompt.messages(query, title)
            if tokenizer.chat_template:
                asked = tokenizer.apply_chat_template(
                    chat, add_generation_prompt=True, tokenize=False
                )
                whole = tokenizer.apply_chat_template(
                    [*chat, {"role": "assistant", "content": label}], tokenize=False
                ).removesuffix("\n")
            else:
                asked = f"<|im_end|>{chat[0]['content']}\n\n{chat[1]['content']}\nLabel:"
                asked = asked.replace("<|im_end|>", tokenizer.bos_token)
                whole = f"{asked} {label}\n\n"
            first = len(tokenizer.encode(asked, add_special_tokens=False))
            ids = torch.tensor([tokenizer.encode(whole, add_special_tokens=False)])
            with torch.inference_mode():
                said = model(ids).logits[0].double().log_softmax(1)
            scores[row, number] = said[torch.arange(first - 1, ids.shape[1] - 1), ids[0, first:]].sum()
    return scores


@pytest.mark.parametrize("family", FAMILIES)
def test_grades_are_those_of_whole_chats_scored_one_by_one(models, family):
    pairs, _ = rule_pairs(30)
    grader = opened(models / family)
    assert grader._packs
    grades = grade_all(grader, pairs)
    expected = softmax(plain_scores(models / family, pairs))
    np.testing.assert_allclose(grades.probability, expected, rtol=1e-4)
    assert (grades.label == expected.argmax(1)).all()
