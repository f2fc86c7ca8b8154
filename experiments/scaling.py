"""The figures of scale: ``python -m experiments.scaling --output DIR``.

Each part is a module with a function ``measure(config: ScalingConfig) -> Part``; what it found goes
into ``DIR/scaling.json`` as soon as it is done, beside the parts of earlier runs.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from features.console import run_command, say
from features.errors import BadInputError

PartName = Literal["tables", "history", "large", "processes", "interrupted", "spark", "gpu"]

# Where each part is measured; imported when it is asked for.
MODULES: dict[PartName, str] = {
    "tables": "experiments.scaling_tables",
    "history": "experiments.scaling_history",
    "large": "experiments.scaling_large",
    "processes": "experiments.scaling_processes",
    "interrupted": "experiments.scaling_interrupted",
    "spark": "experiments.scaling_spark",
    "gpu": "experiments.scaling_gpu",
}
_LEAST_IMPRESSIONS = 200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Measure how the system scales, and print each figure beside what it has to be.

    Parts: 'tables', a training step with product tables of up to 20 million rows; 'history', cost
    of histories of up to 1,000 purchases; 'large', features and an epoch over generated
    impressions; 'processes', two processes against one; 'interrupted', two processes that go on as
    one and as two again, and one of two killed; 'spark', features on Spark against DuckDB;
    'gpu', training on a GPU, where one is at hand, against cores.
    A part that scaling.json holds is measured again where it is named; 'large' carries on where it
    was stopped. Exit status 1 if a part of this run failed. For exact figures the machine should
    be quiet.
    """

    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of scaling.json and of what is made for it."""
    parts: tuple[PartName, ...] = tuple(MODULES)
    """Which parts to run."""
    impressions: int = 100_000_000
    """How many are generated for 'large'; needs about 30 bytes of disk for each."""
    seed: int = 0
    """Of what is generated, the true click probabilities included."""
    data: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("data/complete-journey")
    """Dataset folder that 'processes' and 'spark' read."""
    threads: int = 2
    """Cores of a training process."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    passed: list[bool] = []

    def action(options: Options) -> None:
        passed.append(_measure(options))

    status = run_command(Options, action, prog="scaling", arguments=arguments)
    return status or int(not all(passed))


def _measure(options: Options) -> bool:
    """Run the parts in their order and return whether all of them passed."""
    from experiments.scaling_results import ScalingConfig, print_results, write_part

    for name, least in (("impressions", _LEAST_IMPRESSIONS), ("seed", 0), ("threads", 1)):
        if getattr(options, name) < least:
            raise BadInputError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    config = ScalingConfig(
        output=options.output,
        impressions=options.impressions,
        seed=options.seed,
        data=options.data,
        threads=options.threads,
    )
    options.output.mkdir(parents=True, exist_ok=True)
    passed = True
    for name in MODULES:
        if name in options.parts:
            say(f"{name} ...")
            part = importlib.import_module(MODULES[name]).measure(config)
            write_part(options.output, name, part)
            passed &= all(check.passed for check in part.checks)
    print_results(options.output)
    return passed


if __name__ == "__main__":
    sys.exit(main())
