"""Training on a GPU against the same machine's cores: speed, and how far from what each can do."""

import json
from statistics import median
from typing import Any

from experiments.load_checks import Check, Part
from experiments.scaling_results import ScalingConfig, figure, run_python
from features.console import say

# Float16: a gigabyte, of which no cache holds much; twice as wide where it is trained.
PRODUCTS = 4_000_000
DIMENSION = 128
HISTORY = 100
ROWS = {"cpu": 400_000, "cuda": 4_000_000}

_ROUNDS = 3
_BATCH = 4_096
_LARGE_BATCH = 65_536
_BEYOND = 0.1  # of a table that lies in the machine's memory, what the GPU's may hold

# Contestants: device, batch, tables, share of the tables that may lie on a GPU.
_CASES: dict[str, tuple[str, int, str, float]] = {
    "cpu": ("cpu", _BATCH, "frozen", 1.0),
    "gpu": ("cuda", _BATCH, "frozen", 1.0),
    "gpu, large batches": ("cuda", _LARGE_BATCH, "frozen", 1.0),
    "gpu, trained tables": ("cuda", _LARGE_BATCH, "fine-tuned", 1.0),
    "gpu, trained tables beyond its memory": ("cuda", _LARGE_BATCH, "fine-tuned", _BEYOND),
    "gpu, frozen tables beyond its memory": ("cuda", _LARGE_BATCH, "frozen", _BEYOND),
}


def measure(config: ScalingConfig) -> Part:
    """Train a while in each way, in turn; without a GPU there is nothing to measure."""
    if not _has_gpu():
        return Part(checks=(figure("GPU", "none at hand"),), figures={"gpu": None})
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in _CASES}
    for turn in range(_ROUNDS):
        for name, case in _CASES.items():
            say(f"round {turn + 1} of {_ROUNDS}: {name}")
            found[name].append(_run(*case, threads=config.threads))
    typical = {name: _typical(runs) for name, runs in found.items()}
    setting = {"products": PRODUCTS, "dimension": DIMENSION, "history": HISTORY}
    return Part(checks=_checks(typical), figures={**setting, "contestants": typical})


def _has_gpu() -> bool:
    from ranking.device import training_device

    return training_device("auto").type == "cuda"


def _run(device: str, batch: int, tables: str, on_device: float, *, threads: int) -> dict[str, Any]:
    options = {
        "device": device,
        "batch-rows": batch,
        "rows": ROWS[device],
        "products": PRODUCTS,
        "dimension": DIMENSION,
        "history": HISTORY,
        "tables": tables,
        "on-device": on_device,
        "threads": threads,
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    found: dict[str, Any] = json.loads(
        run_python(["-m", "experiments.scaling_gpu_step", *arguments]).text
    )
    return found


def _typical(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of the numbers that the runs have, and what else the first one has."""
    first = runs[0]
    return {
        name: _typical([run[name] for run in runs])
        if isinstance(value, dict)
        else median(run[name] for run in runs)
        if isinstance(value, float)
        else value
        for name, value in first.items()
    }


def _checks(found: dict[str, dict[str, Any]]) -> tuple[Check, ...]:
    checks = [figure("GPU", found["gpu"]["device"])]
    for name, case in found.items():
        checks += [
            figure(f"{name}: rows/s", case["rows_per_second"]),
            figure(f"{name}: rows/s of steps, without reading", case["step_rows_per_second"]),
            figure(f"{name}: lookup, share of the bandwidth of a copy", case["lookup"]["share"]),
            figure(f"{name}: dense layers, share of a matrix product", case["dense"]["share"]),
        ]
    steps = {name: case["step_rows_per_second"] for name, case in found.items()}
    kept = steps["gpu, trained tables beyond its memory"] / steps["gpu, trained tables"]
    checks += [
        figure("gpu over cpu, steps", steps["gpu, large batches"] / steps["cpu"]),
        figure("tables beyond memory over tables in it, steps", kept),
    ]
    return tuple(checks)
