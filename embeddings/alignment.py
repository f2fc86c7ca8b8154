"""Stage 2: aligning query and product encoders on graded relevance (paper, Section 3.2.2).

Each distinct query and product of a batch is encoded once; several processes share them out and
gather what they made.

Legend: ``B`` tuples of a batch over all processes, ``b`` those of this process, ``K`` negatives of
a tuple, ``P`` distinct products, ``Q`` distinct queries, ``D`` embedding dimension.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from embeddings import distributed
from embeddings.config import AlignmentConfig
from embeddings.dashclip import DashClip
from embeddings.losses import product_query_contrast, similarities
from embeddings.mining import mine
from embeddings.products import Products
from embeddings.sampling import Tuples, TupleSampler
from embeddings.stage import Batch
from embeddings.text_bank import TextBank


class Alignment:
    """Stage 2.

    Args:
        model: the encoders.
        config: of the stage.
        products: titles and images.
        queries: the queries, numbered as the sampler numbers them.
        sampler: draws the tuples.
        seed: of the draws among mined products.
        bfloat16: whether mining computes in bfloat16.
    """

    name = "stage 2"

    def __init__(
        self,
        model: DashClip,
        config: AlignmentConfig,
        products: Products,
        queries: TextBank,
        sampler: TupleSampler,
        *,
        seed: int = 0,
        bfloat16: bool = False,
    ) -> None:
        self.model = model
        self.config = config
        self.examples = len(sampler)
        self._products = products
        self._queries = queries
        self._sampler = sampler
        self._seed = seed
        self._bfloat16 = bfloat16
        depth = min(config.mining_depth, len(sampler.products)) if config.mined_products else 0
        # Rows that rank high for each query, and the epoch before which they were ranked.
        self._mined = torch.zeros(len(queries.lengths), depth, dtype=torch.long)
        self._mined_for = torch.full((1,), -1)

    def batches(self, epoch: int, size: int) -> Iterator[Batch]:
        """Yield products, positives ``[B]``, negatives ``[B, K]`` (-1: none), mined ``[B, M]``."""
        if self.config.mined_products and int(self._mined_for) != epoch:
            self._mine(epoch)
        rng = np.random.default_rng((self._seed, 4, epoch))
        depth, count = self._mined.shape[1], self.config.mined_products
        left: Tuples | None = None
        for block in self._sampler.blocks(epoch):
            if left is not None and len(left):
                block = _joined(left, block)
            whole = len(block) // size * size
            for start in range(0, whole, size):
                part = block[start : start + size]
                drawn = rng.integers(0, max(depth, 1), (size, count))
                mined = self._mined.numpy()[part.positive[:, None], drawn] if count else drawn
                yield part.product, part.positive, part.negative, mined
            left = block[whole:]

    def prepare(self, batch: Batch) -> None:
        """Begin to read this process's images of a batch."""
        if self._products.images is not None:
            rows = np.unique(np.concatenate([batch[0], batch[3].reshape(-1)]))
            self._products.images.prepare(_own_share(rows))

    def loss(self, batch: Batch, *, epoch: float, seed: int) -> tuple[Tensor, dict[str, float]]:
        """Return this process's part of the PQC loss; see `embeddings.stage.Stage`."""
        product, positive, negative, mined = batch
        rows = np.concatenate([product, mined.reshape(-1)])
        products, found = np.unique(rows, return_inverse=True)
        product_of = found[: len(product)]
        both = np.concatenate([positive[:, None], negative], axis=1)
        queries = np.unique(both[both >= 0])
        query_of = np.where(both >= 0, np.searchsorted(queries, both), -1)
        product_vectors = _shared_out(products, lambda rows: self._products.embed(self.model, rows))
        query_vectors = _shared_out(queries, self._embed_queries)
        own = distributed.own_slice(len(product))
        device = product_vectors.device
        mine = torch.from_numpy(product_of[own]).to(device)
        wanted = torch.from_numpy(query_of[own]).to(device)
        cosine = similarities(product_vectors, query_vectors)
        relevant = None
        if self.config.shared_negatives or self.config.symmetric:
            known = self._sampler.is_relevant(products[:, None], queries[None, :])
            relevant = torch.from_numpy(known).to(device)
        shared = None
        if self.config.shared_negatives and relevant is not None:
            shared = ~relevant[mine]
        losses = product_query_contrast(
            cosine[mine],
            wanted[:, 0],
            wanted[:, 1:],
            self.config.temperature,
            shared=shared,
        )
        if self.config.symmetric and relevant is not None:
            losses = (losses + self._backward(cosine, relevant, mine, wanted[:, 0])) / 2
        loss = losses.sum() / len(product)
        return loss, {"loss": float(distributed.total(loss.detach()))}

    def after_step(self) -> None:
        """Nothing follows a step."""

    def evaluate(self) -> dict[str, float]:
        """Return nothing: the stage is watched by its loss."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return what was mined; the sampler depends on the epoch only."""
        if not self.config.mined_products:
            return {}
        return {"mined": self._mined, "mined_for": self._mined_for}

    def _mine(self, epoch: int) -> None:
        """Rank the products that the sampler knows for each of its queries."""
        self.model.eval()
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self._bfloat16):
            rows = mine(
                self._embed_queries,
                lambda rows: self._products.embed(self.model, rows),
                self._sampler.queries,
                self._sampler.products,
                self._mined.shape[1],
            )
        self._mined[torch.from_numpy(self._sampler.queries).long()] = torch.from_numpy(rows)
        self._mined_for.fill_(epoch)

    def _embed_queries(self, rows: Tensor) -> Tensor:
        return self.model.query_embedding(self._queries.pooled(rows))

    def _backward(self, cosine: Tensor, relevant: Tensor, mine: Tensor, positive: Tensor) -> Tensor:
        """Return the ``[b]`` losses of finding the product of each positive query in the batch.

        NOTE[DIFF]: beyond the paper, which contrasts queries for a product only.
        """
        towards = cosine.t()[positive]
        others = ~relevant.t()[positive]
        return product_query_contrast(
            towards, mine, mine[:, None][:, :0], self.config.temperature, shared=others
        )


def _own_share(rows: np.ndarray) -> Tensor:
    """Return this process's share of some rows; all shares are of one size, the last filled up."""
    count = distributed.world()
    share = -(-len(rows) // count)
    padded = np.concatenate([rows, rows[:1].repeat(share * count - len(rows))])
    return torch.from_numpy(padded[distributed.own_slice(len(padded))])


def _shared_out(rows: np.ndarray, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the ``[N, D]`` embeddings of all rows, each process having made a share of them."""
    return distributed.gather(embed(_own_share(rows)))[: len(rows)]


def _joined(first: Tuples, second: Tuples) -> Tuples:
    names = ("product", "positive", "negative")
    return Tuples(**{n: np.concatenate([getattr(first, n), getattr(second, n)]) for n in names})
