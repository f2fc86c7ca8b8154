"""Pretrained embedding tables inside the model (the paper's Section 4.3.2).

Legend: ``B`` bags, ``L`` ids of all bags, ``D`` embedding dimension, ``N`` rows of a table.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from embeddings.tables import StoredEmbeddings
from features.id_map import IdMap
from ranking.config import TableMode
from ranking.device_tables import DeviceTables
from ranking.versions import check_versions

check_versions()

from torchrec.modules.embedding_configs import (  # noqa: E402
    DataType,
    EmbeddingBagConfig,
    PoolingType,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection  # noqa: E402
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection  # noqa: E402
from torchrec.optim import RowWiseAdagrad  # noqa: E402
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor  # noqa: E402

# Each construction of a lookup would warn of a renamed helper that fbgemm still calls.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)

__all__ = [
    "DataType",
    "EmbeddingBagConfig",
    "FusedEmbeddingBagCollection",
    "KeyedJaggedTensor",
    "PoolingType",
    "PretrainedEmbeddingBagCollection",
    "PretrainedTable",
    "fused_tables",
]


_BLOCK = 1 << 16


def fused_tables(
    tables: list[EmbeddingBagConfig], learning_rate: float
) -> FusedEmbeddingBagCollection:
    """Return tables that row-wise Adagrad updates in the backward pass, where they were read."""
    return FusedEmbeddingBagCollection(
        tables, RowWiseAdagrad, {"lr": learning_rate, "eps": 1e-8}, device=torch.device("cpu")
    )


def _blocks(rows: int) -> Iterator[slice]:
    """Yield ranges of rows: a table is widened block by block, not as another table in memory."""
    for first in range(0, rows, _BLOCK):
        yield slice(first, first + _BLOCK)


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainedTable:
    """The pretrained content of a table.

    Attributes:
        ids: [N] int64 raw ids.
        weight: [N, D] float32 or float16, in memory or in a file, which is then read by blocks.
        held: the rows of ``weight`` that this process is to hold, n of them; None for all.
    """

    ids: np.ndarray
    weight: np.ndarray | StoredEmbeddings
    held: range | None = None

    def rows(self) -> range:
        """Return which rows of ``weight`` this process is to hold."""
        return range(len(self.ids)) if self.held is None else self.held

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the rows to hold, block by block, and where among them each block stands."""
        rows = self.rows()
        if isinstance(self.weight, StoredEmbeddings):
            found = self.weight.blocks(rows.start, rows.stop)
        else:
            part = self.weight[rows.start : rows.stop]
            found = ((rows.start + b.start, part[b]) for b in _blocks(len(part)))
        for first, values in found:
            begin = first - rows.start
            yield slice(begin, begin + len(values)), values


class PretrainedEmbeddingBagCollection(EmbeddingBagCollection):
    """An `EmbeddingBagCollection` over pretrained tables, looked up by raw ids.

    It differs from its parent in four ways:

    - Raw ids go in. The map from id to row is part of the module; row 0, a zero vector, belongs to
      every id that is not known, so that no id is out of range.
    - One call may name some of the features only. Features of candidates and of requests have
      another number of bags, so that each level is one call::

        #              request 0   request 1
        # "history"    [17, 20]    []                 2 bags
        # "query"      [5]         [9]                2 bags
        tables(KeyedJaggedTensor(["history", "query"], ...))
        #              candidates
        # "product"    [17] [31] [20]                 3 bags
        tables(KeyedJaggedTensor(["product"], ...))

    - Frozen tables are buffers: no gradient, no optimiser state, float16 or float32. Of one that
      several processes share, the buffer has row 0 and the rows to hold.
    - Trained tables (``fine-tuned``, ``random``) are float32 and are updated in the backward pass
      by row-wise Adagrad, only in the rows that were read; row 0 stays zero. Two features of one
      table are two lookups, and so two updates a step.

    An empty bag gives a zero vector, as does one of unknown ids only. Mean pooling divides by the
    ids of a bag, unknown ones included.

    Args:
        tables: one configuration a table; ``num_embeddings`` is the table's rows and the unknown
            one. Several features may read one table.
        pretrained: content by table name.
        mode: ``frozen``, ``fine-tuned`` or ``random``.
        learning_rate: of trained tables.

    Attributes:
        reads_at_once: whether `pool_all` reads a trained table once for all of its features, which
            are then one update a step.
        held_rows: of frozen tables that several processes share, by name, the rows without row 0
            that the buffers have.

    Raises:
        ValueError: a table's content does not fit its configuration.
        BadInputError: a table in a file is damaged, or holds a value that is not finite.
    """

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        pretrained: Mapping[str, PretrainedTable],
        mode: TableMode = "frozen",
        learning_rate: float = 0.01,
    ) -> None:
        super().__init__(tables=tables, device=torch.device("meta"))
        self.mode = mode
        self.reads_at_once = False
        self.held_rows = {n: c.held for n, c in pretrained.items() if c.held is not None}
        self.id_maps = nn.ModuleDict()
        self._fused = nn.ModuleDict()
        self._table_of = {name: t.name for t in tables for name in t.feature_names}
        for table in tables:
            content = pretrained[table.name]
            expected = (table.num_embeddings - 1, table.embedding_dim)
            if content.weight.shape != expected:
                raise ValueError(
                    f"table '{table.name}' is configured as {expected}, got {content.weight.shape}"
                )
            self.id_maps[table.name] = IdMap(content.ids)
            if mode == "frozen":
                self._freeze(table, content)
            else:
                self._train(table, content, learning_rate)

    def _freeze(self, table: EmbeddingBagConfig, content: PretrainedTable) -> None:
        dtype = np.float16 if table.data_type == DataType.FP16 else np.float32
        weight = np.zeros((len(content.rows()) + 1, table.embedding_dim), dtype)
        for block, values in content.blocks():
            weight[1:][block] = values
        bag = self.embedding_bags[table.name]
        del bag.weight
        bag.register_buffer("weight", torch.from_numpy(weight))
        norm = torch.empty(len(weight))
        for block in _blocks(len(weight)):
            norm[block] = torch.from_numpy(np.linalg.norm(weight[block].astype(np.float32), axis=1))
        inverse = torch.where(norm > 0, 1 / norm.clamp(min=1e-12), 0)
        bag.register_buffer("inverse_norm", inverse, persistent=False)

    def _train(self, table: EmbeddingBagConfig, content: PretrainedTable, rate: float) -> None:
        if table.embedding_dim % 4:
            raise ValueError(
                f"table '{table.name}': the dimension of a trained table must be a multiple of 4, "
                f"got {table.embedding_dim}"
            )
        alone = EmbeddingBagConfig(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            feature_names=[table.name],
            pooling=table.pooling,
        )
        fused = fused_tables([alone], rate)
        self._fused[table.name] = fused
        weight = fused.state_dict()[f"embedding_bags.{table.name}.weight"]
        assert content.held is None, "a trained table is cut once it is made"
        with torch.no_grad():
            if self.mode == "fine-tuned":
                for block, values in content.blocks():
                    weight[1:][block] = torch.from_numpy(values.astype(np.float32))
            else:
                squares = [np.square(v, dtype=np.float64).sum(1) for _, v in content.blocks()]
                norm = float(np.sqrt(np.concatenate(squares).mean()))
                weight[1:].normal_(0, norm / table.embedding_dim**0.5)
            weight[0] = 0
        bag = self.embedding_bags[table.name]
        del bag.weight
        bag.register_buffer("weight", weight, persistent=False)  # a view of the fused table

    def rows(self, feature: str, ids: Tensor) -> Tensor:
        """Return the rows (int64) of raw ``ids`` (int64, any shape) for one feature."""
        return self.id_maps[self._table_of[feature]](ids)

    def unit_vectors(self, feature: str, rows: Tensor) -> Tensor:
        """Return embeddings of length 1, float32 [*, D], of rows of a frozen table.

        Args:
            feature: a feature of one of the tables.
            rows: [*] int64; row 0, and whatever embedding is zero, stays the zero vector.
        """
        bag = self.embedding_bags[self._table_of[feature]]
        flat = rows.reshape(-1)
        vectors = bag.get_buffer("weight").index_select(0, flat).float()
        vectors *= bag.get_buffer("inverse_norm").index_select(0, flat)[:, None]
        return vectors.view(*rows.shape, vectors.shape[1])

    def pool_all(self, bags: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Return the pooled embeddings of several features' bags, by feature; see `pool`.

        Args:
            bags: rows [L] and offsets [B + 1] by feature.
        """
        if not self.reads_at_once:
            return {name: self.pool(name, *found) for name, found in bags.items()}
        pooled: dict[str, Tensor] = {}
        for table in dict.fromkeys(self._table_of[name] for name in bags):
            names = [name for name in bags if self._table_of[name] == table]
            rows, offsets = zip(*(bags[name] for name in names), strict=True)
            lengths = torch.cat([found.diff() for found in offsets])
            together = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            parts = self.pool(names[0], torch.cat(rows), together)
            numbers = [len(found) - 1 for found in offsets]
            pooled |= dict(zip(names, parts.split(numbers), strict=True))
        return pooled

    def pool(self, feature: str, rows: Tensor, offsets: Tensor) -> Tensor:
        """Return the pooled embeddings of bags of rows.

        Args:
            feature: a feature of one of the tables.
            rows: [L] int64.
            offsets: [B + 1] int64, where each bag begins; the last one is L.

        Returns:
            [B, D] float32.
        """
        table = self._table_of[feature]
        if self.mode == "frozen":
            return self.embedding_bags[table](rows, offsets).float()
        fused = self._fused[table]
        if isinstance(fused, DeviceTables):
            return fused.pool(rows, offsets)
        # One that is spread over processes (`ranking.distributed_tables`) is looked up by all.
        whole = isinstance(fused, FusedEmbeddingBagCollection)
        no_bags = len(offsets) == 1  # the fused lookup fails on none at all
        if whole and (no_bags or not torch.is_grad_enabled()):
            return self.embedding_bags[table](rows, offsets).float()
        known = rows > 0
        if known.all():
            return self._pool_trained(table, rows, offsets)
        # Row 0 is left out, lest it be trained, and still counted in the mean.
        known_offsets = torch.cat([offsets.new_zeros(1), known.cumsum(0)])[offsets]
        share = known_offsets.diff() / offsets.diff().clamp(min=1)
        return self._pool_trained(table, rows[known], known_offsets) * share[:, None]

    def _pool_trained(self, table: str, rows: Tensor, offsets: Tensor) -> Tensor:
        features = KeyedJaggedTensor(keys=[table], values=rows, offsets=offsets)
        return self._fused[table](features).values()

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool the features present.

        Args:
            features: raw ids; each key is a feature of one of the tables.

        Returns:
            For each key, in the order given, its pooled embeddings [B, D].
        """
        pooled = []
        for name in features.keys():  # noqa: SIM118 (not a dict)
            bags = features[name]
            pooled.append(self.pool(name, self.rows(name, bags.values()), bags.offsets()))
        return KeyedTensor(
            keys=list(features.keys()),
            length_per_key=[embedding.shape[1] for embedding in pooled],
            values=torch.cat(pooled, dim=1),
        )
