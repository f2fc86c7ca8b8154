"""Tests that run on the CPU everywhere, and on a GPU too where there is one that can be used."""

import pytest
import torch

from features.errors import BadInputError
from ranking.device import training_device


def _usable() -> bool:
    try:
        return training_device("cuda").type == "cuda"
    except BadInputError:
        return False


needs_gpu = pytest.mark.skipif(
    not _usable(), reason="needs an NVIDIA GPU, a CUDA build of torch and fbgemm-gpu"
)
on_every_device = pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=needs_gpu)])


def device(kind: str) -> torch.device:
    """Return the device of a kind."""
    return training_device(kind)  # type: ignore[arg-type]
