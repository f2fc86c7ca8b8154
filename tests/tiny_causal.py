"""Small causal language models with tokenizers of their own, saved by tests as transformers does.

A trained one answers with a label's name, by a rule that a word of the title decides (`RULE`).
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from embeddings.batching import quiet_transformers
from embeddings.labeling.grades import LABELS, Pairs
from embeddings.labeling.prompts import read_prompt

FAMILIES = ("llama", "qwen2", "gpt2", "mistral")
WINDOW = 24  # tokens that a token of "mistral" sees
RULE = {"spare": 0, "similar": 1, "genuine": 2}
"""The label of a pair by the word that its title holds."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_END, _TURN_END = 0, 2
_POSITIONS = 1024
_THINGS = ("drill", "paint", "lamp", "hose", "tile", "door", "saw", "pump", "rug", "vase")
_KINDS = ("red", "large", "cheap", "steel", "garden", "oak", "white", "compact")
_BATCH = 16


def save_tiny_causal(
    folder: Path, *, family: str = "llama", chat: bool = True, seed: int = 0
) -> Path:
    """Save a random model and its tokenizer and return the folder.

    Args:
        folder: where to.
        family: one of `FAMILIES`.
        chat: whether the tokenizer has a chat template (ChatML).
        seed: of the weights.
    """
    _save(folder, _model(family, seed), chat)
    return folder


def save_trained_causal(folder: Path, *, seed: int = 0) -> Path:
    """Save a model that answers the packaged prompt by `RULE`, and return the folder.

    It is trained once a process, in some seconds.
    """
    _save(folder, _trained(seed), chat=True)
    return folder


def rule_pairs(count: int, *, seed: int = 0) -> tuple[Pairs, np.ndarray]:
    """Return random pairs and their labels ([count] int8) by `RULE`."""
    generator = np.random.default_rng(seed)
    queries, titles, labels = [], [], []
    for number in range(count):
        kind, thing = generator.choice(_KINDS), generator.choice(_THINGS)
        word = generator.choice(list(RULE))
        queries.append(f"{kind} {thing} {number}")
        titles.append(f"{generator.choice(_KINDS)} {word} {thing}")
        labels.append(RULE[word])
    return Pairs(queries=queries, titles=titles), np.array(labels, np.int8)


def _save(folder: Path, model: Any, chat: bool) -> None:
    with quiet_transformers():
        model.save_pretrained(folder)
        _tokenizer(chat).save_pretrained(folder)


def _model(family: str, seed: int) -> Any:
    ends = {"bos_token_id": _END, "eos_token_id": _TURN_END, "pad_token_id": _END}
    vocabulary = {"vocab_size": len(_tokenizer(True))}
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": _POSITIONS,
    }
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(seed)
        if family == "llama":
            return LlamaForCausalLM(LlamaConfig(**sizes, **ends, **vocabulary))
        if family == "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**sizes, **ends, **vocabulary))
        if family == "mistral":
            sizes["sliding_window"] = WINDOW
            return MistralForCausalLM(MistralConfig(**sizes, **ends, **vocabulary))
        assert family == "gpt2", family
        gpt2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": _POSITIONS}
        return GPT2LMHeadModel(GPT2Config(**gpt2, **ends, **vocabulary))


def _tokenizer(chat: bool) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bytes_and_merges()),
        bos_token=_SPECIAL[_END],
        pad_token=_SPECIAL[_END],
        eos_token=_SPECIAL[_TURN_END],
        extra_special_tokens=["<|im_start|>"],
        model_max_length=_POSITIONS,
        chat_template=CHAT_TEMPLATE if chat else None,
    )


@cache
def _bytes_and_merges() -> str:
    """Return a byte-level BPE, as JSON, that knows the words of prompt and pairs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    prompt = read_prompt("relevance-1")
    pairs, _ = rule_pairs(200)
    texts = [prompt.system(), "system user assistant", *LABELS] * 10
    tokenizer.train_from_iterator(
        [*texts, *map(prompt.question, pairs.queries, pairs.titles)], trainer
    )
    return str(tokenizer.to_str())


@cache
def _trained(seed: int, steps: int = 105) -> Any:
    """Return a model trained by next-token loss on answers."""
    model, tokenizer = _model("llama", seed), _tokenizer(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    chats = _chats(tokenizer, steps * _BATCH, seed)
    system = read_prompt("relevance-1").messages("", "")[:1]
    shared = len(tokenizer.apply_chat_template(system, return_dict=False))
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 10, 3 * (1 - step / steps))
        optimizer.zero_grad()
        _loss(model, chats[step * _BATCH : (step + 1) * _BATCH], shared).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def _chats(
    tokenizer: PreTrainedTokenizerFast, count: int, seed: int
) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of questions and of their answers."""
    prompt = read_prompt("relevance-1")
    pairs, labels = rule_pairs(count, seed=seed + 1)
    answers = [[*tokenizer.encode(label), _TURN_END] for label in LABELS]
    chats = []
    for query, title, label in zip(pairs.queries, pairs.titles, labels, strict=True):
        asked = tokenizer.apply_chat_template(
            prompt.messages(query, title), add_generation_prompt=True, return_dict=False
        )
        chats.append((asked, answers[label]))
    return chats


def _loss(model: Any, chats: list[tuple[list[int], list[int]]], shared: int) -> torch.Tensor:
    """Return the mean loss of the answers' tokens; what all chats begin with is read once."""
    begin = model(torch.tensor([chats[0][0][:shared]]), use_cache=True).past_key_values
    begin.batch_repeat_interleave(len(chats))
    rows = [asked[shared:] + answer for asked, answer in chats]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [_END] * (longest - len(row)) for row in rows])
    wanted = torch.full_like(ids, -100)
    for number, (row, (_, answer)) in enumerate(zip(rows, chats, strict=True)):
        wanted[number, len(row) - len(answer) : len(row)] = torch.tensor(answer)
    mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    mask = torch.cat([torch.ones(len(rows), shared, dtype=torch.bool), mask], dim=1)
    loss: torch.Tensor = model(
        ids, past_key_values=begin, attention_mask=mask.long(), labels=wanted
    ).loss
    return loss
