"""Training of the ranker in one process against several: speed, efficiency, the same metrics.

Each contestant is the real command in a folder of its own, with one thread a process:
``train-ranker`` alone, and started by ``torchrun``::

    python -m experiments.scaling_processes --data data/complete-journey --output runs/processes

They take turns, so that a slow spell of the machine meets both; speeds are medians over the rounds.

Several processes add the same numbers in another order than one. What that may change in a metric
is measured too, by one process that reads each batch backwards (`experiments.reordered_training`).
"""

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from experiments.load_checks import Part, at_most
from experiments.scaling_results import ScalingConfig, figure
from experiments.scaling_training import METRICS, TOLERANCE, Training, differences
from features.config_file import from_toml, to_toml
from features.console import print_table, run_command, say
from features.files import write_text
from ranking.config import RankerConfig

FIGURES = "processes.json"
_REORDERED = "experiments.reordered_training"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Compare the training of the ranker in one process with that in several."""

    data: Path
    """Dataset folder; its request records are built if need be."""
    output: Path
    """Folder that receives processes.json and the runs."""
    tables: Path | None = None
    """Folder of embedding tables; `tables` in the dataset's folder where not given."""
    config: Path | None = None
    """Configuration of the ranker; threads and weeks are set here."""
    processes: int = 2
    """How many processes, with one thread each, to compare one with."""
    weeks: int = 2
    """Number of training weeks."""
    rounds: int = 1
    """How often each trains."""


def main() -> int:
    """Run the comparison and return its exit status."""
    return run_command(Options, _run, prog="experiments.scaling_processes")


def _run(options: Options) -> None:
    config = from_toml(options.config, RankerConfig) if options.config else RankerConfig()
    figures = measure_processes(
        options.data,
        options.output,
        tables=options.tables,
        config=config,
        processes=options.processes,
        weeks=options.weeks,
        rounds=options.rounds,
    )
    rows = [
        [name, f"{found['rows_per_second']:,.0f}", *(f"{found[m]:.9f}" for m in METRICS)]
        for name, found in figures["contestants"].items()
    ]
    print_table("training", ["", "rows/s", *METRICS], rows)
    say(f"efficiency of {options.processes} processes: {figures['efficiency']:.2f}")
    for name, apart in figures["differences"].items():
        shown = ", ".join(f"{metric} {found:.1e}" for metric, found in apart.items())
        say(f"difference to one process, {name}: {shown}")


def measure_processes(
    data: Path,
    output: Path,
    *,
    tables: Path | None = None,
    config: RankerConfig | None = None,
    processes: int = 2,
    weeks: int = 2,
    rounds: int = 1,
) -> dict[str, Any]:
    """Train in one process and in several; returns the figures and writes ``processes.json``.

    Args:
        data: dataset folder.
        output: of the runs and the figures; runs that are complete are not repeated.
        tables: folder of embedding tables; ``data/tables`` where None.
        config: of the ranker; its threads and training weeks are set here.
        processes: how many to compare one with.
        weeks: training weeks.
        rounds: how often each trains.

    Returns:
        ``contestants``: by name speed (median rows/s), seconds, metrics of all evaluation rows and
        peak memory of the first process; ``efficiency``: speed of ``processes`` over ``processes``
        times that of one; ``differences`` to one process, in the metrics of all evaluation rows,
        of several and of one that adds in another order.

    Raises:
        BadInputError: a training failed; the message has its last line.
    """
    tables = tables or data / "tables"
    config = config or RankerConfig()
    found: dict[int, list[dict[str, Any]]] = {1: [], processes: []}
    for turn in range(rounds):
        for number, runs in found.items():
            say(f"round {turn + 1} of {rounds}: {number} process{'es' if number > 1 else ''}")
            run = output / f"{number}-round-{turn + 1}"
            # Threads are those of the machine, which its processes share: one each.
            training = replace(config.training, device="cpu", threads=number, train_weeks=weeks)
            path = output / f"{number}.toml"
            write_text(path, to_toml(replace(config, training=training)))
            job = Training(data=data, tables=tables, config=path, output=run)
            runs.append(job.run(number))
    reordered = replace(job, config=output / "1.toml", output=output / "reordered")
    one, several = (runs[0] for runs in found.values())
    speeds = {
        number: median(run["training"]["rows_per_second"] for run in runs)
        for number, runs in found.items()
    }
    figures = {
        "cores": os.cpu_count(),
        "weeks": weeks,
        "rows": found[1][0]["training"]["rows"],
        "contestants": {
            f"{number} process{'es' if number > 1 else ''}": _summary(runs, speeds[number])
            for number, runs in found.items()
        },
        "efficiency": speeds[processes] / (processes * speeds[1]),
        "differences": {
            f"{processes} processes": differences(one, several),
            "another order": differences(one, reordered.run(1, _REORDERED)),
        },
    }
    write_text(output / FIGURES, json.dumps(figures, indent=2) + "\n")
    return figures


def measure(config: ScalingConfig) -> Part:
    """Train in one process and in two, for ``scaling.json``."""
    figures = measure_processes(config.data, config.output / "processes")
    one, two = figures["contestants"].values()
    of_processes, of_order = figures["differences"].values()
    checks = (
        figure("rows/s of one process", one["rows_per_second"]),
        figure("rows/s of two processes", two["rows_per_second"]),
        figure("efficiency of two processes", figures["efficiency"]),
        figure("difference in AUC, two processes", of_processes["auc"]),
        figure("difference in AUC, one process in another order", of_order["auc"]),
        at_most("difference in log loss, two processes", of_processes["log_loss"], TOLERANCE),
    )
    return Part(checks=checks, figures=figures)


def _summary(runs: list[dict[str, Any]], speed: float) -> dict[str, Any]:
    first = runs[0]
    return {
        "rows_per_second": speed,
        "seconds": [run["training"]["seconds"] for run in runs],
        "peak_rss_mb": max(run["training"]["peak_rss_mb"] for run in runs),
        **{name: first["slices"]["all"][name] for name in METRICS},
    }


if __name__ == "__main__":
    sys.exit(main())
