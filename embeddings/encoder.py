"""What an encoder offers to those who build tables."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Encoder(Protocol):
    """Maps products and queries to vectors of one space.

    Legend: ``N`` products or queries, ``D`` embedding dimension.

    Attributes:
        fingerprint: a name that changes with everything that the vectors depend on: weights,
            configuration, tokenizer.
        dim: the embedding dimension ``D``.
        normalized: whether each vector has L2 norm 1.
        reads_images: whether `encode_products` looks at images. Where it does not, a title is
            encoded once however many products bear it.
    """

    @property
    def fingerprint(self) -> str: ...  # noqa: D102
    @property
    def dim(self) -> int: ...  # noqa: D102
    @property
    def normalized(self) -> bool: ...  # noqa: D102
    @property
    def reads_images(self) -> bool: ...  # noqa: D102

    def encode_products(
        self, titles: Sequence[str], images: Sequence[bytes | None] | None = None
    ) -> np.ndarray:
        """Return [N, D] float32 vectors of products.

        Args:
            titles: [N] texts.
            images: [N] contents of image files (JPEG or PNG), ``None`` where there is none.
        """
        ...

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Return [N, D] float32 vectors of queries."""
        ...
