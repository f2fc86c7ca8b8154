"""Checkpoints that several processes write together and any number of processes reads.

`torch.distributed.checkpoint` writes each process's pieces of the tables, and what all of them
hold once, into one folder beside the file that one process writes::

    checkpoint/
      sharded-000001200/        after step 1,200
        .metadata               which part of which tensor lies where
        __0_0.distcp            what process 0 wrote
        __1_0.distcp
        progress.json

The names of the tensors are those of one process's checkpoint, so that a run goes on with another
number of processes, one included. A folder is complete once it has its name.
"""

# NOTE: `.metadata` is a pickle, by torch's format: a checkpoint is a run's own, as no bundle is.

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from features.checkpoint import load_state, read_header
from features.errors import BadInputError
from ranking.distributed import from_first, gather_to_first, is_first, world
from ranking.distributed_tables import Piece

_PREFIX = "sharded-"
_NAME = re.compile(rf"{_PREFIX}(\d+)")
_PROGRESS = "progress.json"


def newest(file: Path) -> Path | None:
    """Return the checkpoint of a run that is furthest on; None where there is none.

    Args:
        file: where one process writes; folders that several processes wrote lie beside it.
    """
    found = {path: int(match.group(1)) for path, match in _folders(file)}
    if file.exists():
        # Damaged as it may be, it is the run's only checkpoint: reading it says so.
        found[file] = read_header(file)["step"] if found else 0
    return max(found, key=lambda path: found[path], default=None)


def _folders(file: Path) -> list[tuple[Path, re.Match[str]]]:
    paths = file.parent.glob(f"{_PREFIX}*")
    return [(path, match) for path in paths if (match := _NAME.fullmatch(path.name))]


def remove_others(kept: Path, file: Path) -> None:
    """Remove every checkpoint of a run but one."""
    for path in [file, *(folder for folder, _ in _folders(file))]:
        if path != kept and path.is_dir():
            shutil.rmtree(path)
        elif path != kept:
            path.unlink(missing_ok=True)


def save_sharded(
    file: Path, tensors: Mapping[str, Tensor], pieces: Mapping[str, Piece], header: dict[str, Any]
) -> None:
    """Write a checkpoint from all processes, whole or not at all, in place of the ones before.

    Args:
        file: where one process would write it.
        tensors: by name; of those in ``pieces`` what this process holds, of others the whole.
        pieces: where what this process holds lies in the whole, for tables that are cut.
        header: the progress; its ``step`` names the folder.
    """
    folder = file.with_name(f"{_PREFIX}{header['step']:09d}")
    scratch = file.with_name(f".{_PREFIX}partial")
    from_first(lambda: _make_room(scratch))
    state = {name: _global(tensor, pieces.get(name)) for name, tensor in tensors.items()}
    dcp.save(state, storage_writer=FileSystemWriter(scratch, thread_count=1))

    def finish() -> None:
        (scratch / _PROGRESS).write_text(json.dumps(header), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        scratch.replace(folder)
        remove_others(folder, file)

    from_first(finish)


def _make_room(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def load_sharded(
    folder: Path, pieces: Mapping[str, Piece] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint, in one process or in all.

    Args:
        folder: what `save_sharded` wrote, with whatever number of processes.
        pieces: what this process is to hold of tables that are cut; whole ones where not named.

    Returns:
        Tensors by name, and the progress.

    Raises:
        BadInputError: the folder is incomplete or damaged, or a table has another shape.
    """
    pieces = pieces or {}
    try:
        found = FileSystemReader(folder).read_metadata().state_dict_metadata
        header = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
    except Exception as error:  # it is unpickled: anything can come of damage
        raise BadInputError(f"{folder}: damaged or not a checkpoint: {error}") from error
    tensors = {}
    for name, described in found.items():
        assert isinstance(described, TensorStorageMetadata), "nothing else is written"
        shape, piece = tuple(described.size), pieces.get(name)
        if piece is not None and piece.shape != shape:
            raise BadInputError(
                f"{folder}: tensor '{name}' has shape {shape}, expected {piece.shape}"
            )
        own = shape if piece is None else tuple(piece.rows.shape)
        tensors[name] = torch.zeros(own, dtype=described.properties.dtype)
    state = {name: _global(tensor, pieces.get(name)) for name, tensor in tensors.items()}
    try:
        dcp.load(state, storage_reader=FileSystemReader(folder), no_dist=world() == 1)
    except (dcp.CheckpointException, OSError) as error:
        raise BadInputError(f"{folder}: damaged or not a checkpoint: {error}") from error
    return tensors, header


def read_any(path: Path, pieces: Mapping[str, Piece]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what one process or several wrote; returns what this process holds, and the progress.

    Raises:
        BadInputError: the checkpoint is damaged, or a table has another shape.
    """
    if path.is_dir():
        return load_sharded(path, pieces)
    tensors, header = load_state(path)
    for name in tensors.keys() & pieces.keys():
        found, piece = tensors[name], pieces[name]
        if tuple(found.shape) != piece.shape:
            raise BadInputError(
                f"{path}: tensor '{name}' has shape {tuple(found.shape)}, expected {piece.shape}"
            )
        tensors[name] = piece.of(found).clone()
    return tensors, header


def _global(tensor: Tensor, piece: Piece | None) -> Any:
    """Return a process's part of a tensor as `torch.distributed.checkpoint` wants it."""
    if piece is None or piece.copied:
        return tensor.detach()
    from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards

    shards = []
    if len(tensor):
        offsets = [piece.first] + [0] * (tensor.dim() - 1)
        shards = [Shard.from_tensor_and_offsets(tensor.detach(), offsets, dist.get_rank())]
    return init_from_local_shards(shards, *piece.shape)


def gather_whole(
    tensors: Mapping[str, Tensor], pieces: Mapping[str, Piece]
) -> dict[str, Tensor] | None:
    """Return the whole of every tensor in the first process, None elsewhere."""
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        piece = pieces.get(name)
        if piece is None or piece.copied:
            whole[name] = tensor
            continue
        parts = gather_to_first((piece.first, tensor.detach().cpu()))
        if is_first():
            whole[name] = torch.zeros(piece.shape, dtype=tensor.dtype)
            for first, rows in parts:
                whole[name][first : first + len(rows)] = rows
    return whole if is_first() else None
