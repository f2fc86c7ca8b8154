"""``benchmark-ranking``: the paper's ranking table (Table 2) on a dataset folder."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from features.console import run_command
from features.errors import BadInputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Train every variant on the weeks before each evaluation week, and compare them.

    Writes ranking.json, ranking.md and report.html. Each run is kept in OUTPUT/runs: the same
    command again makes only those that are missing. With --public, a click-through-rate dataset of
    fixed splits and plain fields instead: public.json and public.md.
    """

    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The benchmark's folder."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Dataset folder; data/complete-journey, built if need be, where not given."""
    tables: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of embedding tables; made of a DashCLIP trained on DATA where not given."""
    weeks: tuple[int, ...] = ()
    """Evaluation weeks; three that follow the dataset's own evaluation week, evenly spread over
    what comes after it, where not given."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Training seeds."""
    variants: tuple[str, ...] = ()
    """Which rows, by name; all where not given."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="TOML")] = None
    """What all runs share: a configuration as for train-ranker."""
    keep_unclicked: float | None = None
    """Share of the requests without a click that training keeps, each counting for those left out;
    the configuration's, or .1 without one. Evaluation reads all."""
    processes: int = 2
    """Runs side by side, each on one core; with --public the cores of a run."""
    public: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder with train, valid and test files of a public CTR dataset (CSV or libsvm)."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(Options, _benchmark, prog="benchmark-ranking", arguments=arguments)


def _benchmark(options: Options) -> None:
    if options.public is not None:
        _public(options, options.public)
        return
    from experiments.ranking_benchmark import benchmark_ranking, shared_config
    from features.prepare_data import ensure_dataset
    from ranking.cli import DEFAULT_DATASET
    from ranking.run import command_line

    data = options.data or Path("data") / DEFAULT_DATASET
    if options.data is None:
        ensure_dataset(DEFAULT_DATASET, data)
    benchmark_ranking(
        data,
        options.output,
        tables=options.tables,
        weeks=options.weeks,
        seeds=options.seeds,
        names=options.variants,
        config=shared_config(options.config, options.keep_unclicked),
        processes=options.processes,
        command=command_line("benchmark-ranking"),
    )


def _public(options: Options, folder: Path) -> None:
    """Run the benchmark of a public dataset, with BARS's settings where it is one of BARS's."""
    from experiments.public_ctr import print_public, run_public
    from experiments.public_ctr_config import PublicConfig, settings_for
    from features.config_file import from_toml

    defaults = Options(output=options.output)
    for name in ("data", "tables", "weeks", "variants", "keep_unclicked"):
        if getattr(options, name) != getattr(defaults, name):
            raise BadInputError(f"--{name.replace('_', '-')} does not go with --public")
    if options.config is not None:
        config = from_toml(options.config, PublicConfig)
    else:
        config = settings_for(folder.resolve().name)
    if options.seeds != defaults.seeds:
        config = replace(config, seeds=options.seeds)
    print_public(run_public(folder, options.output, replace(config, threads=options.processes)))


if __name__ == "__main__":
    sys.exit(main())
