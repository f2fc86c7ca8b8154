"""Stage 1 where there are no images: pseudo-queries cropped out of titles.

A few words of a title should find that title among others. That adapts both encoders to the
catalog's vocabulary (brands, sizes, model numbers) before any label is seen.

NOTE[DIFF]: beyond the paper, whose products all have images. Random crops as positives are those of
Contriever (Izacard and others 2022, Section 3.1), one side being the whole title here.

Legend: ``B`` titles of a batch over all processes, ``b`` those of this process, ``D`` embedding
dimension.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from embeddings import distributed
from embeddings.batching import padded
from embeddings.config import CroppingConfig
from embeddings.dashclip import DashClip
from embeddings.losses import product_query_contrast, similarities
from embeddings.products import Products
from embeddings.stage import Batch

_MOST_WORDS = 4
_CONTIGUOUS = 0.5  # share of the crops whose words stand side by side in the title


class TitleCrops:
    """Trains the encoders to find titles by crops of them.

    Args:
        model: the encoders.
        config: of the stage.
        products: titles.
        rows: catalog rows with distinct titles.
        titles: [rows] their texts.
        tokenize: returns the token ids of texts.
        seed: of orders and crops.
    """

    name = "title crops"

    def __init__(
        self,
        model: DashClip,
        config: CroppingConfig,
        products: Products,
        rows: np.ndarray,
        titles: Sequence[str],
        tokenize: Callable[[Sequence[str]], list[list[int]]],
        *,
        seed: int,
    ) -> None:
        self.model = model
        self.config = config
        self.examples = len(rows)
        self._products = products
        self._rows = rows
        self._titles = titles
        self._tokenize = tokenize
        self._seed = seed

    def batches(self, epoch: int, size: int) -> Iterator[Batch]:
        """Yield positions of titles in an order of the epoch's own."""
        order = np.random.default_rng((self._seed, 3, epoch)).permutation(len(self._rows))
        for start in range(0, len(order) - size + 1, size):
            yield (order[start : start + size],)

    def prepare(self, batch: Batch) -> None:
        """Nothing is to be read: titles are in memory, and there are no images."""

    def loss(self, batch: Batch, *, epoch: float, seed: int) -> tuple[Tensor, dict[str, float]]:
        """Return this process's part of the contrast both ways; see `embeddings.stage.Stage`."""
        places = batch[0]
        own = distributed.own_slice(len(places))
        rng = np.random.default_rng(seed)
        crops = [crop(self._titles[place], rng) for place in places][own]
        product = self._products.embed(self.model, torch.from_numpy(self._rows[places[own]]))
        query = self._embed_crops(crops)
        products, queries = distributed.gather(product), distributed.gather(query)
        mine = torch.arange(len(places), device=product.device)[own]
        losses = [
            product_query_contrast(
                similarities(near, far),
                mine,
                mine[:, None][:, :0],
                self.config.temperature,
                shared=torch.ones(len(mine), len(places), dtype=torch.bool, device=mine.device),
            )
            for near, far in ((product, queries), (query, products))
        ]
        loss = (losses[0] + losses[1]).sum() / (2 * len(places))
        return loss, {"loss": float(distributed.total(loss.detach()))}

    def after_step(self) -> None:
        """Nothing follows a step."""

    def evaluate(self) -> dict[str, float]:
        """Return nothing: the stage is watched by its loss."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return nothing: crops depend on the step only."""
        return {}

    def _embed_crops(self, texts: Sequence[str]) -> Tensor:
        ids, mask = padded(self._tokenize(texts), 0)
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        states = self.model.embed_text(ids, query=True)
        states = self.model.run_text(states, mask, query=True)
        return self.model.query_embedding(self.model.pool(states, mask))


def crop(title: str, rng: np.random.Generator) -> str:
    """Return one to four words of a title in their order, half the time side by side."""
    words = title.split()
    count = min(int(rng.integers(1, _MOST_WORDS + 1)), len(words))
    if rng.random() < _CONTIGUOUS:
        start = int(rng.integers(0, len(words) - count + 1))
        return " ".join(words[start : start + count])
    return " ".join(words[place] for place in sorted(rng.choice(len(words), count, replace=False)))
