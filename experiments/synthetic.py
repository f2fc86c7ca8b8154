"""A dataset of any size with known click probabilities: ``python -m experiments.synthetic``.

::

    OUTPUT/
      dataset.toml  catalog.parquet  purchases.parquet/  impressions.parquet/   the dataset
      tables/         product.parquet  query.parquet: the latent vectors, in place of an encoder's
      truth/          the probability of each row of the file of the same name of the impressions
      truth.json      what the dataset holds, and the metrics of these probabilities in the
                      evaluated week, which no ranker can better
      generator.json  what it was made with

Nothing but the comparison with the truth reads ``truth``.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from features.console import print_table, progress_bar, run_command


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Generate a dataset whose click probabilities, and so the best reachable metrics, are known.

    The same options write the same bytes, whatever the number of processes. A generation that was
    stopped carries on where it was. Train on it with train-ranker --data DIR --tables DIR/tables.
    """

    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder to write; the dataset is complete when truth.json stands in it."""
    impressions: int = 1_000_000
    """About how many impressions to write."""
    products: int = 100_000
    """Size of the catalog."""
    dimension: int = 32
    """Of the embedding tables."""
    seed: int = 0
    """Of all random numbers."""
    processes: int = 2
    """How many processes write."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(Options, _generate, prog="synthetic", arguments=arguments)


def _generate(options: Options) -> None:
    from experiments.synthetic_files import generate
    from experiments.synthetic_world import SyntheticConfig

    config = SyntheticConfig(
        impressions=options.impressions,
        products=options.products,
        dimension=options.dimension,
        seed=options.seed,
    )
    with progress_bar() as bar:
        task = bar.add_task("files", total=None)
        found = generate(
            options.output,
            config,
            processes=options.processes,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    rows = [
        (name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.5g}")
        for name, value in found.items()
    ]
    print_table(str(options.output), ("what", "how much"), rows)


if __name__ == "__main__":
    sys.exit(main())
