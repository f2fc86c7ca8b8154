"""Tiny random checkpoints of CLIP, BLIP and FLAVA as their owners publish them, saved by tests."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    FlavaConfig,
    FlavaModel,
    PreTrainedTokenizerFast,
)

from embeddings.batching import quiet_transformers

FAMILIES = ("clip", "blip", "flava")
SIDE = 32

_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "long", "shirt")
_LAYERS = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_TEXT = _LAYERS | {
    "vocab_size": len(_WORDS),
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_RELEASE_NAMES = (
    ("vision_model.encoder.layers.", "visual_encoder.blocks."),
    ("vision_model.post_layernorm.", "visual_encoder.norm."),
    ("vision_model.embeddings.patch_embedding.", "visual_encoder.patch_embed.proj."),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    (".self_attn.projection.", ".attn.proj."),
    (".self_attn.qkv.", ".attn.qkv."),
    (".layer_norm", ".norm"),
)
_IMAGE = _LAYERS | {"image_size": SIDE, "patch_size": 16}


def save_checkpoint(family: str, folder: Path, *, seed: int = 0) -> Path:
    """Save model, tokenizer and image processor of a family and return the folder."""
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(seed)
        _model(family).save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
        _processor(family).save_pretrained(folder)
    return folder


def save_blip_release(path: Path) -> Any:
    """Save a tiny BLIP as its own release names the weights and return transformers' model."""
    wide = {"hidden_size": 64, "num_attention_heads": 1}  # its heads are 64 wide in every size
    text = _TEXT | wide | {"vocab_size": 30_524, "encoder_hidden_size": 64}
    config = BlipConfig(text_config=text, vision_config=_IMAGE | wide, image_text_hidden_size=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BlipForImageTextRetrieval(config).eval()
    weights = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in _RELEASE_NAMES:
            name = name.replace(ours, theirs)
        weights[name] = tensor
    torch.save({"model": weights}, path)
    return model


def _model(family: str) -> Any:
    if family == "clip":
        return CLIPModel(CLIPConfig(text_config=_TEXT, vision_config=_IMAGE, projection_dim=8))
    if family == "blip":
        text = _TEXT | {"encoder_hidden_size": 16, "sep_token_id": 3}
        return BlipForImageTextRetrieval(
            BlipConfig(text_config=text, vision_config=_IMAGE, image_text_hidden_size=8)
        )
    return FlavaModel(
        FlavaConfig(
            text_config=_TEXT,
            image_config=_IMAGE,
            multimodal_config=_LAYERS,
            image_codebook_config={"hidden_size": 16, "num_groups": 1, "num_blocks_per_group": 1},
            hidden_size=16,
            projection_dim=8,
            init_codebook=False,
        )
    )


def _tokenizer() -> Any:
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(_WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=16,
    )


def _processor(family: str) -> Any:
    from transformers import BlipImageProcessor, CLIPImageProcessor, FlavaImageProcessor

    square = {"height": SIDE, "width": SIDE}
    if family == "clip":
        return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square)
    if family == "blip":
        return BlipImageProcessor(size=square)
    return FlavaImageProcessor(size=square, crop_size=square)
