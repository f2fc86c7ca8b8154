"""The trainable tables spread over several processes by torchrec's planner.

Small tables are copied to every process (data-parallel), of which each updates its own copy by the
sum of all gradients. Larger ones lie whole in one process (table-wise) or in equal ranges of rows
in all (row-wise), as the planner finds cheaper: their rows are asked for and their gradients sent
back, and the process that holds a row updates it in its backward pass, as one process does.

Legend: ``S`` features of a collection, ``N`` bags of this process, ``P`` the most bags that any
process has, ``D`` embedding dimension, ``R`` rows of a table.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ranking.distributed import greatest, no_warnings, world
from ranking.pretrained_embeddings import (
    EmbeddingBagConfig,
    FusedEmbeddingBagCollection,
    KeyedJaggedTensor,
    KeyedTensor,
)
from ranking.ranker import Ranker

from fbgemm_gpu.split_embedding_configs import EmbOptimType  # isort: skip
from torchrec.distributed.comm_ops import set_gradient_division  # isort: skip
from torchrec.distributed.embedding_types import EmbeddingComputeKernel  # isort: skip
from torchrec.distributed.embeddingbag import (  # isort: skip
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.model_parallel import (  # isort: skip
    DataParallelWrapper,
    DistributedModelParallel,
)
from torchrec.distributed.planner import (  # isort: skip
    EmbeddingShardingPlanner,
    ParameterConstraints,
    Topology,
)
from torchrec.distributed.planner.storage_reservations import (  # isort: skip
    FixedPercentageStorageReservation,
)
from torchrec.distributed.types import ShardingPlan, ShardingType  # isort: skip
from torchrec.modules.embedding_modules import EmbeddingBagCollection  # isort: skip
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad  # isort: skip

_EPSILON = 1e-8
_COPIED_BYTES = 8 << 20  # tables up to this size are copied, as to send their gradients is cheap
_RESERVED = 0.5  # of the memory, for everything else
_COPIED = ShardingType.DATA_PARALLEL.value
_SPREAD = [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value]
# On a GPU: in its memory, or in the machine's, of which it reads and writes single rows.
# NOTE: without fbgemm's cache of those rows: from a lookup to its update no other lookup may change
# the cache, and a table of products is looked up twice a step.
_KERNELS = [EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.FUSED_UVM.value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The rows of a table, or of its optimiser state, that this process holds.

    Attributes:
        rows: [r, …], a view of what training changes; r is 0 where it holds none.
        first: number of the first of them.
        shape: of the whole table.
        copied: whether every process holds the whole table.
    """

    rows: Tensor
    first: int
    shape: tuple[int, ...]
    copied: bool

    def of(self, whole: Tensor) -> Tensor:
        """Return this piece's part of a whole table."""
        return whole[self.first : self.first + len(self.rows)]


class SpreadTables(nn.Module):
    """A collection of tables that several processes hold, looked up like a whole one.

    All processes must look up at the same time. Its weights are no part of its state dictionary.

    Args:
        sharded: the processes' collection.
        configs: of its tables; one feature each.
    """

    def __init__(
        self, sharded: ShardedEmbeddingBagCollection, configs: list[EmbeddingBagConfig]
    ) -> None:
        super().__init__()
        self._hidden = (sharded,)  # not a submodule
        self._configs = configs
        self._names = [name for config in configs for name in config.feature_names]

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """Return the tables' configurations."""
        return self._configs

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up N bags of each of the S features; returns embeddings [N, S * D].

        gloo exchanges parts of one size only, and torchrec cannot split an empty
        KeyedJaggedTensor: every process asks for P bags, the last of them empty.
        """
        bags = features.lengths().numel() // len(self._names)
        padding = max(greatest(bags), 1) - bags
        lengths = F.pad(features.lengths().view(len(self._names), bags), (0, padding))
        padded = KeyedJaggedTensor(
            keys=self._names, values=features.values(), lengths=lengths.reshape(-1)
        )
        found = self._hidden[0](padded)
        values = torch.cat([found[name] for name in self._names], dim=1)[:bags]
        dims = [config.embedding_dim for config in self._configs]
        return KeyedTensor(keys=self._names, length_per_key=dims, values=values)


class SpreadTraining:
    """The trainable tables of a ranker, spread over the processes, and their optimisers.

    The ranker's own tables are replaced by `SpreadTables` with the same content.

    Args:
        ranker: changed in place.
        batch_rows: candidates in a batch of all processes, for the planner.
        device: of this process; all processes have the same kind.

    Attributes:
        plan: torchrec's, by collection.
        weights: by the names that the whole ranker's state has.
        momenta: sums of squared gradients, by the names that one process's checkpoint has.
        fused: optimisers of tables that are held in parts, by collection.
        copied: optimisers of tables that are copied, by collection.
    """

    # NOTE: each process makes the whole tables before it keeps its part of them, so that their
    # first values are those of one process.

    def __init__(self, ranker: Ranker, batch_rows: int, device: torch.device) -> None:
        self.weights: dict[str, Piece] = {}
        self.momenta: dict[str, Piece] = {}
        self.fused: list[tuple[str, Any]] = []
        self.copied: list[tuple[str, RowWiseAdagrad]] = []
        whole = {
            name: module
            for name, module in ranker.named_modules()
            if isinstance(module, FusedEmbeddingBagCollection)
        }
        self.plan, sharded = _shard(whole, batch_rows // world(), device)
        for name, module in whole.items():
            self._take(name, module, sharded[name])
            tables = SpreadTables(sharded[name], module.embedding_bag_configs())
            ranker.set_submodule(name, tables)
        if ranker.pretrained is not None and ranker.config.tables != "frozen":
            for bag in ranker.pretrained.embedding_bags.values():
                bag.weight = torch.empty(0)  # it was a view of the whole table

    def step(self) -> None:
        """Update the copied tables by the sum of all processes' gradients."""
        for _, optimizer in self.copied:
            for group in optimizer.param_groups:
                gradients = [table.grad for table in group["params"]]
                for gradient in gradients:
                    gradient.mul_(world())  # torchrec has them averaged
                optimizer.step()
                for gradient in gradients:
                    gradient.zero_()

    @torch.no_grad()
    def _take(
        self, module: str, whole: FusedEmbeddingBagCollection, part: ShardedEmbeddingBagCollection
    ) -> None:
        """Copy this process's part of the ``whole`` tables, and note where it and its state lie."""
        values = whole.state_dict()
        copied = []
        for name, found in part.state_dict().items():
            table = name.split(".")[1]
            piece = _piece(found, values[name].shape)
            piece.rows.copy_(piece.of(values[name]))
            self.weights[f"{module}.{name}"] = piece
            if piece.copied:
                copied.append((table, part.embedding_bags[table].weight))
        if copied:
            optimizer = RowWiseAdagrad([weight for _, weight in copied], eps=_EPSILON)
            self.copied.append((module, optimizer))
            for table, weight in copied:
                state = optimizer.state[weight]["sum"].view(-1)
                self.momenta[_momentum(module, table)] = _piece(state, state.shape)
        self.fused.append((module, part.fused_optimizer))
        states = part.fused_optimizer.state_dict()["state"]
        for config in whole.embedding_bag_configs():
            key = _momentum(module, config.name)
            if key not in self.momenta:
                state = states.get(f"embedding_bags.{config.name}.weight", {})
                held = state.get(f"{config.name}.momentum1")
                rows = torch.zeros(0) if held is None else held
                self.momenta[key] = _piece(rows, (config.num_embeddings,), copied=False)


def _momentum(module: str, table: str) -> str:
    return f"{module}/{table}.weight/{table}.weight.momentum_1"


def _piece(found: Any, shape: tuple[int, ...], *, copied: bool = True) -> Piece:
    """Return what this process holds of a tensor that is sharded, or whole."""
    if not hasattr(found, "local_shards"):
        return Piece(rows=found, first=0, shape=tuple(shape), copied=copied)
    shards = found.local_shards()
    assert len(shards) <= 1, "tables are cut by rows, into one part a process"
    if not shards:
        return Piece(rows=torch.zeros(0, *shape[1:]), first=0, shape=tuple(shape), copied=False)
    first = shards[0].metadata.shard_offsets[0]
    return Piece(rows=shards[0].tensor, first=first, shape=tuple(shape), copied=False)


class _Sharder(EmbeddingBagCollectionSharder):
    """Torchrec's sharder, with row-wise tables on the CPU too: gloo can do what they need."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Return the ways to place a table; columns are never cut."""
        return [_COPIED, *_SPREAD]


class _DenseElsewhere(DataParallelWrapper):
    """Leaves the dense layers alone: `ranking.distributed.begin_sum` sums their gradients.

    Torch's own wrapper averages the gradients of processes; a batch's candidates are not spread
    evenly, so that the loss is a sum with the weight of the whole batch as its divisor.
    """

    def wrap(self, *_: Any, **__: Any) -> None:
        """Do nothing."""


def _shard(
    whole: dict[str, FusedEmbeddingBagCollection], batch_rows: int, device: torch.device
) -> tuple[ShardingPlan | None, dict[str, ShardedEmbeddingBagCollection]]:
    """Return the plan and the processes' collections, with values yet to be set."""
    if not whole:
        return None, {}
    set_gradient_division(False)  # the loss is divided by the weight of the whole batch already
    holder = nn.Module()
    constraints: dict[str, ParameterConstraints] = {}
    for name, module in whole.items():
        configs = module.embedding_bag_configs()
        meta = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
        holder.add_module(_key(name), meta)
        constraints |= {c.name: _constraint(name, c, device) for c in configs}
    planner = EmbeddingShardingPlanner(
        topology=_topology(device),
        batch_size=max(batch_rows, 1),
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(percentage=_RESERVED),
        debug=False,
    )
    optimizer = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "eps": _EPSILON}
    if device.type == "cuda":
        optimizer["uvm_host_mapped"] = True
    sharders = [_Sharder(fused_params=optimizer)]
    group = dist.group.WORLD
    assert group is not None
    with no_warnings():
        plan = planner.collective_plan(holder, sharders, group)
        model = DistributedModelParallel(
            holder,
            device=device,
            plan=plan,
            sharders=sharders,
            data_parallel_wrapper=_DenseElsewhere(),
        )
    return plan, {name: getattr(model.module, _key(name)) for name in whole}


def _constraint(
    collection: str, config: EmbeddingBagConfig, device: torch.device
) -> ParameterConstraints:
    """Say which ways of placing a table the planner may choose from."""
    small = 4 * config.num_embeddings * config.embedding_dim <= _COPIED_BYTES
    # A table of products is looked up twice a step, which copies do not allow.
    copied = small and not collection.startswith("pretrained")
    return ParameterConstraints(
        sharding_types=[_COPIED] if copied else _SPREAD,
        compute_kernels=_KERNELS if device.type == "cuda" and not copied else None,
    )


def _topology(device: torch.device) -> Topology:
    """Describe the machines to the planner, each like this one."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpu = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return Topology(
        world_size=world(),
        local_world_size=here,
        compute_device=device.type,
        hbm_cap=gpu,
        ddr_cap=memory // here,
    )


def _key(name: str) -> str:
    return name.replace(".", "-")


def placements(training: SpreadTraining) -> Iterator[tuple[str, str]]:
    """Yield each table, as ``collection/table``, and how torchrec's planner placed it."""
    if training.plan is not None:
        for module, tables in training.plan.plan.items():
            for table, placed in tables.items():
                yield f"{module}/{table}", placed.sharding_type
