r"""How often what is like a candidate was bought: the purchase history beyond its mean.

The paper pools a history into one mean vector. Here the candidate meets every purchase of it:

.. math:: n(c; \beta, w) = \log\Bigl(1 + \sum_{h \text{ in the last } w \text{ days}}
          e^{\beta (\cos(c, h) - 1)}\Bigr)

A purchase of the candidate itself adds 1 to the sum whatever ``beta`` is; another one the less, the
less alike they are and the greater ``beta`` is. A large ``beta`` counts how often this product was
bought, a small one how often its kind was, and no such counter has to be made by hand. Purchases of
unknown products are left out.

Legend: ``C`` candidates of ``B`` requests, ``H`` purchases of all histories, ``G`` requests of a
padded group of up to ``c`` candidates and ``h`` purchases, ``E`` embedding dimension, ``S`` values
of beta, ``W`` windows, ``K = S * W``.
"""

# NOTE[DIFF]: beyond the paper, whose history is one mean vector a user.

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ranking.encoded import EncodedBatch
from ranking.pretrained_embeddings import PretrainedEmbeddingBagCollection

# Requests in one padded product: more share less memory traffic, fewer pay for calls.
_GROUP = {"cpu": 8, "cuda": 256}


@dataclass(frozen=True, slots=True)
class _Padded:
    """Jagged lists of some requests as a matrix.

    Attributes:
        places: [G, L] int64 into the flat values; 0 where ``there`` is false.
        there: [G, L] bool.
    """

    places: Tensor
    there: Tensor

    @classmethod
    def of(cls, offsets: Tensor, requests: Tensor) -> "_Padded":
        """Lay out the lists of ``requests`` ([G] int64) that begin at ``offsets`` ([B + 1])."""
        starts, ends = offsets[requests], offsets[requests + 1]
        along = torch.arange(int((ends - starts).max()), device=offsets.device)
        there = along < (ends - starts)[:, None]
        return cls((starts[:, None] + along).where(there, 0), there)

    def take(self, values: Tensor) -> Tensor:
        """Return [G, L] of flat ``values``, 0 where there is none."""
        return values.index_select(0, self.places.view(-1)).view_as(self.places) * self.there


class HistoryCounts(nn.Module):
    """Counts each candidate's like among the purchases of its request.

    Args:
        sharpness: the S values of beta, each above 0.
        windows: the W windows in days, counted back from the request.
    """

    def __init__(self, sharpness: tuple[float, ...], windows: tuple[int, ...]) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.windows = windows
        self.width = len(sharpness) * len(windows)

    @torch.no_grad()
    def forward(self, tables: PretrainedEmbeddingBagCollection, batch: EncodedBatch) -> Tensor:
        """Return [C, K] counts in logarithms; 0 for an unknown product or an empty history.

        Args:
            tables: frozen ones, with a table ``product``.
            batch: its candidates, histories and ages are read.
        """
        counts = torch.zeros(len(batch.product), self.width, device=batch.product.device)
        for group in _groups(batch.history_offsets):
            bought = _Padded.of(batch.history_offsets, group)
            shown = _Padded.of(batch.candidate_offsets, group)
            history = bought.take(batch.history)
            found = self._count(
                tables.unit_vectors("product", shown.take(batch.product)),
                tables.unit_vectors("product", history),
                self._recent(bought.take(batch.history_age), history > 0),
            )
            counts[shown.places[shown.there]] = found[shown.there]
        return counts * (batch.product > 0)[:, None]

    def _recent(self, age_gh: Tensor, counts_gh: Tensor) -> Tensor:
        """Return [G, W, h]: 1 for a purchase that counts and lies within the window, else 0."""
        return torch.stack([(age_gh < days) & counts_gh for days in self.windows], dim=1).float()

    def _count(self, product_gce: Tensor, history_ghe: Tensor, recent_gwh: Tensor) -> Tensor:
        """Return [G, c, K] of padded requests, one small product for the cosines of each."""
        away = (product_gce @ history_ghe.transpose(1, 2)).sub_(1)
        # Few rows times many, not the other way round: the product is four times as fast.
        sums = [recent_gwh @ (away * beta).exp_().transpose(1, 2) for beta in self.sharpness]
        return torch.cat(sums, dim=1).log1p_().transpose(1, 2)


def _groups(history_offsets: Tensor) -> Iterator[Tensor]:
    """Yield requests ([G] int64) with histories of like length; not those with an empty one."""
    lengths = history_offsets.diff()
    order = lengths.argsort(stable=True)
    with_history = order[int((lengths == 0).sum()) :]
    if len(with_history):  # torch splits nothing into one empty part
        yield from with_history.split(_GROUP[lengths.device.type])
