"""Keep freed memory in the process.

glibc gives every block above its threshold back to the system when it is freed, so that each
activation of a few megabytes is mapped and zeroed by the kernel again at every step: for the
element-wise work of a batch that costs several times the arithmetic.
"""

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGE = 1 << 30


def keep_freed_memory() -> bool:
    """Raise glibc's thresholds to 1 GiB; returns whether it took, false on other C libraries."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGE) and mallopt(_M_TRIM_THRESHOLD, _LARGE))
