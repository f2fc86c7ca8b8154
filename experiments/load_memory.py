"""What the service's workers hold and use while they are under load."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from experiments.load_service import memory, processor_s

_MIB = 1 << 20


@dataclass(slots=True, kw_only=True)
class MemoryWatch:
    """Samples the memory and processor time of processes, the service's workers, each second."""

    pids: tuple[int, ...]
    seconds: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    _processor: list[float] = field(default_factory=list)

    async def run(self) -> None:
        """Sample until cancelled."""
        self._processor = [processor_s(pid) for pid in self.pids]
        start = time.perf_counter()
        while True:
            sizes = [memory(pid) for pid in self.pids]
            self.seconds.append(time.perf_counter() - start)
            self.resident.append(sum(size for size, _ in sizes))
            self.own.append(sum(size for _, size in sizes))
            await asyncio.sleep(1.0)

    def growth(self) -> float:
        """Return how much the workers' own memory rose, as a share, after the first fifth.

        What the second fifth of the time held on average, against what the last fifth did: the
        first fifth is when buffers and queues take what they take at this load.
        """
        fifth = max(1, len(self.own) // 5)
        before = np.mean(self.own[fifth : 2 * fifth] or self.own)
        return float(np.mean(self.own[-fifth:]) / before - 1)

    def figures(self) -> dict[str, Any]:
        """Return start, peak, end and slope of the memory, and the processor time of each."""
        used = [processor_s(p) - b for p, b in zip(self.pids, self._processor, strict=False)]
        return {
            "worker_pids": list(self.pids),
            "worker_processor_s": used,
            "resident_mib": _course(self.seconds, self.resident),
            "resident_without_mapped_files_mib": _course(self.seconds, self.own),
            "growth_after_first_fifth": self.growth(),
        }


def _course(seconds: Sequence[float], sizes: Sequence[int]) -> dict[str, float]:
    """Return start, peak, end, and the slope per minute of the last four fifths, in MiB."""
    late = len(sizes) // 5
    slope = 0.0
    if len(sizes) - late > 1:
        slope = float(np.polyfit(seconds[late:], sizes[late:], 1)[0]) * 60
    values = {"start": sizes[0], "peak": max(sizes), "end": sizes[-1], "slope_per_min": slope}
    return {name: value / _MIB for name, value in values.items()}
