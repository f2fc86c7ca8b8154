"""``benchmark-serving``: fused tables against feature fetching, the paper's Section 4.3.2."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from features.console import run_command
from ranking.cli import DEFAULT_DATASET


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Measure how fast the exported ranker answers, with its tables inside or fetched from Redis.

    Writes serving.json, serving.md, report.html and plots. Every case is kept as it ends: the same
    command again measures only those that are missing. Keep the machine free of other work.
    """

    bundle: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder that export-ranker wrote."""
    run: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs") / DEFAULT_DATASET
    """Folder of the training run that it was made of: other types of tables are made of it."""
    data: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("data") / DEFAULT_DATASET
    """Folder of the run's dataset: requests have the features of real ones."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs") / "benchmark-serving"
    """Folder to write."""
    redis: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """A Redis server to fetch from, as redis://HOST:PORT/DB; its keys of the benchmark are removed
    in the end. One is started on this machine where not given."""
    rows: int = 400_000
    """Of the product and of the query table; the paper's by default."""
    requests: int = 5_000
    """Requests to time in each case."""
    seconds: float = 15.0
    """The most that a case takes."""
    quick: bool = False
    """Measure little, to see that everything works."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(Options, _benchmark, prog="benchmark-serving", arguments=arguments)


def _benchmark(options: Options) -> None:
    from experiments.serving_benchmark import benchmark_serving
    from experiments.serving_cases import QUICK, Plan
    from ranking.run import command_line

    plan = QUICK
    if not options.quick:
        plan = Plan(rows=options.rows, requests=options.requests, seconds=options.seconds)
    benchmark_serving(
        options.bundle,
        options.run,
        options.data,
        options.output,
        plan,
        redis=options.redis,
        command=command_line("benchmark-serving"),
    )


if __name__ == "__main__":
    sys.exit(main())
