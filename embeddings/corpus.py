"""What both stages read: titles, images and queries of a dataset, by number.

Legend: ``N`` products of the catalog.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from embeddings import distributed
from embeddings.catalog import Catalog
from embeddings.config import DashClipTraining
from embeddings.dashclip import DashClip
from embeddings.freezing import FrozenDepth
from embeddings.image_bank import ImageBank
from embeddings.images import ImageFaults
from embeddings.products import Products
from embeddings.relevance import hash_fraction
from embeddings.starts import Start, tokenize
from embeddings.text_bank import TextBank
from features.id_map import hash_strings

_GIB = 1 << 30


class Corpus:
    """Titles and images of a catalog, and queries.

    Args:
        catalog: the products.
        start: gives the tokenizer.
        config: of the run.
        work: folder for what does not fit into memory.
        bfloat16: whether frozen layers compute in bfloat16.

    Attributes:
        faults: of the images.
        images_read: products with a readable image, as far as images were read.
    """

    def __init__(
        self,
        catalog: Catalog,
        start: Start,
        config: DashClipTraining,
        work: Path,
        bfloat16: bool,
    ) -> None:
        self.catalog = catalog
        self.faults = ImageFaults(config.max_broken_images)
        self.images_read = 0
        self._start = start
        self._config = config
        self._work = work
        self._bfloat16 = bfloat16
        encoded = catalog.titles.dictionary_encode()
        self._titles: pa.Array = encoded.dictionary
        self._title_of = torch.from_numpy(
            encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        )
        self._tokens = tokenize(start, [*encoded.dictionary.to_pylist(), ""])
        self._title_bank: TextBank | None = None
        self._image_bank: ImageBank | None = None
        self._depths = 0, 0

    def products(self, model: DashClip, depth: FrozenDepth) -> Products:
        """Return titles and images as the layers above ``depth`` take them.

        What an earlier call computed is used again where it is the same.
        """
        depths = depth.title, depth.image
        if self._title_bank is None or depths != self._depths:
            # Both anew, so that each has the room that it has in a resumed run.
            self._title_bank, self._image_bank, self._depths = None, None, depths
            if model.config.reads_images:
                self._image_bank = self._read_images(model, depth.image)
            self._title_bank = self._bank(model, self._tokens, depth.title, query=False)
        return Products(titles=self._title_bank, title_of=self._title_of, images=self._image_bank)

    def queries(self, model: DashClip, depth: FrozenDepth, texts: Sequence[str]) -> TextBank:
        """Return the queries as the layers above ``depth`` take them."""
        return self._bank(model, tokenize(self._start, texts), depth.query, query=True)

    def pairs(self, held_out: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows with image and title: to train on, and to evaluate on.

        Titles are held out by the hash of their text, so that no title is on both sides.
        """
        assert self._image_bank is not None
        usable = (self._title_of >= 0) & self._image_bank.has_image
        kept_out = hash_fraction(hash_strings(self._titles), seed=0) < held_out
        rows = usable.nonzero().squeeze(1).numpy()
        out = kept_out[self._title_of[rows].numpy()]
        return rows[~out], rows[out]

    def distinct_titles(self) -> tuple[np.ndarray, list[str]]:
        """Return a catalog row for each distinct title, and the titles."""
        numbers = self._title_of.numpy()
        found, rows = np.unique(numbers, return_index=True)
        kept = found >= 0
        return rows[kept], self._titles.take(pa.array(found[kept])).to_pylist()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        return tokenize(self._start, texts)

    def close(self) -> None:
        """Remove what was written to the work folder."""
        shutil.rmtree(self._work, ignore_errors=True)

    def _read_images(self, model: DashClip, depth: int) -> ImageBank:
        self.faults = ImageFaults(self._config.max_broken_images)
        bank = ImageBank(
            self.catalog,
            model,
            depth=depth,
            room=self._room(),
            faults=self.faults,
            spool=self._work / f"images-{distributed.rank()}.arrow",
            bfloat16=self._bfloat16,
        )
        self.images_read = int(bank.has_image.sum())
        return bank

    def _bank(
        self, model: DashClip, tokens: list[list[int]], depth: int, *, query: bool
    ) -> TextBank:
        return TextBank(
            tokens, model, depth=depth, query=query, room=self._room(), bfloat16=self._bfloat16
        )

    def _room(self) -> float:
        """Return how many bytes are left for what frozen layers say."""
        taken = sum(bank.bytes for bank in (self._image_bank, self._title_bank) if bank)
        return self._config.cache_gib * _GIB - taken
