"""Tiny random BERT-like encoders whose tokenizers know the words of `tests.tiny_labels`."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from embeddings.batching import quiet_transformers
from tests.tiny_labels import PRODUCTS

FAMILIES = ("bert", "distilbert", "roberta")
POSITIONS = 32
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_WIDTH, _LAYERS, _HEADS = 16, 4, 2


def save_tiny_bert(folder: Path, *, family: str = "bert", seed: int = 0) -> Path:
    """Save an encoder and its tokenizer and return the folder.

    Args:
        folder: where to.
        family: one of `FAMILIES`.
        seed: of the weights.
    """
    words = sorted({word for title in PRODUCTS for word in title.lower().split()})
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(seed)
        _model(family, len(_SPECIAL) + len(words)).save_pretrained(folder)
        _tokenizer([*_SPECIAL, *words]).save_pretrained(folder)
    return folder


def _model(family: str, vocabulary: int) -> Any:
    sizes = {"vocab_size": vocabulary, "pad_token_id": 0, "initializer_range": 0.2}
    bert = {
        "hidden_size": _WIDTH,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "intermediate_size": 2 * _WIDTH,
    }
    if family == "bert":
        return BertModel(BertConfig(max_position_embeddings=POSITIONS, **bert, **sizes))
    if family == "roberta":  # its positions begin behind the padding's number
        config = RobertaConfig(
            max_position_embeddings=POSITIONS + 1, type_vocab_size=1, **bert, **sizes
        )
        return RobertaModel(config)
    return DistilBertModel(
        DistilBertConfig(
            dim=_WIDTH,
            n_layers=_LAYERS,
            n_heads=_HEADS,
            hidden_dim=2 * _WIDTH,
            max_position_embeddings=POSITIONS,
            **sizes,
        )
    )


def _tokenizer(words: list[str]) -> Any:
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=POSITIONS,
    )
