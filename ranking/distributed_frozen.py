"""Frozen tables of which every process holds a range of rows.

A table that is too large to be copied to every process is cut by rows. Before a batch is looked
up, the rows that it reads are fetched from the processes that hold them, each row once, and lie
beside the model as a small table; the batch's rows are renumbered to it. Everything else is
computed on the same numbers as with whole tables. There is no gradient and no optimiser state.

Legend: ``U`` different rows that a batch reads of a table, ``D`` embedding dimension.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ranking.distributed import rank, world
from ranking.encoded import EncodedBatch
from ranking.ranker import Ranker

# NOTE: not torchrec's: its sharded tables carry an optimiser, and its quantised ones, which do
# not, serve inference on one process. A pooled lookup would also not do for `ranking.history`,
# which reads single rows.
# NOTE: each process reads the whole table before it keeps its range of it.

_BUFFERS = ("weight", "inverse_norm")


class FrozenShards:
    """Cuts the large frozen tables of a ranker by rows, and fetches what a batch reads.

    Args:
        ranker: changed in place.
        most_bytes: tables up to this size stay whole in every process.
    """

    def __init__(self, ranker: Ranker, most_bytes: float) -> None:
        self._parts: dict[str, _RowRange] = {}
        if ranker.pretrained is None or ranker.config.tables != "frozen":
            return
        for name, bag in ranker.pretrained.embedding_bags.items():
            if bag.get_buffer("weight").nbytes > most_bytes:
                self._parts[name] = _RowRange(bag)

    @property
    def names(self) -> tuple[str, ...]:
        """The tables that are cut."""
        return tuple(self._parts)

    def localize(self, batch: EncodedBatch) -> EncodedBatch:
        """Fetch what a batch reads; returns the batch with the rows of what was fetched.

        All processes must call it at the same time, and each looks up the batch before it fetches
        for the next one.
        """
        for name, part in self._parts.items():
            fields = _FIELDS[name]
            rows = [getattr(batch, field) for field in fields]
            found = part.fetch(torch.cat(rows)).split([len(row) for row in rows])
            batch = replace(batch, **dict(zip(fields, found, strict=True)))
        return batch


_FIELDS = {"product": ("product", "history"), "query": ("query",)}


class _RowRange:
    """A range of a table's rows: ``held`` rows from ``rank * held`` on."""

    def __init__(self, bag: nn.Module) -> None:
        whole = len(bag.get_buffer("weight"))
        self._held = -(-whole // world())
        own = slice(rank() * self._held, min((rank() + 1) * self._held, whole))
        self._bag = bag
        self._own = {name: bag.get_buffer(name)[own].clone() for name in _BUFFERS}
        for name in _BUFFERS:
            self._set(name, self._own[name][:0])

    def _set(self, name: str, values: Tensor) -> None:
        setattr(self._bag, name, values)

    def fetch(self, rows: Tensor) -> Tensor:
        """Put the rows that are named ([N] int64) into the model; returns where, [N] int64.

        Row 0, the unknown one, stays row 0.
        """
        with_unknown = torch.cat([rows.new_zeros(1), rows])
        needed, places = with_unknown.unique(return_inverse=True)  # ascending: 0 comes first
        asked = torch.bincount(needed // self._held, minlength=world())
        to_give = torch.empty_like(asked)
        dist.all_to_all_single(to_give, asked)
        gives, takes = to_give.tolist(), asked.tolist()
        wanted = _exchange(needed, takes, gives) - rank() * self._held
        for name, own in self._own.items():
            self._set(name, _exchange(own.index_select(0, wanted), gives, takes))
        return places[1:]


def _exchange(values: Tensor, sends: list[int], takes: list[int]) -> Tensor:
    """Return [sum of ``takes``, …]: what the processes sent to this one, in their order."""
    found = values.new_empty((sum(takes), *values.shape[1:]))
    dist.all_to_all_single(found, values.contiguous(), takes, sends)
    return found
