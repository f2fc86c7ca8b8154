"""Where DashCLIP's training starts from (paper, Section 3.2: a BLIP checkpoint).

=====================================  ==========================================================
named                                  start
=====================================  ==========================================================
nothing                                packaged MiniLM; images through a packaged trunk
folder or hub name, ``bert``           that text encoder; images through a packaged trunk
folder or hub name, ``blip``           transformers' ``BlipForImageTextRetrieval``
file ``*.pth``                         BLIP's own release (BLIP-14M and its like)
folder, ``dashclip``                   a model of this project
=====================================  ==========================================================

In all but the last, the query encoder is a copy of the text encoder, and the projections of
products and queries are copies of the titles'.
"""

import copy
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BlipForImageTextRetrieval,
    BlipTextConfig,
    BlipVisionConfig,
)

from embeddings.batching import TOKEN_BUDGET, for_each, padded, quiet_transformers, token_batches
from embeddings.config import StartConfig
from embeddings.dashclip import MODEL_TYPE, DashClip, DashClipConfig
from embeddings.image_trunk import IMAGENET_MEAN, IMAGENET_STD, STRIDE, load_pretrained
from embeddings.text_encoder import TextEncoder
from features.errors import BadInputError

_SAMPLE = 5_000  # titles that the projections are fitted on
_HEAD_SIZE = 64  # of BLIP's attention heads, in every published size
_SPECIAL = ("[DEC]", "[ENC]")  # that BLIP adds to BERT's vocabulary
_RENAMED = (
    (r"^visual_encoder\.blocks\.", "vision_model.encoder.layers."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A model before training.

    Attributes:
        model: the encoders.
        tokenizer: a transformers tokenizer.
        new_projections: whether the projections of texts are still at random; see
            `fit_projections`.
    """

    model: DashClip
    tokenizer: Any
    new_projections: bool = False


def load_start(config: StartConfig, *, reads_images: bool, seed: int) -> Start:
    """Return the model to train.

    Args:
        config: which checkpoint, and the image encoder of starts that have none.
        reads_images: whether the catalog has images; without, a start from a text encoder gets no
            image encoder.
        seed: of new weights.

    Raises:
        BadInputError: the checkpoint cannot be had or is of another architecture.
    """
    name = config.checkpoint
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        if not name:
            folder = str(TextEncoder.packaged().folder)
            return _from_text_encoder(folder, config, reads_images=reads_images)
        if Path(name).suffix in (".pth", ".pt"):
            return _from_blip_release(Path(name))
        kind = model_type(name)
        if kind == "blip":
            return _from_blip(name)
        if kind == MODEL_TYPE:
            return Start(
                model=reading(name, lambda: DashClip.load(Path(name))), tokenizer=_tokenizer(name)
            )
        if kind == "bert":
            return _from_text_encoder(name, config, reads_images=reads_images)
    raise BadInputError(
        f"{name}: is a checkpoint of architecture '{kind}'; expected blip, bert or {MODEL_TYPE}"
    )


def _from_text_encoder(name: str, config: StartConfig, *, reads_images: bool) -> Start:
    """Start from a BERT-like sentence encoder, and from a trunk for the images.

    NOTE[DIFF]: the paper starts from BLIP. Titles and queries are mean-pooled, as the sentence
    encoder was trained; cross-attention is new, so that only the upper layers have it and its
    output starts at zero.
    """
    bert, report = reading(
        name,
        lambda: AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True),
    )
    # BERT's pooler is not used.
    _refuse_lacking(name, [key for key in report["missing_keys"] if not key.startswith("pooler.")])
    vision = None
    if reads_images:
        vision = BlipVisionConfig(
            hidden_size=bert.config.hidden_size,
            intermediate_size=bert.config.intermediate_size,
            num_hidden_layers=config.image_layers,
            num_attention_heads=bert.config.num_attention_heads,
            image_size=config.image_size,
            patch_size=STRIDE,
            initializer_range=0.02,
        )
    tokenizer = _tokenizer(name)
    text = _text_config(bert.config.to_dict(), tokenizer)
    layers = text.num_hidden_layers
    model = DashClip(
        DashClipConfig(
            text_config=text,
            vision_config=vision,
            pooling="mean",
            cross_attention_start=round(layers * 2 / 3),
            image_trunk=config.image_trunk if reads_images else "",
            image_mean=IMAGENET_MEAN,
            image_std=IMAGENET_STD,
            max_tokens=min(config.max_tokens, text.max_position_embeddings),
        )
    )
    _copy_bert(bert, model.text_encoder)
    nn.init.orthogonal_(model.text_proj.weight)
    nn.init.zeros_(model.text_proj.bias)
    if reads_images:
        assert model.vision_model is not None
        load_pretrained(model.vision_model.embeddings, config.image_trunk)
        for layer in model.text_encoder.encoder.layer[model.config.cross_attention_start :]:
            nn.init.zeros_(layer.crossattention.output.dense.weight)
            known = layer.attention.output.LayerNorm.state_dict()
            layer.crossattention.output.LayerNorm.load_state_dict(known)
    return Start(model=_with_query_encoder(model), tokenizer=tokenizer, new_projections=True)


def tokenize(start: Start, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, special tokens included, cut to the model's length."""
    if not len(texts):
        return []
    ids: list[list[int]] = start.tokenizer(
        list(texts),
        truncation=True,
        max_length=start.model.config.max_tokens,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]
    return ids


def fit_projections(start: Start, titles: Sequence[str]) -> None:
    """Set the projections of texts to the principal directions of the encoder's own vectors.

    They keep of the pretrained encoder's cosines what ``D`` dimensions can: its singular value
    decomposition, uncentred, over a sample of titles.

    Args:
        start: changed in place.
        titles: distinct titles; an evenly spaced sample of them is encoded.
    """
    model = start.model.eval()
    hidden = model.config.text_config.hidden_size
    if model.config.projection_dim >= hidden:  # orthogonal from the start: every cosine is kept
        return
    sample = list(titles[:: max(1, len(titles) // _SAMPLE)])
    tokens = tokenize(start, sample)
    lengths = np.array([len(row) for row in tokens])
    vectors = torch.empty(len(tokens), hidden)

    def encode(rows: np.ndarray) -> None:
        ids, mask = padded([tokens[row] for row in rows], start.tokenizer.pad_token_id)
        with torch.inference_mode():
            states = model.run_text(model.embed_text(ids), mask)
            vectors[rows] = nn.functional.normalize(model.pool(states, mask), dim=1)

    for_each(encode, list(token_batches(lengths, TOKEN_BUDGET)))
    _, directions = torch.linalg.eigh(vectors.t().double() @ vectors.double())  # ascending
    weight = directions.flip(1)[:, : model.config.projection_dim].t().float()
    for layer in (model.text_proj, model.product_proj, model.query_proj):
        layer.weight.data.copy_(weight)


def _text_config(bert: dict[str, Any], tokenizer: Any) -> BlipTextConfig:
    """Return the BLIP text configuration of a BERT one."""
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps"),
        "initializer_range",
    )  # and no dropout, as in BLIP's checkpoints
    return BlipTextConfig(
        **{name: bert[name] for name in same},
        pad_token_id=tokenizer.pad_token_id,
        sep_token_id=tokenizer.sep_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )


def _copy_bert(bert: nn.Module, text_encoder: nn.Module) -> None:
    """Copy BERT's weights; BLIP has no segments, so that the first one goes into the positions."""
    weights = {k: v for k, v in bert.state_dict().items() if not k.startswith("pooler.")}
    segment = weights.pop("embeddings.token_type_embeddings.weight")[0]
    positions = "embeddings.position_embeddings.weight"
    weights[positions] = weights[positions] + segment
    missing, unexpected = text_encoder.load_state_dict(weights, strict=False)
    lacking = [key for key in missing if ".crossattention." not in key]
    assert not lacking, lacking
    assert not unexpected, unexpected


def _from_blip(name: str) -> Start:
    """Start from transformers' ``BlipForImageTextRetrieval``."""
    blip, report = reading(
        name,
        lambda: BlipForImageTextRetrieval.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        ),
    )
    _refuse_lacking(name, report["missing_keys"])
    text, vision = blip.config.text_config, blip.config.vision_config
    tokenizer = _tokenizer(name)
    if len(tokenizer) + len(_SPECIAL) == text.vocab_size:
        # Published with BERT's own tokenizer, though BLIP grounds on [ENC].
        tokenizer.add_tokens(list(_SPECIAL), special_tokens=True)
    return _blip_start(text, vision, blip.state_dict(), tokenizer, name)


def _from_blip_release(path: Path) -> Start:
    """Start from a file of BLIP's own release; the shapes of its tensors tell its configuration."""
    if not path.is_file():
        raise BadInputError(f"{path}: no such file")
    content = reading(str(path), lambda: torch.load(path, map_location="cpu", weights_only=True))
    if not isinstance(content, dict) or "model" not in content:
        raise BadInputError(f"{path}: is not a checkpoint of BLIP's release, it has no 'model'")
    weights = rename_blip(content["model"])
    needed = ("text_encoder.embeddings.word_embeddings.weight", "vision_proj.weight")
    _refuse_lacking(str(path), [name for name in needed if name not in weights])
    patches = weights["vision_model.embeddings.patch_embedding.weight"]
    places = weights["vision_model.embeddings.position_embedding"].shape[1] - 1
    vision = BlipVisionConfig(
        hidden_size=patches.shape[0],
        intermediate_size=weights["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_layers(weights, "vision_model.encoder.layers"),
        num_attention_heads=max(1, patches.shape[0] // _HEAD_SIZE),
        image_size=round(places**0.5) * patches.shape[2],
        patch_size=patches.shape[2],
    )
    words = weights["text_encoder.embeddings.word_embeddings.weight"]
    text = BlipTextConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        intermediate_size=weights["text_encoder.encoder.layer.0.intermediate.dense.weight"].shape[
            0
        ],
        num_hidden_layers=_layers(weights, "text_encoder.encoder.layer"),
        num_attention_heads=max(1, words.shape[1] // _HEAD_SIZE),
        max_position_embeddings=weights["text_encoder.embeddings.position_embeddings.weight"].shape[
            0
        ],
    )
    # BLIP's vocabulary is that of BERT, uncased, which the packaged text encoder carries.
    tokenizer = _tokenizer(str(TextEncoder.packaged().folder))
    tokenizer.add_tokens(list(_SPECIAL), special_tokens=True)
    return _blip_start(text, vision, weights, tokenizer, str(path))


def rename_blip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of BLIP's release by transformers' names.

    Momentum encoders, queues and the caption decoder are left out.
    """
    kept = re.compile(r"^(visual_encoder|text_encoder|vision_proj|text_proj|itm_head)\.|^temp$")
    renamed = {}
    for name, tensor in weights.items():
        if not kept.match(name) or name.endswith("position_ids"):
            continue
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _blip_start(
    text: BlipTextConfig,
    vision: BlipVisionConfig,
    weights: dict[str, Tensor],
    tokenizer: Any,
    where: str,
) -> Start:
    if len(tokenizer) > text.vocab_size:
        raise BadInputError(
            f"{where}: knows {text.vocab_size:,} tokens, fewer than the {len(tokenizer):,} of its "
            "tokenizer"
        )
    enc = tokenizer.convert_tokens_to_ids("[ENC]")
    known = enc is not None and enc != tokenizer.unk_token_id and enc < text.vocab_size
    model = DashClip(
        DashClipConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            projection_dim=weights["text_proj.weight"].shape[0],
            grounded_token_id=enc if known else None,
            max_tokens=min(DashClipConfig().max_tokens, text.max_position_embeddings),
        )
    )
    temperature = weights.pop("temp", None)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    new = ("query_encoder.", "query_proj.", "product_proj.", "log_temperature")
    _refuse_lacking(where, [key for key in missing if not key.startswith(new)])
    if unexpected:
        raise BadInputError(f"{where}: holds the unknown weight '{unexpected[0]}'")
    if temperature is not None:
        model.log_temperature.data = temperature.reshape(()).log()
    return Start(model=_with_query_encoder(model), tokenizer=tokenizer)


def _with_query_encoder(model: DashClip) -> DashClip:
    """Start the query encoder and the new projections as copies of the titles' (Section 3.2.2)."""
    weights = model.text_encoder.state_dict()
    model.query_encoder.load_state_dict(
        {key: value for key, value in weights.items() if ".crossattention." not in key}
    )
    for name in ("product_proj", "query_proj"):
        setattr(model, name, copy.deepcopy(model.text_proj))
    return model


def _layers(weights: dict[str, Tensor], prefix: str) -> int:
    found = {int(k[len(prefix) + 1 :].split(".")[0]) for k in weights if k.startswith(prefix + ".")}
    return len(found)


def _refuse_lacking(where: str, missing: Any) -> None:
    lacking = sorted(missing)
    if lacking:
        raise BadInputError(
            f"{where}: is a checkpoint of another architecture, it lacks the weight '{lacking[0]}'"
        )


def model_type(name: str) -> str:
    """Return the architecture that a folder or hub name says it is of."""
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise BadInputError(f"{name}: holds no config.json; expected a transformers checkpoint")
    if Path(name).is_dir():
        try:
            content = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInputError(f"{name}/config.json: not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise BadInputError(f"{name}/config.json: must be a JSON object")
        return str(content.get("model_type", "unknown"))
    return reading(name, lambda: AutoConfig.from_pretrained(name)).model_type


def _tokenizer(name: str) -> Any:
    tokenizer = reading(name, lambda: AutoTokenizer.from_pretrained(name))
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of no file
        raise BadInputError(f"{name}: has no tokenizer that knows a word")
    return tokenizer


def reading(where: str, read: Callable[[], Any]) -> Any:
    """Return what ``read`` reads; what goes wrong is bad input, in one sentence."""
    try:
        return read()
    except (OSError, ValueError, RuntimeError, KeyError, EOFError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BadInputError(f"{where}: cannot be read as a checkpoint: {reason}") from error
    except Exception as error:
        if type(error).__name__ not in ("SafetensorError", "UnpicklingError"):
            raise
        raise BadInputError(f"{where}: is damaged: {error}") from error
