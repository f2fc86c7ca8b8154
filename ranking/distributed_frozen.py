"""Frozen tables of which every process holds a range of rows.

A table that is too large to be copied to every process is cut by rows: each process reads no more
of the file than its range. Before a batch is looked up, the rows that it reads are fetched from the
processes that hold them, each row once, and lie beside the model as a small table; the batch's rows
are renumbered to it. Everything else is computed on the same numbers as with whole tables. There is
no gradient and no optimiser state.

Legend: ``U`` different rows that a batch reads of a table, ``D`` embedding dimension.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ranking.distributed import rank, world
from ranking.encoded import EncodedBatch
from ranking.pretrained_embeddings import PretrainedTable
from ranking.ranker import Ranker

# NOTE: not torchrec's: its sharded tables carry an optimiser, and its quantised ones, which do
# not, serve inference on one process. A pooled lookup would also not do for `ranking.history`,
# which reads single rows.
# NOTE: the ids and the map from ids to rows, about 25 bytes a row, are whole in every process.

_BUFFERS = ("weight", "inverse_norm")
_MIB = 1 << 20


def own_rows(
    tables: Mapping[str, PretrainedTable], whole_table_mb: float
) -> dict[str, PretrainedTable]:
    """Return tables of which this process holds a range of the rows of each large one.

    Args:
        tables: whole ones.
        whole_table_mb: tables of up to this many MiB stay whole in every process.
    """
    found = dict(tables)
    for name, table in tables.items():
        rows, dim = table.weight.shape
        if rows * dim * table.weight.dtype.itemsize > whole_table_mb * _MIB:
            share = -(-rows // world())
            own = range(min(rank() * share, rows), min((rank() + 1) * share, rows))
            found[name] = replace(table, held=own)
    return found


class FrozenShards:
    """Fetches what a batch reads of the frozen tables that `own_rows` cut.

    Args:
        ranker: made with what `own_rows` returned; changed in place.
    """

    def __init__(self, ranker: Ranker) -> None:
        self._parts: dict[str, _RowRange] = {}
        if ranker.pretrained is None:
            return
        for name, held in ranker.pretrained.held_rows.items():
            rows = ranker.pretrained.id_maps[name].get_buffer("ids").numel() - 1
            self._parts[name] = _RowRange(ranker.pretrained.embedding_bags[name], held, rows)

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
    """A range of a table's rows, all processes' but the last one's of the same length.

    Args:
        bag: its buffers have row 0 and those of the range; replaced by what `fetch` finds.
        held: the range, counted without row 0.
        rows: of the whole table, without row 0.
    """

    def __init__(self, bag: nn.Module, held: range, rows: int) -> None:
        self._first = held.start
        self._share = max(-(-rows // world()), 1)
        self._bag = bag
        self._own = {name: bag.get_buffer(name) for name in _BUFFERS}
        for name in _BUFFERS:
            self._set(name, self._own[name][:0])

    def _set(self, name: str, values: Tensor) -> None:
        setattr(self._bag, name, values)

    def fetch(self, rows: Tensor) -> Tensor:
        """Put the rows that are named ([N] int64) into the model; returns where, [N] int64.

        Row 0, the unknown one, stays row 0; the first process gives it.
        """
        with_unknown = torch.cat([rows.new_zeros(1), rows])
        needed, places = with_unknown.unique(return_inverse=True)  # ascending: 0 comes first
        owner = (needed - 1).clamp(min=0) // self._share
        asked = torch.bincount(owner, minlength=world())
        to_give = torch.empty_like(asked)
        dist.all_to_all_single(to_give, asked)
        gives, takes = to_give.tolist(), asked.tolist()
        wanted = _exchange(needed, takes, gives) - self._first
        for name, own in self._own.items():
            self._set(name, _exchange(own.index_select(0, wanted), gives, takes))
        return places[1:]


def _exchange(values: Tensor, sends: list[int], takes: list[int]) -> Tensor:
    """Return [sum of ``takes``, …]: what the processes sent to this one, in their order."""
    found = values.new_empty((sum(takes), *values.shape[1:]))
    dist.all_to_all_single(found, values.contiguous(), takes, sends)
    return found
