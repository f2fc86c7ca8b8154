"""Where a ranker is trained: on the cores of the machine, or on a GPU."""

import os
from typing import Literal

import torch

from features.errors import BadInputError
from features.hardware import Precision, fast_precision
from ranking.distributed import world
from ranking.versions import FBGEMM_BUILDS, installed_versions

DeviceName = Literal["auto", "cpu", "cuda"]

_CPU_BUILD, _CUDA_BUILD = FBGEMM_BUILDS


def training_device(asked: DeviceName) -> torch.device:
    """Return the device that this process trains on.

    Args:
        asked: ``auto`` is the GPU where there is one that torch and fbgemm can use, one for each
            process of this machine, and else the CPU.

    Raises:
        BadInputError: a GPU is asked for and cannot be used; the message says why.
    """
    lacking = None if asked == "cpu" else _lacking()
    if asked == "cpu" or (asked == "auto" and lacking):
        return torch.device("cpu")
    if lacking:
        raise BadInputError(f"'device' is cuda, but {lacking}")
    return torch.device("cuda", torch.cuda.current_device())


def _lacking() -> str | None:
    """Say what keeps this process from training on a GPU."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no NVIDIA GPU on this machine"
    if _CUDA_BUILD not in installed_versions(FBGEMM_BUILDS):
        return (
            f"{_CPU_BUILD} looks tables up on the CPU alone: uninstall it and install {_CUDA_BUILD}"
        )
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world() > 1 else 1
    found = torch.cuda.device_count()
    if processes > found:
        return f"{processes} processes have {found} GPU between them: each needs one of its own"
    return None


def training_precision(
    asked: Literal["auto", "float32", "bfloat16"], device: torch.device
) -> Precision:
    """Return the precision of matrix products; ``auto`` is bfloat16 where it is fast."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return fast_precision()
