r"""What each part of DashCLIP's training brings: one training, and others with one thing changed.

Every variant is trained, and its encoders are asked the held-out queries and titles::

    python -m experiments.dashclip_ablation --data data/fashion --output runs/ablation \
        --config embeddings/recipes/paper.toml

The folder holds a model a variant, ``ablation.json`` and ``ablation.md``. A run that was stopped
goes on when the same command is given again: what is trained is not trained again, and variants
that differ from one another in stage 2 only share their stage 1.

The table is descriptive. It looks at the held-out queries and titles, so no setting may be chosen
by it; the settings of the base were chosen on training data alone. With many rows, some differ from
the base by chance: that is what the intervals are for, and they know of one seed only.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from features.console import run_command, say
from features.errors import BadInputError

if TYPE_CHECKING:
    from embeddings.config import DashClipTraining

BASE = "base"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Train DashCLIP with one part left out or changed at a time, and compare."""

    data: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Dataset folder: catalog.parquet and, for the second stage, relevance.parquet."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder that receives the models and the table."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="TOML")] = None
    """Configuration of the base, as train-dashclip takes it."""
    variants: tuple[str, ...] = ()
    """Which variants to train beside the base; all of them if not given. Those that are trained
    already stay in the table."""


def variants_of(base: "DashClipTraining") -> dict[str, "DashClipTraining"]:
    """Return the configurations to compare by name, the base first.

    One of them may equal the base: what it changes is so already.
    """
    stage_1, crops, stage_2 = base.pretraining, base.cropping, base.alignment

    def frozen(share: float) -> "DashClipTraining":
        return replace(
            base,
            pretraining=replace(stage_1, frozen_layers=share),
            cropping=replace(crops, frozen_layers=share),
            alignment=replace(stage_2, frozen_layers=share),
        )

    def aligned(**changes: Any) -> "DashClipTraining":
        return replace(base, alignment=replace(stage_2, **changes))

    shared, both_ways = stage_2.shared_negatives, stage_2.symmetric
    proxies = stage_2.sampling.proxies
    return {
        BASE: base,
        "no-stage-1": replace(
            base, pretraining=replace(stage_1, epochs=0), cropping=replace(crops, epochs=0)
        ),
        "no-matching": replace(base, pretraining=replace(stage_1, matching=False)),
        "no-momentum": replace(base, pretraining=replace(stage_1, momentum=0.0)),
        "no-averaging": replace(base, cropping=replace(crops, keep=0.0)),
        "no-proxies" if proxies else "proxies": aligned(
            sampling=replace(stage_2.sampling, proxies=not proxies)
        ),
        "frozen-0-of-12": frozen(0.0),
        "frozen-4-of-12": frozen(4 / 12),
        "frozen-8-of-12": frozen(8 / 12),
        "own-negatives" if shared else "shared-negatives": aligned(shared_negatives=not shared),
        "one-way" if both_ways else "symmetric": aligned(symmetric=not both_ways, mined_products=0),
        "no-mined-products" if stage_2.mined_products else "mined-products": aligned(
            symmetric=True, mined_products=0 if stage_2.mined_products else 2
        ),
    }


def ablation(
    data: Path,
    output: Path,
    *,
    config: "DashClipTraining | None" = None,
    variants: Sequence[str] = (),
    command: str = "",
) -> dict[str, Any]:
    """Train and compare the variants of a configuration; returns the content of ``ablation.json``.

    Tables and files are written after each variant, with what is there by then.

    Args:
        data: dataset folder.
        output: folder of the models and of the table.
        config: of the base.
        variants: names to train beside the base; all where empty.
        command: the command line, for the table.

    Raises:
        BadInputError: an unknown name, or what `embeddings.train.train_dashclip` raises.
    """
    from embeddings.catalog import read_catalog
    from embeddings.config import DashClipTraining
    from embeddings.train import train_dashclip
    from experiments.dashclip_ablation_scores import HeldOut, Table

    configs = _chosen(variants_of(config or DashClipTraining()), variants, output)
    images = read_catalog(data).any_image()
    table = Table(data, output, command)
    held_out: HeldOut | None = None
    for name, changed in configs.items():
        if name != BASE and _effective(changed, configs[BASE], images) == configs[BASE]:
            say(f"{name}: the same as {BASE}")
            table.same(name)
            continue
        folder = output / name
        say(f"{name}: training into {folder}")
        _share(output, name, configs)
        figures = train_dashclip(data, folder, config=changed, command=command)
        if held_out is None:
            held_out = HeldOut(data, folder)
            table.asks(held_out)
            table.add("untrained start", held_out.scores(folder, untrained=True), None)
        table.add(name, held_out.scores(folder), figures)
        table.write()
    return table.show()


def _chosen(
    known: dict[str, "DashClipTraining"], names: Sequence[str], output: Path
) -> dict[str, "DashClipTraining"]:
    """Return the base, the named variants and those that are trained already, or all.

    Raises:
        BadInputError: a name is not known.
    """
    from embeddings.train import FIGURES

    for name in names:
        if name not in known:
            raise BadInputError(f"unknown variant '{name}'; known: {', '.join(known)}")
    finished = {name for name in known if (output / name / FIGURES).exists()}
    wanted = {BASE, *names, *finished} if names else {*known}
    return {name: found for name, found in known.items() if name in wanted}


def _effective(
    config: "DashClipTraining", base: "DashClipTraining", images: bool
) -> "DashClipTraining":
    """Return a configuration with the base's settings of the stage that does not take place."""
    if images:
        return replace(config, cropping=base.cropping)
    return replace(config, pretraining=base.pretraining)


def _share(output: Path, name: str, configs: dict[str, "DashClipTraining"]) -> None:
    """Begin a variant with the stage 1 of an earlier one that differs in stage 2 only."""
    from embeddings.train import FIGURES, begin_at_stage_2

    config = configs[name]
    for other, found in configs.items():
        if other == name:
            return
        if (
            replace(found, alignment=config.alignment) == config
            and (output / other / FIGURES).exists()
        ):
            begin_at_stage_2(output / other, output / name, config)
            return


def run(options: Options) -> None:
    """Do what the command line asks for."""
    from embeddings.config import DashClipTraining
    from features.config_file import from_toml
    from ranking.run import command_line

    ablation(
        options.data,
        options.output,
        config=from_toml(options.config, DashClipTraining) if options.config else None,
        variants=options.variants,
        command=command_line("python -m experiments.dashclip_ablation"),
    )


def main() -> int:
    """Run the command line."""
    return run_command(Options, run, prog="python -m experiments.dashclip_ablation")


if __name__ == "__main__":
    sys.exit(main())
