"""The parts of the two-tower DCN ranker (the paper's Figure 3).

Legend: ``C`` candidates, ``F`` input features of a cross, ``B`` requests, ``E`` embedding dim.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranking.versions import check_versions

check_versions()

from torchrec.modules.crossnet import CrossNet, LowRankCrossNet  # noqa: E402


class FullRankCrossNet(CrossNet):
    r"""torchrec's `CrossNet`, computed as one matrix product a layer.

    .. math:: x_{l+1} = x_0 \odot (W_l x_l + b_l) + x_l

    (DCN-V2, https://arxiv.org/abs/2008.13535, equation 1.) The parent multiplies ``W_l`` with C
    column vectors one by one; the figures are the same.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the parent's name)
        """Cross ``input`` [C, F] with itself; returns [C, F]."""
        x = input
        for kernel, bias in zip(self.kernels, self.bias, strict=True):
            x = torch.addcmul(x, input, F.linear(x, kernel, bias.squeeze(1)))
        return x


def cross_network(features: int, layers: int, rank: int) -> nn.Module:
    """Return a cross network over ``features`` inputs.

    Low rank costs ``4 F r`` operations a row and layer against ``2 F^2``; DCN-V2 finds no loss at
    ``r = F / 4``. ``rank`` 0 means full matrices.
    """
    if rank:
        return LowRankCrossNet(features, layers, low_rank=min(rank, features))
    return FullRankCrossNet(features, layers)


def deep_network(features: int, widths: Sequence[int]) -> nn.Sequential:
    """Return fully connected layers with ReLU of the given widths."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(features, width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers)


class CrossTower(nn.Module):
    """A cross network beside a deep network over the same input; both outputs concatenated."""

    def __init__(self, features: int, layers: int, rank: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.cross = cross_network(features, layers, rank)
        self.deep = deep_network(features, widths)
        self.width = features + (widths[-1] if widths else features)

    def forward(self, x_cf: Tensor) -> Tensor:
        """Return [C, width] of inputs [C, F]."""
        return torch.cat([self.cross(x_cf), self.deep(x_cf)], dim=1)


class EmbeddingTower(nn.Module):
    """Crosses product, query and history embeddings and their cosine similarities first.

    The paper's Section 4.2: the projected embeddings of the candidate product, the query and the
    mean-pooled purchase history, with cos(product, query) and cos(product, history), are crossed
    among themselves before they meet the other features.
    """

    def __init__(
        self,
        dims: dict[str, int],
        projection: int,
        layers: int,
        rank: int,
        widths: Sequence[int],
    ) -> None:
        """Create the tower.

        Args:
            dims: embedding dimension of ``product``, ``query`` and, where used, ``history``.
            projection: dimension that each is projected to.
            layers: cross layers.
            rank: of the cross matrices, 0 for full.
            widths: of the deep network.
        """
        super().__init__()
        self.context = [name for name in dims if name != "product"]
        self.project = nn.ModuleDict(
            {name: nn.Linear(dim, projection, bias=False) for name, dim in dims.items()}
        )
        features = len(dims) * projection + len(self.context)
        self.tower = CrossTower(features, layers, rank, widths)
        self.width = self.tower.width

    def forward(
        self, product_ce: Tensor, context_be: dict[str, Tensor], request_c: Tensor
    ) -> Tensor:
        """Return [C, width].

        Args:
            product_ce: [C, E] embeddings of the candidates.
            context_be: [B, E] embeddings of the query and, where used, the history.
            request_c: [C] the request that each candidate belongs to.
        """
        similarity = cosine_similarities(
            product_ce, torch.stack([context_be[name] for name in self.context]), request_c
        )
        context = torch.cat([self.project[name](context_be[name]) for name in self.context], dim=1)
        return self.tower(
            torch.cat(
                [
                    self.project["product"](product_ce),
                    context.index_select(0, request_c),
                    similarity,
                ],
                dim=1,
            )
        )


def cosine_similarities(product_ce: Tensor, context_kbe: Tensor, request_c: Tensor) -> Tensor:
    """Return [C, K] cosines of each candidate with its request's K vectors.

    A zero vector (an unknown product or query, an empty history) has cosine 0 with everything.
    """
    product = F.normalize(product_ce, dim=1)
    context = F.normalize(context_kbe, dim=2)
    return torch.stack(
        [(product * vectors.index_select(0, request_c)).sum(1) for vectors in context], dim=1
    )
