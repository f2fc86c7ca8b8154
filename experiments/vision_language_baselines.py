"""CLIP, BLIP and FLAVA as Section 4.1 compares with them: text and image vectors of one space.

Each is loaded from a name on the model hub or from a local folder, and gives what its contrastive
loss compares, after the last projection:

=====  ======================================  ==================================================
model  class                                   text and image
=====  ======================================  ==================================================
clip   ``CLIPModel``                           end-of-text token, class token
blip   ``BlipForImageTextRetrieval``, or a     class tokens of the unimodal encoders
       ``.pth`` file of BLIP's own release
flava  ``FlavaModel``                          class tokens of the unimodal encoders
=====  ======================================  ==================================================

Legend: ``N`` texts or images, ``D`` embedding dimension.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from features.console import say
from features.errors import BadInputError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

Family = Literal["clip", "blip", "flava"]

DEFAULT_CHECKPOINTS: dict[Family, str] = {
    "clip": "openai/clip-vit-base-patch32",
    # NOTE[DIFF]: the paper takes BLIP's checkpoint pre-trained on 14 million images, which is
    # published as a .pth file only; the hub has this one, tuned for retrieval on COCO.
    "blip": "Salesforce/blip-itm-base-coco",
    "flava": "facebook/flava-full",
}

_TEXTS_A_BATCH = 64
_IMAGES_A_BATCH = 16
_HUB_SECONDS = 5
_RELEASE_SUFFIXES = (".pth", ".pt")


class CheckpointMissingError(Exception):
    """A checkpoint is neither on this machine nor to be had; the message says which."""


class VisionLanguageModel(Protocol):
    """Maps texts and images to vectors of one space."""

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return [N, D] float32 vectors of texts."""
        ...

    def encode_images(self, images: Sequence["Image.Image"]) -> np.ndarray:
        """Return [N, D] float32 vectors of RGB images."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """How a family is loaded and read; ``used`` begins the names of the weights that matter."""

    model_class: str
    text: Callable[[Any, dict[str, "Tensor"]], "Tensor"]
    image: Callable[[Any, "Tensor"], "Tensor"]
    used: tuple[str, ...]


_RECIPES: dict[Family, _Recipe] = {
    "clip": _Recipe(
        model_class="CLIPModel",
        text=lambda m, tokens: m.text_projection(m.text_model(**tokens).pooler_output),
        image=lambda m, pixels: m.visual_projection(m.vision_model(pixels).pooler_output),
        used=("text_model.", "vision_model.", "text_projection.", "visual_projection."),
    ),
    "blip": _Recipe(
        model_class="BlipForImageTextRetrieval",
        text=lambda m, tokens: m.text_proj(m.text_encoder(**tokens).last_hidden_state[:, 0]),
        image=lambda m, pixels: m.vision_proj(m.vision_model(pixels).last_hidden_state[:, 0]),
        used=("text_encoder.", "vision_model.", "text_proj.", "vision_proj."),
    ),
    "flava": _Recipe(
        model_class="FlavaModel",
        text=lambda m, tokens: m.text_projection(m.text_model(**tokens).last_hidden_state[:, 0]),
        image=lambda m, pixels: m.image_projection(m.image_model(pixels).last_hidden_state[:, 0]),
        used=("text_model.", "image_model.", "text_projection.", "image_projection."),
    ),
}


def load_baseline(family: Family, name: str) -> VisionLanguageModel:
    """Return a pretrained model, ready to encode.

    A local folder or file is read; a hub name is looked up in the local cache and only then, if the
    hub answers within 5 seconds, fetched.

    Args:
        family: which of the three.
        name: hub name or local folder; for BLIP a ``.pth`` file of its own release too.

    Raises:
        CheckpointMissingError: there is no such folder, or the cache lacks it and the hub cannot be
            reached or does not know it.
        BadInputError: what is there is unreadable or of another architecture.
    """
    path = Path(name)
    if path.suffix in _RELEASE_SUFFIXES:
        return _load_release(family, path)
    if path.is_dir():
        return _load(family, str(path), name)
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise CheckpointMissingError(f"{name}: no such folder")
    cached = _cached(name)
    if cached is not None:
        return _load(family, str(cached), name)
    _ask_hub(name)
    say(f"{name}: fetching it from the model hub")
    return _load(family, name, name)


class _Transformer:
    """A transformers model with its tokenizer and image processor."""

    def __init__(self, recipe: _Recipe, model: Any, tokenizer: Any, processor: Any) -> None:
        import torch

        self.recipe = recipe
        self.tokenizer = tokenizer
        self.processor = processor
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.eval().to(self.device)
        positions = model.config.text_config.max_position_embeddings
        self.max_tokens = min(tokenizer.model_max_length, positions)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return [N, D] float32 vectors of texts; texts of like length go together."""
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        encoded: np.ndarray | None = None
        for start in range(0, len(order), _TEXTS_A_BATCH):
            rows = order[start : start + _TEXTS_A_BATCH]
            tokens = self.tokenizer(
                [texts[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            )
            given = {key: tokens[key].to(self.device) for key in ("input_ids", "attention_mask")}
            vectors = self._run(self.recipe.text, given)
            if encoded is None:
                encoded = np.empty((len(texts), vectors.shape[1]), np.float32)
            encoded[rows] = vectors
        assert encoded is not None, "no texts"
        return encoded

    def encode_images(self, images: Sequence["Image.Image"]) -> np.ndarray:
        """Return [N, D] float32 vectors of RGB images, prepared by the model's own processor."""
        parts = []
        for start in range(0, len(images), _IMAGES_A_BATCH):
            batch = list(images[start : start + _IMAGES_A_BATCH])
            pixels = self.processor(batch, return_tensors="pt")["pixel_values"]
            parts.append(self._run(self.recipe.image, pixels.to(self.device)))
        return np.concatenate(parts)

    def _run(self, forward: Callable[[Any, Any], "Tensor"], given: Any) -> np.ndarray:
        import torch

        from features.hardware import fast_precision

        kind = self.device.type
        fast = kind == "cuda" or fast_precision() == "bfloat16"
        with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=fast):
            return forward(self.model, given).float().cpu().numpy()


class _BlipRelease:
    """A checkpoint of BLIP's own release, which the start of DashCLIP's training reads too."""

    def __init__(self, path: Path) -> None:
        from embeddings.config import StartConfig
        from embeddings.dashclip_encoder import DashClipEncoder
        from embeddings.starts import load_start

        start = load_start(StartConfig(checkpoint=str(path)), reads_images=True, seed=0)
        self.encoder = DashClipEncoder.of(start.model, start.tokenizer, str(path))

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return [N, D] float32 vectors of texts."""
        return self.encoder.encode_titles(texts)

    def encode_images(self, images: Sequence["Image.Image"]) -> np.ndarray:
        """Return [N, D] float32 vectors of RGB images."""
        return self.encoder.encode_images(images)


def _load_release(family: Family, path: Path) -> VisionLanguageModel:
    if not path.is_file():
        raise CheckpointMissingError(f"{path}: no such file")
    if family != "blip":
        raise BadInputError(f"{path}: a file is a checkpoint of BLIP's release, not of {family}")
    return _BlipRelease(path)


def _load(family: Family, where: str, name: str) -> VisionLanguageModel:
    """Load from a folder or, given a hub name, from the hub; ``name`` stands in messages."""
    import torch
    import transformers

    from embeddings.batching import quiet_transformers
    from embeddings.starts import model_type, reading

    recipe = _RECIPES[family]
    with quiet_transformers():
        kind = model_type(where)
        if kind != family:
            raise BadInputError(f"{name}: is a checkpoint of architecture '{kind}', not {family}")
        model_class = getattr(transformers, recipe.model_class)
        model, report = reading(
            name,
            lambda: model_class.from_pretrained(
                where, dtype=torch.float32, output_loading_info=True
            ),
        )
        tokenizer = reading(name, lambda: transformers.AutoTokenizer.from_pretrained(where))
        processor = reading(name, lambda: transformers.AutoImageProcessor.from_pretrained(where))
    # A weight left at random would make nonsense of a row; poolers are not read but for CLIP's.
    lacking = [key for key in report["missing_keys"] if key.startswith(recipe.used)]
    lacking = sorted(key for key in lacking if ".pooler." not in key)
    if lacking:
        raise BadInputError(f"{name}: the weights lack '{lacking[0]}'")
    return _Transformer(recipe, model, tokenizer, processor)


def _cached(name: str) -> Path | None:
    """Return the folder of the local cache that holds a hub's checkpoint, if it has the weights."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):  # not there; not a name that the hub could have
        return None
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    return folder if weights and (folder / "config.json").is_file() else None


def _ask_hub(name: str) -> None:
    """Raise `CheckpointMissingError` unless the hub answers soon and knows the checkpoint.

    Asking once comes first because loading would try again and again for half a minute.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=_HUB_SECONDS)
    except Exception as error:  # of several libraries, by version; each means that it cannot be had
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        say(f"{name}: the model hub does not give it: {reason}")
        raise CheckpointMissingError(f"{name}: not on this machine nor to be had") from error
