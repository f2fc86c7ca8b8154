"""What the processor and the C library do well, asked where it matters for speed."""

import ctypes
from typing import Any, Literal

Precision = Literal["float32", "bfloat16"]

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LARGE = 1 << 30


def fast_precision() -> Precision:
    """Return ``bfloat16`` where the processor multiplies it natively, else ``float32``.

    Elsewhere bfloat16 products are emulated and slower than float32 ones.
    """
    import torch

    # Older versions of torch do not say what a processor can do.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bfloat16" if native else "float32"


def keep_freed_memory() -> bool:
    """Keep freed blocks of up to 1 GiB in the process; returns whether that took.

    glibc otherwise gives each larger block back to the system when it is freed, so that every
    activation of a few megabytes is mapped and zeroed by the kernel again at every step: for the
    element-wise work on a batch that costs several times the arithmetic. Other C libraries are
    left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_THRESHOLD, _LARGE), (_M_TRIM_THRESHOLD, _LARGE), (_M_ARENA_MAX, 1))
    return sum(mallopt(name, value) for name, value in settings) == len(settings)
