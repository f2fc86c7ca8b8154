"""The products of a training run: titles, images, and what the grounded encoder makes of both.

Legend: ``N`` products asked for, ``T`` tokens of the longest title, ``L`` image tokens, ``H``
hidden size, ``D`` embedding dimension.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from embeddings.dashclip import DashClip
from embeddings.image_bank import ImageBank
from embeddings.text_bank import TextBank


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Products:
    """Titles and images by catalog row.

    Attributes:
        titles: the distinct titles; the last one is empty and stands for a missing title.
        title_of: [catalog rows] number of the title, -1 where there is none.
        images: the images, or None for a model that reads none.
    """

    titles: TextBank
    title_of: Tensor
    images: ImageBank | None

    def embed(self, model: DashClip, rows: Tensor) -> Tensor:
        """Return ``[N, D]`` unit vectors of products: grounded where there is an image.

        A missing title is an empty text, a missing image leaves the plain text encoder; neither
        drops the product.
        """
        none = torch.zeros(len(rows), dtype=torch.bool)
        pictured = none if self.images is None else self.images.has_image[rows]
        parts, order = [], []
        for where in (~pictured, pictured):
            found = where.nonzero().squeeze(1)
            if not len(found):
                continue
            if self.images is not None and bool(pictured[found[0]]):
                states = self.images.states(rows[found], model)
                tokens = model.run_image(states, first=self.images.layer)
                pooled = self.grounded(model, rows[found], tokens)
            else:
                pooled = self.titles.pooled(self._numbers(rows[found]), model)
            parts.append(model.product_embedding(pooled))
            order.append(found)
        back = torch.cat(order).argsort()
        return torch.cat(parts)[back.to(parts[0].device)]

    def grounded(self, model: DashClip, rows: Tensor, image_tokens: Tensor) -> Tensor:
        """Return ``[N, H]``: titles grounded on ``[N, L, H]`` image tokens, pooled."""
        numbers = self._numbers(rows)
        start = model.config.cross_attention_start

        def encode(part: Tensor) -> Tensor:
            if start and self.titles.depth <= start:
                states, mask = self.titles.states(numbers[part], model)
                first = self.titles.depth
            else:
                ids, mask = self.titles.ids(numbers[part])
                states, first = model.embed_text(model.ground(ids)), 0
            tokens = image_tokens[part.to(image_tokens.device)]
            return model.pool(model.run_text(states, mask, first=first, image_tokens=tokens), mask)

        return self.titles.by_length(numbers, encode)

    def _numbers(self, rows: Tensor) -> Tensor:
        """Return the numbers of titles; the empty one where there is none."""
        numbers = self.title_of[rows]
        return torch.where(numbers < 0, len(self.titles.lengths) - 1, numbers)
