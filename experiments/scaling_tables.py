"""A training step with product tables of 10 thousand to 20 million rows."""

import json
from statistics import median
from typing import Any

from experiments.load_checks import Check, Part, at_least, at_most
from experiments.scaling_results import GIB, ScalingConfig, run_python
from features.console import say

# Float16, and twice as wide where they are trained: 20 million rows are then 2.6 GB of float32.
DIMENSION = 32
SIZES = (10_000, 1_000_000, 20_000_000)

_MODES = ("frozen", "fine-tuned")
_HISTORY = 20
_ROWS = 400_000
_ROUNDS = 3
_LEAST_SHARE = 0.8
_MOST_GIB = 6


def measure(config: ScalingConfig) -> Part:
    """Train a few steps with each table; the sizes take turns, so that all meet a slow spell."""
    checks: list[Check] = []
    figures: dict[str, Any] = {"dimension": DIMENSION, "history": _HISTORY, "rows": _ROWS}
    for mode in _MODES:
        found: dict[int, list[dict[str, float]]] = {size: [] for size in SIZES}
        for turn in range(_ROUNDS):
            for size in SIZES:
                say(f"round {turn + 1} of {_ROUNDS}: {mode} table of {size:,} products")
                found[size].append(_step(mode, size, config.threads))
        speeds = {size: median(run["rows_per_second"] for run in found[size]) for size in SIZES}
        peak = max(run["peak_bytes"] for run in found[SIZES[-1]]) / GIB
        share = speeds[SIZES[-1]] / speeds[SIZES[0]]
        name = f"{mode}: rows/s with {SIZES[-1]:,} products over those with {SIZES[0]:,}"
        checks += [at_least(name, share, _LEAST_SHARE)]
        checks += [
            at_most(f"{mode}: peak memory with {SIZES[-1]:,} products, GiB", peak, _MOST_GIB)
        ]
        figures[mode] = {
            str(size): {"rows_per_second": speeds[size], "rounds": found[size]} for size in SIZES
        }
    return Part(checks=tuple(checks), figures=figures)


def _step(mode: str, size: int, threads: int) -> dict[str, float]:
    options = {
        "what": "step",
        "products": size,
        "dimension": DIMENSION,
        "history": _HISTORY,
        "tables": mode,
        "rows": _ROWS,
        "threads": threads,
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = run_python(["-m", "experiments.scaling_step", *arguments])
    return {**json.loads(done.text), "peak_bytes": done.peak_bytes}
