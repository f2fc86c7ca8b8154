"""Checkpoints and model files: safetensors with a JSON header, never a pickle.

One file holds one state, so that replacing it is one rename: a process killed at any moment leaves
either the old state or the new one.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from features.errors import BadInputError
from features.files import atomic_file

_HEADER = "dashclip"


def save_state(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write tensors and a JSON-like header to ``path``, whole or not at all.

    Raises:
        OSError: the file cannot be written, with ``ENOSPC`` where the disk is full.
    """
    with atomic_file(path) as scratch:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, scratch, metadata={_HEADER: json.dumps(header)})
        except SafetensorError as error:
            if f"os error {errno.ENOSPC}" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
            raise


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_state` wrote.

    Raises:
        BadInputError: the file is missing, damaged, or not one of ours.
    """
    if not path.is_file():
        raise BadInputError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise BadInputError(f"{path}: damaged or not a safetensors file: {error}") from error
    return tensors, _header(path, metadata)


def read_header(path: Path) -> dict[str, Any]:
    """Return the header that `save_state` wrote, without reading the tensors.

    Raises:
        BadInputError: the file is damaged, or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise BadInputError(f"{path}: damaged or not a safetensors file: {error}") from error
    return _header(path, metadata)


def _header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if _HEADER not in metadata:
        raise BadInputError(f"{path}: not written by this project, it has no '{_HEADER}' header")
    header: dict[str, Any] = json.loads(metadata[_HEADER])
    return header


def copy_into(target: dict[str, Tensor], source: dict[str, Tensor], where: str) -> None:
    """Copy every tensor of ``source`` into its namesake.

    Raises:
        BadInputError: names or shapes differ; the message names the first that does.
    """
    for name in sorted(target.keys() ^ source.keys()):
        kind = "lacks" if name in target else "has an unknown"
        raise BadInputError(f"{where}: the model state {kind} tensor '{name}'")
    with torch.no_grad():
        for name, tensor in target.items():
            if tensor.shape != source[name].shape:
                raise BadInputError(
                    f"{where}: tensor '{name}' has shape {tuple(source[name].shape)}, "
                    f"expected {tuple(tensor.shape)}"
                )
            tensor.copy_(source[name])
