"""The click-through-rate ranker: transforms, tables, two towers, one logit a candidate.

Legend: ``B`` requests, ``C`` candidates of all of them, ``H`` purchases of all histories,
``E`` dimension of the pretrained embeddings.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from features import columns
from features.batch import RequestBatch
from features.transforms import LevelTransforms
from ranking.config import ModelConfig
from ranking.encoded import EncodedBatch, offsets
from ranking.history import HistoryCounts
from ranking.pretrained_embeddings import (
    DataType,
    EmbeddingBagConfig,
    FusedEmbeddingBagCollection,
    KeyedJaggedTensor,
    PoolingType,
    PretrainedEmbeddingBagCollection,
    PretrainedTable,
    fused_tables,
)
from ranking.towers import CrossTower, EmbeddingTower, SplitInput, linear_of_parts

_INPUT_OF = {columns.PURCHASE_HISTORY: "history"}  # of the dense layers, by feature


class DenseLayers(nn.Module):
    """The dense layers of a ranker: both towers and the head over them. A subclass makes them."""

    dcn_tower: CrossTower
    embedding_tower: EmbeddingTower | None
    joint: nn.Linear
    head: nn.Sequential

    def dense(self, inputs: dict[str, Tensor], request_c: Tensor) -> Tensor:
        """Return the logits [C] of what was looked up.

        Args:
            inputs: ``request`` [B, F_r], ``candidate`` [C, F_c]; with the embedding tower also
                ``product`` [C, E], ``query`` [B, E] and, where used, ``history`` [B, E] and
                ``history_counts`` [C, K].
            request_c: [C] int64, the request that each candidate belongs to, ascending.
        """
        candidate = inputs["candidate"]
        if "history_counts" in inputs:
            candidate = torch.cat([candidate, inputs["history_counts"]], dim=1)
        parts = self.dcn_tower(SplitInput(candidate, inputs["request"], request_c))
        if self.embedding_tower is not None:
            context = {name: inputs[name] for name in self.embedding_tower.context}
            parts += self.embedding_tower(inputs["product"], context, request_c)
        hidden = linear_of_parts(self.joint, parts)
        return self.head(hidden).squeeze(1)


class Ranker(DenseLayers):
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
        self.history_counts: HistoryCounts | None = None
        if config.counts_history:
            self.history_counts = HistoryCounts(config.count_sharpness, config.count_windows)
            inputs += self.history_counts.width
        self.dcn_tower = CrossTower(inputs, config.cross_layers, config.cross_rank, config.deep)
        width = self.dcn_tower.width
        self.pretrained: PretrainedEmbeddingBagCollection | None = None
        self.embedding_tower = None
        if config.embedding_tower:
            assert tables is not None, "the embedding tower reads tables"
            self.pretrained = _pretrained_tables(config, tables, table_learning_rate)
            dims = {"product": tables["product"].weight.shape[1]}
            dims["query"] = tables["query"].weight.shape[1]
            if config.purchase_history:
                dims["history"] = dims["product"]
            self.embedding_tower = EmbeddingTower(
                dims, config.projection, config.cross_layers, config.cross_rank, config.tower_deep
            )
            width += self.embedding_tower.width
        widths = (*config.head, 1)
        self.joint = nn.Linear(width, widths[0])  # over both towers' outputs side by side
        layers: list[nn.Module] = []
        for width, next_width in pairwise(widths):
            layers += [nn.ReLU(), nn.Linear(width, next_width)]
        self.head = nn.Sequential(*layers)

    @property
    def device(self) -> torch.device:
        """Where it computes; it encodes on the CPU wherever that is."""
        return self.joint.weight.device

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
            candidate_offsets=offsets(batch.lengths),
            query=self._rows("query", batch.query) if reads else torch.zeros_like(batch.query),
            history=self._rows(columns.PURCHASE_HISTORY, batch.history) if history else nothing,
            history_age=batch.history_age.float() if history else torch.zeros(0),
            history_offsets=offsets(
                batch.history_lengths if history else torch.zeros_like(batch.history_lengths)
            ),
            product=self._rows("product", batch.product) if reads else nothing,
            clicked=batch.clicked,
            weight=batch.weight,
        )

    def _rows(self, feature: str, ids: Tensor) -> Tensor:
        assert self.pretrained is not None
        return self.pretrained.rows(feature, ids)

    def forward(self, batch: EncodedBatch) -> Tensor:
        """Return the logit [C] of a click on each candidate."""
        inputs = self.trained_lookups(batch) | self.frozen_lookups(batch)
        return self.dense(inputs, batch.request_of_candidate())

    def trained_lookups(self, batch: EncodedBatch) -> dict[str, Tensor]:
        """Return the inputs of the dense layers that come from trained tables.

        ``request`` [B, F_r] and ``candidate`` [C, F_c]: embeddings of the sparse features beside
        the scaled dense ones; with trained product and query tables, theirs too.
        """
        found = {
            "request": _embed(self.request_embeddings, batch.request_rows, batch.request_dense),
            "candidate": _embed(
                self.candidate_embeddings, batch.candidate_rows, batch.candidate_dense
            ),
        }
        return found if self.config.tables == "frozen" else found | self._pretrained(batch)

    def frozen_lookups(self, batch: EncodedBatch) -> dict[str, Tensor]:
        """Return the inputs of the dense layers that come from frozen tables."""
        return self._pretrained(batch) if self.config.tables == "frozen" else {}

    def _pretrained(self, batch: EncodedBatch) -> dict[str, Tensor]:
        """Return ``product`` [C, E], ``query`` [B, E] and, where used, those of the history.

        These are its mean ``history`` [B, E] and ``history_counts`` [C, K].
        """
        if self.pretrained is None:
            return {}
        bags = {
            "product": (batch.product, _one_each(batch.product)),
            "query": (batch.query, _one_each(batch.query)),
        }
        if self.config.purchase_history:
            bags[columns.PURCHASE_HISTORY] = (batch.history, batch.history_offsets)
        pooled = self.pretrained.pool_all(bags)
        found = {_INPUT_OF.get(name, name): values for name, values in pooled.items()}
        if self.history_counts is not None:
            found["history_counts"] = self.history_counts(self.pretrained, batch)
        return found

    def replace_tables(self, tables: Mapping[str, PretrainedTable]) -> None:
        """Put other frozen tables of the same dimension in place of the current ones."""
        assert self.pretrained is not None
        self.pretrained = _pretrained_tables(self.config, tables, 0.0)

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
        parts = [self.dcn_tower, self.embedding_tower, self.joint, self.head]
        return [p for part in parts if part is not None for p in part.parameters()]

    def number_of_parameters(self) -> int:
        """Return how many numbers training changes: dense layers and trainable tables."""
        return sum(tensor.numel() for tensor in self.trained_state().values())

    def number_of_bytes(self) -> int:
        """Return the size of all tensors that scoring reads, frozen tables and id maps included."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

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
    return fused_tables(configs, learning_rate)


def _pretrained_tables(
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


def _embed(tables: FusedEmbeddingBagCollection | None, rows: Tensor, dense: Tensor) -> Tensor:
    """Return [N, S * dim + D]: embeddings of rows [S, N] beside dense values [N, D]."""
    if tables is None:
        return dense
    names = [name for config in tables.embedding_bag_configs() for name in config.feature_names]
    # torchrec cannot split an empty KeyedJaggedTensor; tables spread over processes must be asked.
    if rows.shape[1] == 0 and isinstance(tables, FusedEmbeddingBagCollection):
        dims = [config.embedding_dim for config in tables.embedding_bag_configs()]
        return torch.zeros(0, sum(dims) + dense.shape[1])
    values = rows.reshape(-1)
    features = KeyedJaggedTensor(
        keys=names,
        values=values,
        lengths=torch.ones_like(values),
        offsets=_one_each(values),
    )
    return torch.cat([tables(features).values(), dense], dim=1)


def _one_each(values: Tensor) -> Tensor:
    """Return the offsets [N + 1] of N bags of one value each."""
    return torch.arange(len(values) + 1, device=values.device)
