"""``explain-ranker``: what a trained ranker's figures rest on, and why a request's winners won."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from features.console import run_command
from ranking.cli import DEFAULT_DATASET


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Explain a trained ranker, without training it again.

    Permutes each feature, or group of features, between the requests or candidates of a sample
    and tells how much AUC is lost and how much normalised log loss gained; sets Integrated
    Gradients and Feature Ablation beside it; and tells why the candidates of one request stand
    where they stand.
    """

    run: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs") / DEFAULT_DATASET
    """Folder that train-ranker wrote."""
    data: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("data") / DEFAULT_DATASET
    """Folder of the dataset that the run was trained on."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of the report; RUN/importance where not given."""
    week: int | None = None
    """Week of the requests; the run's evaluation week where not given."""
    part: Annotated[str, tyro.conf.arg(name="slice", metavar="NAME")] = "all"
    """all, with_history, without_history, unseen_products, short_history, middle_history or
    long_history."""
    sample: int = 2000
    """The most requests to take, drawn at random from the slice."""
    permutations: int = 10
    """How often each group is permuted."""
    seed: int = 0
    """Seed of the sample and of the permutations."""
    groups: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=FEATURE,FEATURE")] = ()
    """Features to take together, such as "query=query embedding,query_type"; each other feature
    is a group of its own."""
    request: int | None = None
    """The request to explain by itself; one of the sample with a click where not given."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(Options, _explain, prog="explain-ranker", arguments=arguments)


def _explain(options: Options) -> None:
    from ranking.explain import ExplainConfig, explain_ranker
    from ranking.run import command_line

    config = ExplainConfig(
        week=options.week,
        part=options.part,
        sample=options.sample,
        permutations=options.permutations,
        seed=options.seed,
        groups=options.groups,
        request=options.request,
    )
    explain_ranker(
        options.run,
        options.data,
        options.output or options.run / "importance",
        config,
        command=command_line("explain-ranker"),
    )


if __name__ == "__main__":
    raise SystemExit(main())
