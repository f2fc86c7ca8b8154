"""Small DashCLIP models, the checkpoints that one may start from, and a catalog of photos."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipTextConfig,
    BlipVisionConfig,
)

from embeddings.batching import quiet_transformers
from embeddings.catalog import read_catalog
from embeddings.dashclip import DashClip, DashClipConfig, Pooling
from embeddings.image_trunk import load_pretrained
from embeddings.relevance import read_relevance, split_queries
from embeddings.starts import Start
from embeddings.text_encoder import TextEncoder

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 40),
    "blue": (30, 60, 220),
    "yellow": (240, 220, 40),
    "black": (20, 20, 20),
    "pink": (250, 150, 190),
}
THINGS = ("shirt", "skirt", "shoe", "bag", "watch", "sock")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[ENC]", *COLOURS, *THINGS, "new", "old")
SIDE = 32  # of the images that the tiny models read
BERT_WORDS = 30_522

_RELEASE_NAMES = (
    ("vision_model.encoder.layers.", "visual_encoder.blocks."),
    ("vision_model.post_layernorm.", "visual_encoder.norm."),
    ("vision_model.embeddings.patch_embedding.", "visual_encoder.patch_embed.proj."),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    (".self_attn.projection.", ".attn.proj."),
    (".self_attn.qkv.", ".attn.qkv."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
)


def tiny_model(
    *,
    images: bool = True,
    pooling: Pooling = "mean",
    cross_attention_start: int = 0,
    grounded_token_id: int | None = None,
    layers: int = 3,
    trunk: str = "",
    dim: int = 16,
    dropout: float = 0.0,
    seed: int = 0,
) -> DashClip:
    """Return encoders of 32 dimensions whose weights are all drawn anew, biases too.

    Args:
        images: whether there is an image encoder (of 2 layers over 4 patches).
        pooling: of texts.
        cross_attention_start: the first layer that attends to images.
        grounded_token_id: what a grounded text starts with.
        layers: of the text encoder.
        trunk: packaged image trunk in place of patches; images of 64 pixels then.
        dim: of the embeddings.
        dropout: in training mode.
        seed: the same one gives the same weights.
    """
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    text = BlipTextConfig(
        vocab_size=len(WORDS),
        num_hidden_layers=layers,
        max_position_embeddings=24,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **_SPECIAL_IDS,
        **shape,
    )
    vision = BlipVisionConfig(
        num_hidden_layers=2, image_size=64 if trunk else SIDE, patch_size=16, **shape
    )
    config = DashClipConfig(
        text_config=text,
        vision_config=vision if images else None,
        projection_dim=dim,
        pooling=pooling,
        cross_attention_start=cross_attention_start if images else 0,
        grounded_token_id=grounded_token_id,
        image_trunk=trunk,
        max_tokens=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DashClip(config)
        _draw(model)
    if trunk:
        load_pretrained(model.vision_model.embeddings, trunk)
    return model.eval()


def tiny_start(**changes: Any) -> Start:
    """Return `tiny_model` with its tokenizer."""
    return Start(model=tiny_model(**changes), tokenizer=tiny_tokenizer())


def tiny_tokenizer() -> Any:
    """Return a BERT tokenizer that knows `WORDS`."""
    return BertTokenizerFast(
        vocab={word: number for number, word in enumerate(WORDS)}, model_max_length=24
    )


def tiny_dashclip(folder: Path, **changes: Any) -> Path:
    """Save `tiny_model` with its tokenizer, as training does, and return the folder."""
    start = tiny_start(**changes)
    with quiet_transformers():
        start.model.save_pretrained(folder)
        start.tokenizer.save_pretrained(folder)
    return folder


def tiny_bert(folder: Path, *, hidden: int = 32, layers: int = 3, seed: int = 0) -> Path:
    """Save a BERT encoder of random weights with its tokenizer, and return the folder."""
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=24,
    )
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        model = BertModel(config)
        _draw(model)
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_blip(folder: Path, *, seed: int = 0) -> Path:
    """Save a ``BlipForImageTextRetrieval`` with BERT's own tokenizer, and return the folder.

    As in the published ones the vocabulary has two words more than the tokenizer.
    """
    with quiet_transformers():
        _blip(seed).save_pretrained(folder)
        AutoTokenizer.from_pretrained(TextEncoder.packaged().folder).save_pretrained(folder)
    return folder


def tiny_blip_release(path: Path, *, seed: int = 0, temperature: float = 0.05) -> Path:
    """Save the weights of `tiny_blip` as BLIP's own release names them, with all that it holds."""
    weights = {}
    for name, tensor in _blip(seed).state_dict().items():
        for ours, theirs in _RELEASE_NAMES:
            name = name.replace(ours, theirs)
        weights[name] = tensor
    for name in list(weights):
        if not name.startswith("itm_head"):
            part, rest = name.split(".", 1)
            weights[f"{part}_m.{rest}"] = torch.zeros_like(weights[name])
    weights |= {
        "temp": torch.tensor(temperature),
        "image_queue": torch.zeros(16, 8),
        "text_queue": torch.zeros(16, 8),
        "queue_ptr": torch.zeros(1, dtype=torch.long),
        "text_encoder.embeddings.position_ids": torch.arange(24)[None],
        "text_decoder.bert.encoder.layer.0.attention.self.query.weight": torch.zeros(64, 64),
        "text_decoder.cls.predictions.bias": torch.zeros(BERT_WORDS + 2),
    }
    torch.save({"model": weights, "epoch": 19}, path)
    return path


def tiny_catalog(
    folder: Path,
    *,
    products: int = 24,
    images: bool = True,
    without_image: tuple[int, ...] = (),
    without_title: tuple[int, ...] = (),
    broken: tuple[int, ...] = (),
    relevance: bool = True,
) -> Path:
    """Write a dataset folder of coloured things and return it.

    Product ``1000 + n`` is of colour ``n % 6`` and the thing ``n // 6 % 6``, which is its aisle.
    Queries are "thing" and "colour thing"; a product is highly relevant to both of its own and
    mildly to the other colours of its thing.

    Args:
        folder: is made where missing.
        products: how many; up to 36 differ in colour or thing.
        images: whether the catalog has a column of images.
        without_image: rows that have none.
        without_title: rows that have none.
        broken: rows whose image is damaged.
        relevance: whether to write relevance labels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.arange(products)
    colour = [list(COLOURS)[n % len(COLOURS)] for n in rows]
    thing = [THINGS[n // len(COLOURS) % len(THINGS)] for n in rows]
    titles = [f"{c} {t}" + " new" * (n % 3) for n, c, t in zip(rows, colour, thing, strict=True)]
    table = {
        "product_id": pa.array(1000 + rows, pa.int64()),
        "title": pa.array([None if n in without_title else titles[n] for n in rows], pa.string()),
        "aisle": pa.array(thing),
    }
    if images:
        photos = [None if n in without_image else photo(colour[n], n) for n in rows]
        for n in broken:
            photos[n] = b"\x89PNG damaged"
        table["image"] = pa.array(photos, pa.binary())
    pq.write_table(pa.table(table), folder / "catalog.parquet")
    if relevance:
        _write_relevance(folder, colour, thing)
    (folder / "dataset.toml").write_text(
        'name = "tiny"\nlicence = "none"\nprovenance = "made up"\ncaveat = "generated for tests"\n'
    )
    return folder


def tiny_labels(data: Path, folder: Path) -> Path:
    """Write labels of a model as ``label-relevance label`` does, and return their folder.

    They are of every other pair of the training queries of `tiny_catalog`, whose mild relevance
    they miss, and of a training query of their own, "old shirt".

    Args:
        data: folder of `tiny_catalog`.
        folder: is made where missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    relevance = read_relevance(data, read_catalog(data))
    training = split_queries(relevance)[0]
    training = training.take(np.arange(0, len(training), 2))
    rows = [
        (relevance.queries[query], 1000 + int(product), 2 * int(label == 2))
        for query, product, label in zip(
            training.query, training.product, training.label, strict=True
        )
    ]
    query, product, label = zip(*rows, ("old shirt", 1000, 2), strict=True)
    table = {
        "query": pa.array(query),
        "product_id": pa.array(product, pa.int64()),
        "label": pa.array(label, pa.int8()),
        "source": pa.array(["llm"] * len(label)),
        "probability": pa.array([0.9] * len(label), pa.float32()),
    }
    pq.write_table(pa.table(table), folder / "part-00000.parquet")
    return folder


def picture(colour: str, seed: int = 0) -> Image.Image:
    """Return an image of 20 by 12 pixels in that colour, a little noisy."""
    noise = np.random.default_rng(seed).integers(-20, 20, (12, 20, 3))
    return Image.fromarray(np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8))


def photo(colour: str, seed: int = 0) -> bytes:
    """Return `picture` as the content of a PNG file."""
    content = io.BytesIO()
    picture(colour, seed).save(content, "PNG")
    return content.getvalue()


_SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}


def _blip(seed: int) -> BlipForImageTextRetrieval:
    """Text of 64 dimensions and images of 128: heads are 64 wide, as in all published sizes."""
    shape = {"num_hidden_layers": 3, "intermediate_size": 48}
    text = BlipTextConfig(
        vocab_size=BERT_WORDS + 2,
        hidden_size=64,
        num_attention_heads=1,
        encoder_hidden_size=128,
        max_position_embeddings=24,
        **shape,
    )
    vision = BlipVisionConfig(
        hidden_size=128, num_attention_heads=2, image_size=SIDE, patch_size=16, **shape
    )
    config = BlipConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), image_text_hidden_size=16
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BlipForImageTextRetrieval(config)
        _draw(model)
    return model.eval()


@torch.no_grad()
def _draw(model: torch.nn.Module) -> None:
    """Draw weights large enough for every part to make a difference; a trunk stays as it is."""
    for name, parameter in model.named_parameters():
        if ".trunk." in name or name == "log_temperature":
            continue
        if "norm" in name.lower() and name.endswith("weight"):
            parameter.normal_(1, 0.1)
        else:
            parameter.normal_(0, 0.15)


def _write_relevance(folder: Path, colour: list[str], thing: list[str]) -> None:
    queries = sorted({*thing, *(f"{c} {t}" for c, t in zip(colour, thing, strict=True))})
    labels = []
    for query in queries:
        *wanted, kind = query.split()
        for row, (c, t) in enumerate(zip(colour, thing, strict=True)):
            grade = 0 if t != kind else 2 if not wanted or wanted == [c] else 1
            labels.append((query, 1000 + row, grade))
    query, product, label = zip(*labels, strict=True)
    table = {
        "query": pa.array(query),
        "product_id": pa.array(product, pa.int64()),
        "label": pa.array(label, pa.int8()),
        "source": pa.array(["derived"] * len(labels)),
    }
    pq.write_table(pa.table(table), folder / "relevance.parquet")
