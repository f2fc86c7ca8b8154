"""Trainings that are interrupted: going on in another number of processes, and one of two killed.

Everything is the real command on generated impressions, with a checkpoint after each chunk, and in
float32::

    whole        2 processes from beginning to end: the figures to compare with
    alone        1 process from beginning to end: what the order of additions changes
    changing     2 processes, told to end after a third of the steps; 1 process for another third;
                 2 processes for the rest
    killed       2 processes, one of them killed half-way; then the same command again
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.load_checks import Check, Part, at_most, equals, holds
from experiments.scaling_results import ScalingConfig, figure, run_python
from experiments.scaling_training import METRICS, Training, differences, sentences
from features.checkpoint import read_header
from features.config_file import to_toml
from features.console import say
from features.errors import BadInputError
from features.files import write_text
from ranking.config import RankerConfig, TrainingConfig

IMPRESSIONS = 500_000

_PRODUCTS = 20_000
_CHUNK_GROUPS = 2  # so that there are some ten chunks, and as many checkpoints
_MOST_SECONDS = 30  # until a run ends of which a process was killed
_POLL_SECONDS = 0.005
_TOLERANCE = 2e-6  # in a metric; in bfloat16 the order of additions alone changes AUC by up to 5e-5


def measure(config: ScalingConfig) -> Part:
    """Train without and with interruptions, and compare what comes of it."""
    folder = config.output / "interrupted"
    whole = _job(folder, _generated(folder, config.seed), config.threads)
    say("training in two processes")
    expected = whole.run(2)
    steps = step_of(whole.output)
    say("training in one process")
    alone = replace(whole, output=folder / "alone").run(1)
    say("training in two processes, in one and in two again")
    changing = replace(whole, output=folder / "changing")
    changes = _in_turns(changing, steps)
    say("killing one of two processes")
    killed = replace(whole, output=folder / "killed")
    end = _kill_one(killed, steps // 2)
    found = {"changing": changing.run(2), "killed": killed.run(2)}
    rows = {name: metrics["training"]["rows"] for name, metrics in found.items()}
    found["alone"] = alone
    apart = {name: differences(expected, metrics) for name, metrics in found.items()}
    figures = {
        "impressions": IMPRESSIONS,
        "seed": config.seed,
        "rows": expected["training"]["rows"],
        "steps": steps,
        "metrics": {name: expected["slices"]["all"][name] for name in METRICS},
        "changed_at_steps": changes,
        "killed": end,
        "differences": apart,
    }
    return Part(checks=tuple(_checks(figures, rows)), figures=figures)


def _checks(figures: dict[str, Any], rows: dict[str, int]) -> Iterator[Check]:
    names = {
        "changing": "from 2 processes to 1 and back",
        "killed": "one of 2 processes killed, and again",
    }
    steps, end = figures["steps"], figures["killed"]
    yield figure("steps of the whole run", steps)
    for number, step in enumerate(figures["changed_at_steps"], 1):
        yield figure(f"{names['changing']}: step of change {number}", step)
    yield figure(f"{names['killed']}: step when it was killed", end["step"])
    yield at_most(f"{names['killed']}: seconds until the end", end["seconds"], _MOST_SECONDS)
    yield holds(f"{names['killed']}: the status is not 0", end["status"] != 0)
    yield equals(f"{names['killed']}: sentences said", len(end["said"]), 1)
    order = figures["differences"]["alone"]["auc"]
    yield figure("1 process against 2, not interrupted: difference in auc", order)
    for run, name in names.items():
        yield equals(f"{name}: rows trained on", rows[run], figures["rows"])
        for metric in ("auc", "log_loss"):
            difference = figures["differences"][run][metric]
            yield at_most(f"{name}: difference in {metric}", difference, _TOLERANCE)


def _generated(folder: Path, seed: int) -> Path:
    """Return the folder of the generated dataset, with its request records; made where need be."""
    data = folder / f"data-{IMPRESSIONS}-seed-{seed}"
    options = {"output": data, "impressions": IMPRESSIONS, "products": _PRODUCTS, "seed": seed}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    say("generating")
    run_python(["-m", "experiments.synthetic", *arguments])
    run_python(["-m", "features.cli", "--data", str(data)])
    return data


def _job(folder: Path, data: Path, threads: int) -> Training:
    """Return the whole training; what earlier measurements left of all of them is removed."""
    for old in ("whole", "alone", "changing", "killed"):
        shutil.rmtree(folder / old, ignore_errors=True)
    config = folder / "train.toml"
    training = TrainingConfig(
        chunk_groups=_CHUNK_GROUPS,
        checkpoint_seconds=0.0,
        precision="float32",
        device="cpu",
        threads=max(threads, 2),
    )
    write_text(config, to_toml(RankerConfig(training=training)))
    return Training(data=data, tables=data / "tables", config=config, output=folder / "whole")


def step_of(run: Path) -> int:
    """Return the step of a run's checkpoint, of one process or of several; 0 without one."""
    checkpoint = run / "checkpoint"
    steps = [int(path.name.partition("-")[2]) for path in checkpoint.glob("sharded-*")]
    with suppress(BadInputError, OSError):  # there is none, or it is being replaced
        steps.append(read_header(checkpoint / "state.safetensors")["step"])
    return max(steps, default=0)


def _in_turns(job: Training, steps: int) -> list[int]:
    """Train in two processes, then in one, each for a third; returns the steps of the changes."""
    found = []
    for processes, until in ((2, steps // 3), (1, 2 * steps // 3)):
        _stop(job, processes, until, lambda process: process.terminate())
        found.append(step_of(job.output))
    return found


def _kill_one(job: Training, until: int) -> dict[str, Any]:
    """Kill one of two processes at a step; returns how the run ended."""

    def kill(launcher: "subprocess.Popen[str]") -> None:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)

    return {**_stop(job, 2, until, kill), "step": step_of(job.output)}


def _stop(
    job: Training, processes: int, until: int, stop: Callable[["subprocess.Popen[str]"], None]
) -> dict[str, Any]:
    """Train up to a step and stop it there; returns how it ended, and how long that took.

    Raises:
        BadInputError: it ended before.
    """
    with job.start(processes) as process:
        try:
            while step_of(job.output) < until:
                if process.poll() is not None:
                    said = process.communicate()[1]
                    raise BadInputError(f"{job.output}: training ended early: {said[-1000:]}")
                time.sleep(_POLL_SECONDS)
            stop(process)
            stopped = time.monotonic()
            said = process.communicate()[1]
        except BaseException:
            process.terminate()
            raise
    seconds = time.monotonic() - stopped
    return {"seconds": seconds, "status": process.returncode, "said": sentences(said)}
