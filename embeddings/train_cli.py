"""``train-dashclip``: train product and query encoders on a catalog and graded relevance."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from features.config_file import from_toml
from features.console import print_table, run_command, say

if TYPE_CHECKING:
    from embeddings.config import DashClipTraining


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Train DashCLIP in two stages: images and titles, then products and queries.

    Started by torchrun, it trains in several processes. A stopped run carries on when the same
    command is given again.
    """

    data: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Dataset folder: catalog.parquet and, for the second stage, relevance.parquet."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The model's folder."""
    labels: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of `label-relevance label`, whose labels the second stage reads beside the dataset's;
    `labels` in the configuration's [alignment] chooses among both."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="TOML")] = None
    """Configuration; what it does not name keeps its default. A model's training.toml will do."""
    start: str | None = None
    """Checkpoint to start from: folder, file or hub name; the packaged MiniLM if not given."""
    seed: int | None = None
    """Seed of new weights, samples and orders."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(Options, _train, prog="train-dashclip", arguments=arguments)


def _train(options: Options) -> None:
    config = resolve(options)
    from embeddings.distributed import process_group, rank
    from embeddings.train import train_dashclip

    command = " ".join(["train-dashclip", *sys.argv[1:]])
    with process_group():
        say(f"training on {options.data} into {options.output}")
        figures = train_dashclip(
            options.data, options.output, labels=options.labels, config=config, command=command
        )
        if rank() == 0:
            _show(figures)


def resolve(options: Options) -> "DashClipTraining":
    """Return the configuration that the options ask for."""
    from embeddings.config import DashClipTraining

    config = from_toml(options.config, DashClipTraining) if options.config else DashClipTraining()
    if options.start is not None:
        config = replace(config, start=replace(config.start, checkpoint=options.start))
    return config if options.seed is None else replace(config, seed=options.seed)


def _show(figures: dict[str, Any]) -> None:
    rows = []
    for stage in figures["stages"]:
        name = stage["name"]
        rows += [
            (f"{name}: pairs trained on", f"{stage['examples']:,}"),
            (f"{name}: seconds", f"{stage['seconds']:,.0f}"),
            (f"{name}: pairs/s", f"{stage['pairs_per_second']:,.0f}"),
        ]
        found = stage["evaluations"]
        if found and found[0]:
            best = found[stage["best"] or -1]
            rows += [
                (f"{name}: {key.replace('_', ' ')}", f"{found[0][key]:.4f} -> {best[key]:.4f}")
                for key in found[0]
                if key != "score"
            ]
    rows.append(("peak memory", f"{figures['peak_rss_mb'] / 1024:.1f} GiB"))
    print_table("train-dashclip", ("what", "figure"), rows)


if __name__ == "__main__":
    sys.exit(main())
