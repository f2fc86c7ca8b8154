"""The click-through-rate ranker: transforms, tables, two towers, one logit a candidate.

Legend: ``B`` requests, ``C`` candidates of all of them, ``H`` purchases of all histories,
``E`` dimension of the pretrained embeddings.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from features import columns
from features.batch import RequestBatch
from features.transforms import LevelTransforms
from ranking.config import ModelConfig
from ranking.pretrained_embeddings import (
    DataType,
    EmbeddingBagConfig,
    FusedEmbeddingBagCollection,
    KeyedJaggedTensor,
    PoolingType,
    PretrainedEmbeddingBagCollection,
    PretrainedTable,
    RowWiseAdagrad,
)
from ranking.towers import CrossTower, EmbeddingTower, SplitInput, deep_network


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedBatch:
    """A `RequestBatch` in rows and scaled values: what the trained part of the ranker reads.

    Attributes:
        request_rows: [S, B] int64 rows of the trainable request tables.
        request_dense: [B, D] float32.
        candidate_rows: [S, C] int64.
        candidate_dense: [C, D] float32.
        candidate_offsets: [B + 1] int64, where each request's candidates begin.
        query: [B] int64 rows of the query table.
        history: [H] int64 rows of the product table.
        history_offsets: [B + 1] int64.
        product: [C] int64 rows of the product table.
        clicked: [C] float32; empty where unknown.
    """

    request_rows: Tensor
    request_dense: Tensor
    candidate_rows: Tensor
    candidate_dense: Tensor
    candidate_offsets: Tensor
    query: Tensor
    history: Tensor
    history_offsets: Tensor
    product: Tensor
    clicked: Tensor

    def split(self, batch_rows: int) -> Iterator["EncodedBatch"]:
        """Yield batches of whole requests, as even as they can be, of about ``batch_rows``."""
        rows = int(self.candidate_offsets[-1])
        parts = max(1, round(rows / batch_rows))
        targets = torch.arange(1, parts) * rows // parts
        cuts = torch.searchsorted(self.candidate_offsets, targets).tolist()
        edges = [0, *cuts, len(self.query)]
        for first, last in pairwise(edges):
            if last > first:
                yield self._requests(first, last)

    def _requests(self, first: int, last: int) -> "EncodedBatch":
        candidates = slice(int(self.candidate_offsets[first]), int(self.candidate_offsets[last]))
        items = slice(int(self.history_offsets[first]), int(self.history_offsets[last]))
        return EncodedBatch(
            request_rows=self.request_rows[:, first:last],
            request_dense=self.request_dense[first:last],
            candidate_rows=self.candidate_rows[:, candidates],
            candidate_dense=self.candidate_dense[candidates],
            candidate_offsets=self.candidate_offsets[first : last + 1] - candidates.start,
            query=self.query[first:last],
            history=self.history[items],
            history_offsets=self.history_offsets[first : last + 1] - items.start,
            product=self.product[candidates],
            clicked=self.clicked[candidates],
        )


class Ranker(nn.Module):
    """Two-tower DCN ranker over request batches (the paper's Section 4.2, Figure 3).

    What belongs to the user or the query is looked up and pooled once a request, then spread over
    the request's candidates.

    Args:
        config: its shape.
        request: transforms of the request-level features.
        candidate: transforms of the candidate-level features.
        tables: ``product`` and ``query`` tables; needed with the embedding tower.
        sparse_learning_rate: of the trainable tables, updated in the backward pass.
        table_learning_rate: of product and query tables that are trained.
    """

    def __init__(
        self,
        config: ModelConfig,
        request: LevelTransforms,
        candidate: LevelTransforms,
        tables: Mapping[str, PretrainedTable] | None = None,
        *,
        sparse_learning_rate: float = 0.05,
        table_learning_rate: float = 0.01,
    ) -> None:
        super().__init__()
        self.config = config
        self.request_transforms = request
        self.candidate_transforms = candidate
        self.request_embeddings = _trainable(
            request.tables, config.embedding_dim, sparse_learning_rate
        )
        self.candidate_embeddings = _trainable(
            candidate.tables, config.embedding_dim, sparse_learning_rate
        )
        inputs = (len(request.tables) + len(candidate.tables)) * config.embedding_dim
        inputs += len(request.dense) + len(candidate.dense)
        self.dcn_tower = CrossTower(inputs, config.cross_layers, config.cross_rank, config.deep)
        width = self.dcn_tower.width
        self.pretrained: PretrainedEmbeddingBagCollection | None = None
        self.embedding_tower: EmbeddingTower | None = None
        if config.embedding_tower:
            assert tables is not None, "the embedding tower reads tables"
            self.pretrained = _pretrained(config, tables, table_learning_rate)
            dims = {"product": tables["product"].weight.shape[1]}
            dims["query"] = tables["query"].weight.shape[1]
            if config.purchase_history:
                dims["history"] = dims["product"]
            self.embedding_tower = EmbeddingTower(
                dims, config.projection, config.cross_layers, config.cross_rank, config.tower_deep
            )
            width += self.embedding_tower.width
        self.head = nn.Sequential(
            deep_network(width, config.head), nn.Linear((width, *config.head)[-1], 1)
        )

    @torch.no_grad()
    def encode(self, batch: RequestBatch) -> EncodedBatch:
        """Map ids to rows and scale values; no gradient flows through it."""
        request_rows, request_dense = self.request_transforms(
            batch.request_sparse, batch.request_dense
        )
        candidate_rows, candidate_dense = self.candidate_transforms(
            batch.candidate_sparse, batch.candidate_dense
        )
        nothing = torch.zeros(0, dtype=torch.int64)
        reads = self.pretrained is not None
        history = reads and self.config.purchase_history
        return EncodedBatch(
            request_rows=request_rows,
            request_dense=request_dense,
            candidate_rows=candidate_rows,
            candidate_dense=candidate_dense,
            candidate_offsets=_offsets(batch.lengths),
            query=self._rows("query", batch.query) if reads else torch.zeros_like(batch.query),
            history=self._rows(columns.PURCHASE_HISTORY, batch.history) if history else nothing,
            history_offsets=_offsets(
                batch.history_lengths if history else torch.zeros_like(batch.history_lengths)
            ),
            product=self._rows("product", batch.product) if reads else nothing,
            clicked=batch.clicked,
        )

    def _rows(self, feature: str, ids: Tensor) -> Tensor:
        assert self.pretrained is not None
        return self.pretrained.rows(feature, ids)

    def forward(self, batch: EncodedBatch) -> Tensor:
        """Return the logit [C] of a click on each candidate."""
        lengths = batch.candidate_offsets.diff()
        request_c = torch.repeat_interleave(lengths, output_size=batch.candidate_dense.shape[0])
        request_part = torch.cat(
            [_embed(self.request_embeddings, batch.request_rows), batch.request_dense], dim=1
        )
        candidate_part = torch.cat(
            [_embed(self.candidate_embeddings, batch.candidate_rows), batch.candidate_dense], dim=1
        )
        towers = [self.dcn_tower(SplitInput(candidate_part, request_part, request_c))]
        if self.embedding_tower is not None:
            towers.append(self._embedding_tower(batch, request_c))
        return self.head(torch.cat(towers, dim=1)).squeeze(1)

    def _embedding_tower(self, batch: EncodedBatch, request_c: Tensor) -> Tensor:
        assert self.pretrained is not None
        assert self.embedding_tower is not None
        ones = torch.arange(len(batch.product) + 1)
        product = self.pretrained.pool("product", batch.product, ones)
        context = {
            "query": self.pretrained.pool("query", batch.query, ones[: len(batch.query) + 1])
        }
        if self.config.purchase_history:
            context["history"] = self.pretrained.pool(
                columns.PURCHASE_HISTORY, batch.history, batch.history_offsets
            )
        return self.embedding_tower(product, context, request_c)

    def replace_tables(self, tables: Mapping[str, PretrainedTable]) -> None:
        """Put other frozen tables of the same dimension in place of the current ones."""
        assert self.pretrained is not None
        self.pretrained = _pretrained(self.config, tables, 0.0)

    def trained_state(self) -> dict[str, Tensor]:
        """Return what training changes, by name: the dense layers and the trainable tables."""
        fixed = ("request_transforms.", "candidate_transforms.", "pretrained.id_maps.")
        frozen = ("pretrained.embedding_bags.",)
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if not name.startswith(fixed + frozen)
        }

    def dense_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the dense layers; tables update themselves."""
        parts = [self.dcn_tower, self.embedding_tower, self.head]
        return [p for part in parts if part is not None for p in part.parameters()]

    def table_optimizers(self) -> list[tuple[str, Any]]:
        """Return torchrec's fused optimisers of the trainable tables, by module name."""
        return [
            (name, module.fused_optimizer())
            for name, module in self.named_modules()
            if isinstance(module, FusedEmbeddingBagCollection)
        ]

    @torch.no_grad()
    def score(self, batch: RequestBatch) -> Tensor:
        """Return the probability [C] of a click on each candidate of raw requests."""
        return torch.sigmoid(self(self.encode(batch)))


def _trainable(
    tables: dict[str, int], dim: int, learning_rate: float
) -> FusedEmbeddingBagCollection | None:
    """Return tables whose rows are updated in the backward pass, and only those that were read."""
    if not tables:
        return None
    configs = [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=rows,
            embedding_dim=dim,
            feature_names=[name],
            weight_init_min=-0.01,
            weight_init_max=0.01,
        )
        for name, rows in tables.items()
    ]
    return FusedEmbeddingBagCollection(
        configs, RowWiseAdagrad, {"lr": learning_rate, "eps": 1e-8}, device=torch.device("cpu")
    )


def _pretrained(
    config: ModelConfig, tables: Mapping[str, PretrainedTable], learning_rate: float
) -> PretrainedEmbeddingBagCollection:
    readers = {"product": ["product", columns.PURCHASE_HISTORY], "query": ["query"]}
    configs = [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=len(tables[name].ids) + 1,
            embedding_dim=tables[name].weight.shape[1],
            feature_names=readers[name],
            pooling=PoolingType.MEAN,
            data_type=DataType.FP16 if tables[name].weight.dtype == "float16" else DataType.FP32,
        )
        for name in ("product", "query")
    ]
    return PretrainedEmbeddingBagCollection(configs, tables, config.tables, learning_rate)


def _embed(tables: FusedEmbeddingBagCollection | None, rows: Tensor) -> Tensor:
    """Return [N, S * dim] embeddings of rows [S, N]."""
    if tables is None:
        return torch.zeros(rows.shape[1], 0)
    names = [name for config in tables.embedding_bag_configs() for name in config.feature_names]
    features = KeyedJaggedTensor(
        keys=names,
        values=rows.reshape(-1),
        lengths=torch.ones(rows.numel(), dtype=torch.int64),
        offsets=torch.arange(rows.numel() + 1),
    )
    return tables(features).values()


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
