"""``train-ranker``: the main job."""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from features.config_file import from_toml
from features.console import run_command, say
from ranking.config import RankerConfig

DEFAULT_DATASET = "complete-journey"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Train and evaluate the click-through-rate ranker.

    Without arguments: builds the default dataset, its embedding tables and request records, trains
    on its training weeks, evaluates the week after and writes runs/complete-journey. A stopped run
    carries on when the same command is given again. Started by torchrun, it trains in several
    processes; a run may go on with another number of them.
    """

    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Dataset folder; data/complete-journey, built if need be, where not given."""
    tables: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of embedding tables; made of a DashCLIP trained on DATA where not given."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """The run's folder; runs/NAME-OF-THE-DATASET-FOLDER where not given."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="TOML")] = None
    """Configuration; what it does not name keeps its default. A run's config.toml will do."""
    model: Literal["two-tower", "dcn"] | None = None
    """The ranker with its embedding tower, or the DCN baseline without."""
    eval_week: int | None = None
    """The week to evaluate; training ends the week before."""
    seed: int | None = None
    """Seed of weights and order."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(Options, _train, prog="train-ranker", arguments=arguments)


def _train(options: Options) -> None:
    with ExitStack() as stack:
        if "WORLD_SIZE" in os.environ:  # one of the processes that torchrun started
            from ranking.distributed import process_group

            stack.enter_context(process_group())
        config = resolve(options)
        from features.prepare_data import ensure_dataset
        from ranking.distributed import from_first
        from ranking.run import command_line, train_ranker

        data = options.data or Path("data") / DEFAULT_DATASET
        if options.data is None:
            from_first(lambda: ensure_dataset(DEFAULT_DATASET, data))
        output = options.output or Path("runs") / data.resolve().name
        say(f"training on {data} into {output}")
        command = command_line("train-ranker")
        train_ranker(data, output, tables=options.tables, config=config, command=command)


def resolve(options: Options) -> RankerConfig:
    """Return the configuration that the options ask for."""
    config = from_toml(options.config, RankerConfig) if options.config else RankerConfig()
    if options.model is not None:
        tower = options.model == "two-tower"
        config = replace(config, model=replace(config.model, embedding_tower=tower))
    training = config.training
    if options.eval_week is not None:
        training = replace(training, evaluate_week=options.eval_week)
    if options.seed is not None:
        training = replace(training, seed=options.seed)
    return replace(config, training=training)


if __name__ == "__main__":
    sys.exit(main())
