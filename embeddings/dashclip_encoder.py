"""A trained (or untrained) DashCLIP model at work: texts and images in, unit vectors out.

``DashClipEncoder(folder)`` is the one call that loads a saved model with its tokenizer.

Legend: ``N`` products or queries, ``T`` tokens of the longest text of a batch, ``D`` embedding
dimension.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embeddings.batching import TOKEN_BUDGET, for_each, padded, quiet_transformers, token_batches
from embeddings.images import to_pixels
from features.errors import BadInputError
from features.files import fingerprint
from features.hardware import Precision, fast_precision

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from embeddings.dashclip import DashClip

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_IMAGES_A_BATCH = 16


class DashClipEncoder:
    """Encodes products and queries with DashCLIP; implements `embeddings.encoder.Encoder`.

    Args:
        folder: a saved model.
        precision: of the matrix products; by default bfloat16 where the processor has it.

    Raises:
        BadInputError: a file is missing, unreadable, or of another architecture.
    """

    normalized = True

    def __init__(self, folder: Path, *, precision: Precision | None = None) -> None:
        for name in _FILES[:3]:
            if not (folder / name).is_file():
                raise BadInputError(f"{folder}: is no DashCLIP model, it has no {name}")
        model, tokenizer = _load(folder)
        files = [folder / name for name in _FILES if (folder / name).is_file()]
        self._use(model, tokenizer, f"dashclip-{fingerprint(*files)}", precision)

    @classmethod
    def of(
        cls, model: "DashClip", tokenizer: Any, name: str, *, precision: Precision | None = None
    ) -> "DashClipEncoder":
        """Return an encoder around a model in memory; ``name`` stands for its fingerprint."""
        encoder = cls.__new__(cls)
        encoder._use(model, tokenizer, name, precision)
        return encoder

    def _use(
        self, model: "DashClip", tokenizer: Any, name: str, precision: Precision | None
    ) -> None:
        import torch

        self.model = model.eval()
        self.tokenizer = tokenizer
        self.fingerprint = name
        self.dim = int(model.config.projection_dim)
        self.reads_images = bool(model.config.reads_images)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        cuda = self.device.type == "cuda"
        self.precision = precision or ("bfloat16" if cuda else fast_precision())
        model.to(self.device)

    def encode_products(
        self, titles: Sequence[str], images: Sequence["Image.Image | None"] | None = None
    ) -> np.ndarray:
        """Return [N, D] float32 unit vectors of products.

        Args:
            titles: [N] texts, empty where a product has none.
            images: [N] decoded images, None where a product has none.
        """
        tokens = self._tokens(titles)
        pictures = (
            list(images) if images is not None and self.reads_images else [None] * len(tokens)
        )
        has_image = np.array([picture is not None for picture in pictures], bool)
        encoded = np.empty((len(tokens), self.dim), np.float32)

        def plain(rows: np.ndarray) -> "torch.Tensor":
            ids, mask = self._padded(tokens, rows)
            states = self.model.run_text(self.model.embed_text(ids), mask)
            return self.model.product_embedding(self.model.pool(states, mask))

        def grounded(rows: np.ndarray) -> "torch.Tensor":
            ids, mask = self._padded(tokens, rows)
            image_tokens = self._image_tokens([pictures[row] for row in rows])
            states = self.model.embed_text(self.model.ground(ids))
            states = self.model.run_text(states, mask, image_tokens=image_tokens)
            return self.model.product_embedding(self.model.pool(states, mask))

        self._run(plain, np.flatnonzero(~has_image), tokens, encoded)
        self._run(grounded, np.flatnonzero(has_image), tokens, encoded, _IMAGES_A_BATCH)
        return encoded

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Return [N, D] float32 unit vectors of queries."""
        return self._encode_texts(texts, query=True)

    def encode_titles(self, texts: Sequence[str]) -> np.ndarray:
        """Return [N, D] float32 unit vectors of titles, from the text encoder without images."""
        return self._encode_texts(texts, query=False)

    def encode_images(self, images: Sequence["Image.Image | None"]) -> np.ndarray:
        """Return [N, D] float32 unit vectors of images; zeros where there is none.

        Raises:
            BadInputError: the model reads no images.
        """
        if not self.reads_images:
            raise BadInputError("this DashCLIP model was trained without images and reads none")
        encoded = np.zeros((len(images), self.dim), np.float32)

        def encode(rows: np.ndarray) -> "torch.Tensor":
            found = [image for row in rows if (image := images[row]) is not None]
            return self.model.image_embedding(self._image_tokens(found))

        rows = np.array([row for row, image in enumerate(images) if image is not None], np.int64)
        batches = [rows[i : i + _IMAGES_A_BATCH] for i in range(0, len(rows), _IMAGES_A_BATCH)]
        self._for_each(encode, batches, encoded)
        return encoded

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        from embeddings.starts import Start, tokenize

        return tokenize(Start(model=self.model, tokenizer=self.tokenizer), texts)

    def _encode_texts(self, texts: Sequence[str], *, query: bool) -> np.ndarray:
        tokens = self._tokens(texts)
        encoded = np.empty((len(tokens), self.dim), np.float32)
        embed = self.model.query_embedding if query else self.model.title_embedding

        def encode(rows: np.ndarray) -> "torch.Tensor":
            ids, mask = self._padded(tokens, rows)
            states = self.model.embed_text(ids, query=query)
            states = self.model.run_text(states, mask, query=query)
            return embed(self.model.pool(states, mask))

        self._run(encode, np.arange(len(tokens)), tokens, encoded)
        return encoded

    def _run(
        self,
        encode: Callable[[np.ndarray], "torch.Tensor"],
        rows: np.ndarray,
        tokens: list[list[int]],
        encoded: np.ndarray,
        most: int = TOKEN_BUDGET,
    ) -> None:
        """Encode some rows in batches of like length, of at most ``most`` texts."""
        lengths = np.fromiter((len(tokens[row]) for row in rows), np.int64, len(rows))
        scale = 1 if self.device.type == "cpu" else 32
        batches = [
            rows[batch[start : start + most * scale]]
            for batch in token_batches(lengths, TOKEN_BUDGET * scale)
            for start in range(0, len(batch), most * scale)
        ]
        self._for_each(encode, batches, encoded)

    def _for_each(
        self,
        encode: Callable[[np.ndarray], "torch.Tensor"],
        batches: Sequence[np.ndarray],
        encoded: np.ndarray,
    ) -> None:
        import torch

        def work(rows: np.ndarray) -> None:
            fast = self.precision == "bfloat16"
            kind = self.device.type
            with torch.inference_mode(), torch.autocast(kind, torch.bfloat16, enabled=fast):
                encoded[rows] = encode(rows).float().cpu().numpy()

        if self.device.type == "cpu":
            for_each(work, batches)
        else:
            for rows in batches:
                work(rows)

    def _padded(
        self, tokens: list[list[int]], rows: np.ndarray
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        ids, mask = padded([tokens[row] for row in rows], self.tokenizer.pad_token_id)
        return ids.to(self.device), mask.to(self.device)

    def _image_tokens(self, images: Sequence["Image.Image"]) -> "torch.Tensor":
        config = self.model.config
        size = config.vision_config.image_size
        pixels = to_pixels(images, size, config.image_mean, config.image_std)
        return self.model.run_image(self.model.embed_image(pixels.to(self.device)))


def _load(folder: Path) -> tuple["DashClip", Any]:
    from transformers import AutoTokenizer

    from embeddings.dashclip import MODEL_TYPE, DashClip
    from embeddings.starts import model_type, reading

    kind = model_type(str(folder))
    if kind != MODEL_TYPE:
        raise BadInputError(f"{folder}: is a checkpoint of architecture '{kind}', not {MODEL_TYPE}")
    with quiet_transformers():
        model = reading(str(folder), lambda: DashClip.load(folder))
        tokenizer = reading(str(folder), lambda: AutoTokenizer.from_pretrained(folder))
    return model, tokenizer
