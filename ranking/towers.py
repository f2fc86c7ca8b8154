"""The parts of the two-tower DCN ranker (the paper's Figure 3).

Legend: ``C`` candidates, ``F`` input features of a cross, ``B`` requests, ``E`` embedding dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranking.versions import check_versions

check_versions()

from torchrec.modules.crossnet import CrossNet, LowRankCrossNet  # noqa: E402


class SplitCrossNet(nn.Module):
    r"""A cross network whose input has a part that all candidates of a request share.

    .. math:: x_{l+1} = x_0 \odot (W_l V_l x_l + b_l) + x_l

    (DCN-V2, https://arxiv.org/abs/2008.13535, equations 1 and 2.) Parameters and figures are those
    of torchrec's `LowRankCrossNet`, or `CrossNet` for rank 0 (no ``V``). It differs in the cost: of
    the first layer's product the requests' part is computed once a request, and a full-rank layer
    is one matrix product, where torchrec's multiplies C column vectors one by one.

    Low rank costs ``4 F r`` operations a candidate and layer against ``2 F^2``; DCN-V2 finds no
    loss at ``r = F / 4``.
    """

    def __init__(self, features: int, layers: int, rank: int) -> None:
        super().__init__()
        self.net: CrossNet | LowRankCrossNet
        if rank:
            self.net = LowRankCrossNet(features, layers, low_rank=min(rank, features))
        else:
            self.net = CrossNet(features, layers)

    def first_layer(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of the product that the network applies to its input first."""
        if isinstance(self.net, LowRankCrossNet):
            return self.net.V_kernels[0], None
        return self.net.kernels[0], self.net.bias[0].squeeze(1)

    def forward(self, x_0: Tensor, first: Tensor) -> Tensor:
        """Return [C, F].

        Args:
            x_0: [C, F] inputs.
            first: [C, r] or [C, F], their product with `first_layer`.
        """
        x = x_0
        for layer, bias in enumerate(self.net.bias):
            if isinstance(self.net, LowRankCrossNet):
                inner = first if layer == 0 else F.linear(x, self.net.V_kernels[layer])
                crossed = F.linear(inner, self.net.W_kernels[layer], bias)
            elif layer == 0:
                crossed = first
            else:
                crossed = F.linear(x, self.net.kernels[layer], bias.squeeze(1))
            if torch.is_grad_enabled():  # torch.addcmul's gradient reads and writes twice as much
                x = (x_0 * crossed).add_(x)
            else:
                x = torch.addcmul(x, x_0, crossed)
        return x


@dataclass(frozen=True, slots=True)
class SplitInput:
    """Inputs of C candidates: F_c features of their own and F_r that their request has.

    Attributes:
        candidate: [C, F_c].
        request: [B, F_r].
        request_c: [C] int64, the request that each candidate belongs to, ascending.
    """

    candidate: Tensor
    request: Tensor
    request_c: Tensor

    def whole(self) -> Tensor:
        """Return [C, F_c + F_r]: each candidate beside its request's features."""
        return torch.cat([self.candidate, self.request.index_select(0, self.request_c)], dim=1)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``whole() @ weight.T + bias``, with the requests' part computed once a request."""
        width = int(self.candidate.shape[1])  # a constant for tracers
        request = F.linear(self.request, weight[:, width:], bias).float()
        return F.linear(self.candidate, weight[:, :width]) + request.index_select(0, self.request_c)


def linear_of_parts(layer: nn.Linear, parts: Sequence[Tensor]) -> Tensor:
    """Return what ``layer`` gives for the parts side by side, without laying them so."""
    widths = [int(part.shape[1]) for part in parts]  # constants for tracers
    weights = layer.weight.split(widths, dim=1)
    found = F.linear(parts[0], weights[0], layer.bias).float()
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        found = found + F.linear(part, weight)
    return found


class CrossTower(nn.Module):
    """A cross network beside a deep network over the same input; together ``width`` outputs."""

    def __init__(self, features: int, layers: int, rank: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.cross = SplitCrossNet(features, layers, rank)
        self.first = nn.Linear(features, widths[0])
        self.deep = deep_network(widths[0], widths[1:])
        self.width = features + widths[-1]

    def forward(self, split: SplitInput) -> list[Tensor]:
        """Return the cross network's [C, F] and the deep network's [C, last width]."""
        weight, bias = self.cross.first_layer()
        # Both networks' first products have the same input: one product of both.
        both = split.linear(
            torch.cat([weight, self.first.weight]),
            torch.cat([torch.zeros_like(weight[:, 0]) if bias is None else bias, self.first.bias]),
        )
        crossed, hidden = both.split([len(weight), len(self.first.weight)], dim=1)
        return [self.cross(split.whole(), crossed), self.deep(F.relu(hidden))]


def deep_network(features: int, widths: Sequence[int]) -> nn.Sequential:
    """Return fully connected layers with ReLU of the given widths."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(features, width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers)


class EmbeddingTower(nn.Module):
    """Crosses product, query and history embeddings and their cosine similarities first.

    The paper's Section 4.2: the projected embeddings of the candidate product, the query and the
    mean-pooled purchase history, with cos(product, query) and cos(product, history), are crossed
    among themselves before they meet the other features.
    """

    # NOTE[DIFF]: the paper names neither the layers nor the sizes of its new tower. Here it is a
    # cross network beside a deep one, as in the DCN tower, and the cosines are those of the
    # embeddings as they are, before projection.

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
    ) -> list[Tensor]:
        """Return the parts of [C, width].

        Args:
            product_ce: [C, E] embeddings of the candidates.
            context_be: [B, E] embeddings of the query and, where used, the history.
            request_c: [C] the request that each candidate belongs to.
        """
        similarity = cosine_similarities(
            product_ce, torch.stack([context_be[name] for name in self.context]), request_c
        )
        return self.tower(
            SplitInput(
                torch.cat([self.project["product"](product_ce), similarity], dim=1),
                torch.cat([self.project[n](context_be[n]) for n in self.context], dim=1),
                request_c,
            )
        )


def cosine_similarities(product_ce: Tensor, context_kbe: Tensor, request_c: Tensor) -> Tensor:
    """Return [C, K] cosines of each candidate with its request's K vectors.

    A zero vector (an unknown product or query, an empty history) has cosine 0 with everything.
    """
    product = F.normalize(product_ce, dim=1)
    context_kce = F.normalize(context_kbe, dim=2).index_select(1, request_c)
    return (product * context_kce).sum(2).t()
