"""A ranker on a GPU: its dense layers and its tables, each table in its place.

What encodes batches, the transforms and the maps from ids to rows, stays on the CPU.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ranking.device_placement import Place, TableSize, plan_tables
from ranking.device_tables import DeviceTables
from ranking.pretrained_embeddings import FusedEmbeddingBagCollection
from ranking.ranker import Ranker

_FOR_TABLES = 0.7  # of the free memory; the rest is for layers, activations and batches
_FLOAT_BYTES = 4
_BUFFERS = ("weight", "inverse_norm")


class DeviceModel:
    """Moves a ranker to a device, and knows where its trained tables then are.

    The ranker's own trainable tables are replaced by `DeviceTables` with the same content.

    Args:
        ranker: changed in place.
        device: where it is to compute.
        budget: bytes of a GPU's memory for tables; a share of what is free where None.

    Attributes:
        places: of all tables on a GPU, by ``collection/table``.
        optimizers: of the trained tables, by collection.
    """

    # NOTE: the whole tables are made on the CPU first, so that their first values are those of a
    # training there.

    def __init__(self, ranker: Ranker, device: torch.device, budget: int | None = None) -> None:
        self._tables: dict[str, DeviceTables] = {}
        whole = {
            name: module
            for name, module in ranker.named_modules()
            if isinstance(module, FusedEmbeddingBagCollection)
        }
        if budget is None:
            budget = memory_for_tables(device)
        self.places: dict[str, Place] = {}
        if device.type == "cuda":
            self.places = plan_tables([*_trained_sizes(whole), *_frozen_sizes(ranker)], budget)
        for name, module in whole.items():
            self._tables[name] = self._taken(ranker, name, module, device)
        if ranker.pretrained is not None and ranker.config.tables != "frozen":
            ranker.pretrained.reads_at_once = True
            for bag in ranker.pretrained.embedding_bags.values():
                bag.weight = torch.empty(0)  # it was a view of the whole table
        _move_frozen(ranker, device, self.places)
        _move_dense(ranker, device)
        self.optimizers: list[tuple[str, Any]] = [
            (name, tables.optimizer) for name, tables in self._tables.items()
        ]

    @torch.no_grad()
    def _taken(
        self, ranker: Ranker, name: str, whole: FusedEmbeddingBagCollection, device: torch.device
    ) -> DeviceTables:
        configs = whole.embedding_bag_configs()
        places = {config.name: self.places.get(f"{name}/{config.name}") for config in configs}
        tables = DeviceTables(
            configs,
            {table: place or Place(where="device") for table, place in places.items()},
            device,
            whole.optimizer_kwargs()["lr"],
        )
        values = whole.state_dict()
        for table, weight in tables.weights().items():
            weight.copy_(values[f"embedding_bags.{table}.weight"])
        ranker.set_submodule(name, tables)
        return tables

    def weights(self) -> dict[str, Tensor]:
        """Return the trained tables, by the names that the state of a ranker on the CPU has."""
        return {
            f"{name}.embedding_bags.{table}.weight": weight
            for name, tables in self._tables.items()
            for table, weight in tables.weights().items()
        }

    def momenta(self) -> dict[str, Tensor]:
        """Return what their optimisers keep, by the names that a checkpoint has."""
        return {
            f"{name}/{table}.weight/{table}.weight.momentum_1": state
            for name, tables in self._tables.items()
            for table, state in tables.momenta().items()
        }


def memory_for_tables(device: torch.device) -> int:
    """Return how many bytes of a GPU's free memory tables may take; 0 for the CPU."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * _FOR_TABLES)


def _trained_sizes(whole: Mapping[str, FusedEmbeddingBagCollection]) -> list[TableSize]:
    return [
        TableSize(
            name=f"{name}/{config.name}",
            rows=config.num_embeddings,
            row_bytes=_FLOAT_BYTES * config.embedding_dim,
            trained=True,
        )
        for name, module in whole.items()
        for config in module.embedding_bag_configs()
    ]


def _frozen_sizes(ranker: Ranker) -> list[TableSize]:
    """Return the sizes of a ranker's frozen tables, by ``pretrained/table``."""
    return [
        TableSize(
            name=f"pretrained/{name}",
            rows=len(weight),
            row_bytes=weight[:1].nbytes,
            trained=False,
        )
        for name, bag in _frozen_bags(ranker).items()
        if len(weight := bag.get_buffer("weight"))
    ]


def move_ranker(ranker: Ranker, device: torch.device) -> None:
    """Move a ranker whose trained tables are on the device already; on the CPU it stays as it is.

    Args:
        ranker: changed in place.
        device: where it is to compute.
    """
    if device.type == "cuda":
        places = plan_tables(_frozen_sizes(ranker), memory_for_tables(device))
        _move_frozen(ranker, device, places)
        _move_dense(ranker, device)


def _move_frozen(ranker: Ranker, device: torch.device, places: Mapping[str, Place]) -> None:
    """Move those of a ranker's frozen tables that have a place, one at a time."""
    for name, bag in _frozen_bags(ranker).items():
        place = places.get(f"pretrained/{name}")
        if place is None:
            continue
        for buffer in _BUFFERS:
            values = bag.get_buffer(buffer)
            on_host = place.where == "host" and buffer == "weight"
            moved = _mapped(values, device) if on_host else values.to(device)
            setattr(bag, buffer, moved)


def _frozen_bags(ranker: Ranker) -> dict[str, nn.Module]:
    if ranker.pretrained is None or ranker.config.tables != "frozen":
        return {}
    return dict(ranker.pretrained.embedding_bags.items())


def _mapped(values: Tensor, device: torch.device) -> Tensor:
    """Return ``values`` in the machine's memory where the GPU can read them."""
    like = torch.zeros(1, dtype=values.dtype, device=device)
    found: Tensor = torch.ops.fbgemm.new_unified_tensor(like, list(values.shape), True)
    return found.copy_(values)


def _move_dense(ranker: Ranker, device: torch.device) -> None:
    """Move the dense layers of a ranker; their parameters stay the same objects."""
    for part in (ranker.dcn_tower, ranker.embedding_tower, ranker.joint, ranker.head):
        if part is not None:
            part.to(device)
