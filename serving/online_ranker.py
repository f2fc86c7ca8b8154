"""The trained ranker as it is served: the same figures in as few operations as they need.

A request of 100 candidates costs half a millisecond of arithmetic, and every call of an operator a
few microseconds. Here the id maps of all features of a level are one lookup, their tables are one
table, and candidate products and purchase history are pooled by one operator. The dense layers are
the trained ranker's own.

Legend: ``B`` requests, ``C`` candidates of all of them, ``H`` purchases of all histories, ``S``
sparse and ``D`` dense features of one level, ``N`` its records (``B`` or ``C``), ``E`` dimension of
the pretrained embeddings, ``K`` history counts.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from features.id_map import IdMap
from features.transforms import LevelTransforms
from ranking.history import HistoryCounts
from ranking.pretrained_embeddings import (
    FusedEmbeddingBagCollection,
    PretrainedEmbeddingBagCollection,
)
from ranking.ranker import DenseLayers, Ranker
from serving.embedding_table import EmbeddingTable, TableDtype


class IdMaps(nn.Module):
    """Several `features.id_map.IdMap` looked up at once, into rows of their tables end to end.

    Each map's rows are a block whose first row belongs to unknown ids.

    Args:
        maps: S maps, 1 or more.
    """

    slots: Tensor  # int32 rows, the maps' slots end to end
    ids: Tensor  # [rows] int64
    multipliers: Tensor  # [2, 1, 1] int64
    shift: Tensor  # [S, 1] int64, as are the next two
    mask: Tensor
    first_slot: Tensor
    unknown: Tensor  # [S, 1] int32

    def __init__(self, maps: Sequence[IdMap]) -> None:
        super().__init__()
        slots = [m.get_buffer("slots") for m in maps]
        ids = [m.get_buffer("ids") for m in maps]
        unknown = starts(len(i) for i in ids)
        blocks = [s + first for s, first in zip(slots, unknown, strict=True)]
        self.register_buffer("slots", torch.cat(blocks))
        self.register_buffer("ids", torch.cat(ids))
        self.register_buffer("multipliers", torch.tensor(maps[0].multipliers).view(2, 1, 1))
        self.register_buffer("shift", _column([m.shift for m in maps]))
        self.register_buffer("mask", _column([len(s) - 1 for s in slots]))
        self.register_buffer("first_slot", _column(starts(len(s) for s in slots)))
        self.register_buffer("unknown", _column(unknown).int())

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows (int32 [S, N]) of raw ids (int64 [S, N]), each by its own map."""
        slots = ((ids * self.multipliers) >> self.shift).bitwise_and(self.mask) + self.first_slot
        rows = self.slots.index_select(0, slots.view(-1))
        found = self.ids.index_select(0, rows).view_as(slots)  # [2, S, N]
        # A map's unknown row is the least of its rows.
        return torch.where(found == ids, rows.view_as(slots), self.unknown).amax(0)


class LevelInputs(nn.Module):
    """From raw values of one level to its part of the DCN tower's input.

    Args:
        transforms: fitted transforms.
        embeddings: the trained tables that their rows point into.
        dtype: how the tables are kept.
    """

    boundaries: Tensor  # [D, bins], the last one +inf: a missing value (NaN) comes after all
    first_bin: Tensor  # [D, 1] int32, where the bins of each dense feature begin in the table
    shift: Tensor  # [D, 1]
    scale: Tensor  # [D, 1]

    def __init__(
        self,
        transforms: LevelTransforms,
        embeddings: FusedEmbeddingBagCollection | None,
        dtype: TableDtype,
    ) -> None:
        super().__init__()
        maps = [m for m in transforms.vocabularies if isinstance(m, IdMap)]
        self.maps = IdMaps(maps) if maps else None
        self.bins = transforms.boundaries.shape[1] > 0 and len(transforms.dense) > 0
        last = torch.full((len(transforms.dense), 1), torch.inf)
        self.register_buffer("boundaries", torch.cat([transforms.boundaries, last], dim=1))
        self.register_buffer("scale", 1 / transforms.std[:, None])
        self.register_buffer("shift", -transforms.mean[:, None] * self.scale)
        sizes = list(transforms.tables.values())
        firsts = starts(sizes)[len(maps) :] if self.bins else []
        self.register_buffer("first_bin", _column(firsts).int())
        self.table: EmbeddingTable | None = None
        if embeddings is not None:
            self.table = EmbeddingTable(_table(transforms, embeddings, len(maps)), dtype)
            self.width = len(sizes) * self.table.dim

    def forward(self, ids: Tensor, values: Tensor) -> Tensor:
        """Return [N, T * dim + D] float32.

        Args:
            ids: [S, N] int64 raw ids.
            values: [D, N] float32, NaN where missing.
        """
        logs = values.abs().log1p().copysign(values)
        dense = torch.addcmul(self.shift, logs, self.scale).nan_to_num(0.0).t()
        if self.table is None:
            return dense.contiguous()
        rows = [] if self.maps is None else [self.maps(ids)]
        if self.bins:
            bins = torch.searchsorted(self.boundaries, values, out_int32=True)
            rows.append(bins + self.first_bin)
        flat = (torch.cat(rows) if len(rows) > 1 else rows[0]).t().reshape(-1)
        return torch.cat([self.table.each(flat).view(-1, self.width), dense], dim=1)


def _table(
    transforms: LevelTransforms, embeddings: FusedEmbeddingBagCollection, vocabularies: int
) -> Tensor:
    """Return all tables end to end; those of bins with the missing value's row at their end."""
    state = embeddings.state_dict()
    weights = [state[f"embedding_bags.{name}.weight"] for name in transforms.tables]
    bins = [torch.cat([weight[1:], weight[:1]]) for weight in weights[vocabularies:]]
    return torch.cat([*weights[:vocabularies], *bins])


def starts(sizes: Iterable[int]) -> list[int]:
    """Return where each of some lists laid end to end begins."""
    ends = list(accumulate(sizes))
    return [0, *ends[:-1]] if ends else []


def _column(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64).view(-1, 1)


class OnlineRanker(DenseLayers):
    """A trained ranker made ready to score raw requests online.

    It scores as `Ranker.score` does but for the rounding of quantised tables and the order of sums.

    Args:
        ranker: a trained one, whose dense layers are shared.
        dtype: how the tables are kept, the trained ones of the sparse features too.
    """

    def __init__(self, ranker: Ranker, dtype: TableDtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.request = LevelInputs(ranker.request_transforms, ranker.request_embeddings, dtype)
        self.candidate = LevelInputs(
            ranker.candidate_transforms, ranker.candidate_embeddings, dtype
        )
        self.pretrained: PretrainedInputs | None = None
        if ranker.pretrained is not None:
            history = ranker.config.purchase_history
            self.pretrained = PretrainedInputs(
                ranker.pretrained, history, ranker.history_counts, dtype
            )
        self.dcn_tower = ranker.dcn_tower
        self.embedding_tower = ranker.embedding_tower
        self.joint = ranker.joint
        self.head = ranker.head

    def forward(
        self,
        lengths: Tensor,
        query: Tensor,
        history: Tensor,
        history_age: Tensor,
        history_lengths: Tensor,
        request_ids: Tensor,
        request_values: Tensor,
        product: Tensor,
        candidate_ids: Tensor,
        candidate_values: Tensor,
    ) -> Tensor:
        """Return the probability [C] of a click on each candidate.

        Args:
            lengths: [B] int64, candidates of each request; B is 1 or more, C may be 0.
            query: [B] int64, `features.id_map.hash_strings` of the query.
            history: [H] int64 product ids.
            history_age: [H] int16, days between each purchase and the request.
            history_lengths: [B] int64.
            request_ids: [S, B] int64 raw ids.
            request_values: [D, B] float32, NaN where missing.
            product: [C] int64 product ids.
            candidate_ids: [S, C] int64.
            candidate_values: [D, C] float32.
        """
        inputs = {
            "request": self.request(request_ids, request_values),
            "candidate": self.candidate(candidate_ids, candidate_values),
        }
        request_c = torch.repeat_interleave(lengths, output_size=product.shape[0])
        if self.pretrained is not None:
            inputs |= self.pretrained(
                product, query, history, history_age, history_lengths, request_c
            )
        return torch.sigmoid(self.dense(inputs, request_c))


class PretrainedInputs(nn.Module):
    """From product, query and history ids to the inputs of the embedding tower.

    Args:
        tables: the ranker's pretrained tables.
        reads_history: whether the model reads the purchase history.
        counts: its counts of what is like a candidate in the history, where it has them.
        dtype: how the tables are kept.
    """

    zero: Tensor  # [1] int64

    def __init__(
        self,
        tables: PretrainedEmbeddingBagCollection,
        reads_history: bool,
        counts: HistoryCounts | None,
        dtype: TableDtype,
    ) -> None:
        super().__init__()
        self.reads_history = reads_history
        self.counts = counts
        self.product_map = _map(tables, "product")
        self.query_map = _map(tables, "query")
        bags = tables.embedding_bags
        self.product = EmbeddingTable(bags["product"].get_buffer("weight"), dtype)
        self.query = EmbeddingTable(bags["query"].get_buffer("weight"), dtype)
        self.register_buffer("zero", torch.zeros(1, dtype=torch.int64))

    def forward(
        self,
        product: Tensor,
        query: Tensor,
        history: Tensor,
        history_age: Tensor,
        history_lengths: Tensor,
        request_c: Tensor,
    ) -> dict[str, Tensor]:
        """Return ``product`` [C, E], ``query`` [B, E] and, where read, those of the history.

        Args:
            product: [C] int64 product ids.
            query: [B] int64.
            history: [H] int64 product ids.
            history_age: [H] int16 days.
            history_lengths: [B] int64.
            request_c: [C] int64, the request of each candidate.
        """
        found = {"query": self.query.each(self.query_map(query.unsqueeze(0)).view(-1))}
        if not self.reads_history:
            rows = self.product_map(product.unsqueeze(0)).view(-1)
            return found | {"product": self.product.each(rows)}
        number = product.shape[0]
        rows = self.product_map(torch.cat([product, history]).unsqueeze(0)).view(-1)
        if self.counts is None:  # candidates and histories are bags of one lookup
            sizes = torch.cat([self.zero, torch.ones_like(product), history_lengths])
            pooled = self.product(rows, sizes.cumsum(0, dtype=torch.int32))
            return found | {"product": pooled[:number], "history": pooled[number:]}
        vectors = self.product.each(rows)
        request_h = torch.repeat_interleave(history_lengths, output_size=history.shape[0])
        bags = torch.cat([self.zero, history_lengths]).cumsum(0)
        return found | {
            "product": vectors[:number],
            "history": means(vectors[number:], bags),
            "history_counts": _count(
                self.counts, vectors, rows > 0, history_age, request_c, request_h
            ),
        }


def _map(tables: PretrainedEmbeddingBagCollection, name: str) -> IdMaps:
    id_map = tables.id_maps[name]
    assert isinstance(id_map, IdMap)
    return IdMaps([id_map])


def means(vectors_he: Tensor, bags: Tensor) -> Tensor:
    """Return the mean [B, E] of each bag of vectors; of an empty one, zeros.

    Args:
        vectors_he: [H, E] float32.
        bags: [B + 1] int64, where each bag begins, and H.
    """
    places = torch.arange(vectors_he.shape[0])
    return F.embedding_bag(places, vectors_he, bags, mode="mean", include_last_offset=True)


def _count(
    counts: HistoryCounts,
    vectors: Tensor,
    known: Tensor,
    age: Tensor,
    request_c: Tensor,
    request_h: Tensor,
) -> Tensor:
    """Return [C, K], as `ranking.history` does, over all pairs with those of others masked.

    That is exact and cheap for one request; B requests cost B times as much as one by one.
    """
    number = request_c.shape[0]
    unit = F.normalize(vectors, dim=1)
    away = unit[:number] @ unit[number:].t() - 1
    own = (request_c[:, None] == request_h) & known[number:]
    windows = torch.stack([age < days for days in counts.windows], dim=1).float()
    sums = [(((away * beta).exp() * own) @ windows) for beta in counts.sharpness]
    return torch.cat(sums, dim=1).log1p() * known[:number, None]
