"""Histories of 10, 100 and 1,000 purchases: their cost, and what pooling once a request saves."""

import json
from statistics import median
from typing import Any

from experiments.load_checks import Check, Part, at_least
from experiments.scaling_results import ScalingConfig, figure, run_python
from features.console import say

LENGTHS = (10, 100, 1_000)
DIMENSION = 64

_PRODUCTS = 100_000
_ROWS = 200_000
_ROUNDS = 3
_LEAST_SAVED = 5  # of the 24 times that there are candidates a request


def measure(config: ScalingConfig) -> Part:
    """Time training steps and poolings with each length; the lengths take turns."""
    found: dict[int, list[dict[str, float]]] = {length: [] for length in LENGTHS}
    for turn in range(_ROUNDS):
        for length in LENGTHS:
            say(f"round {turn + 1} of {_ROUNDS}: histories of {length:,} purchases")
            step = _run("step", length, config.threads)
            found[length].append(step | _run("pooling", length, config.threads))
    checks: list[Check] = []
    figures: dict[str, Any] = {"dimension": DIMENSION, "products": _PRODUCTS, "rows": _ROWS}
    for length, runs in found.items():
        typical = {name: median(run[name] for run in runs) for name in runs[0]}
        saved = typical["candidate_pooling"] / typical["request_pooling"]
        forward = typical["candidate_forward"] / typical["request_forward"]
        cost = 1e6 / typical["rows_per_second"]
        what = f"{length:,} purchases"
        checks += [
            figure(f"{what}: training, µs a row", cost),
            figure(f"{what}: pooling, µs a row", 1e6 * typical["request_pooling"]),
            at_least(
                f"{what}: pooling for each candidate over once a request", saved, _LEAST_SAVED
            ),
            figure(f"{what}: forward pass for each candidate over once a request", forward),
        ]
        figures[str(length)] = typical | {"pooling_saves": saved, "forward_saves": forward}
    return Part(checks=tuple(checks), figures=figures)


def _run(what: str, length: int, threads: int) -> dict[str, float]:
    options = {
        "what": what,
        "products": _PRODUCTS,
        "dimension": DIMENSION,
        "history": length,
        "tables": "frozen",
        "rows": _ROWS,
        "threads": threads,
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return dict(json.loads(run_python(["-m", "experiments.scaling_step", *arguments]).text))
