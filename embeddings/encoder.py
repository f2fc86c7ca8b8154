"""What an encoder offers to those who build tables."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


class Encoder(Protocol):
    """Maps products and queries to vectors of one space.

    Texts and images of one call are batched as the encoder sees fit. The same call gives the same
    vectors; another grouping of the same texts may change the last bits.

    Legend: ``N`` products or queries, ``D`` embedding dimension.

    Attributes:
        fingerprint: a name that changes with everything that the vectors depend on: weights,
            configuration, tokenizer.
        dim: the embedding dimension ``D``.
        normalized: whether each vector has L2 norm 1.
        reads_images: whether `encode_products` looks at images. Where it does not, a product
            without a title has no vector.
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
        self, titles: Sequence[str], images: "Sequence[Image | None] | None" = None
    ) -> np.ndarray:
        """Return [N, D] float32 vectors of products, each with a title, an image or both.

        Args:
            titles: [N] texts; a missing title is the empty string.
            images: [N] decoded images in RGB, ``None`` where a product has none; ``None`` where
                no product has one.
        """
        ...

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Return [N, D] float32 vectors of queries."""
        ...
