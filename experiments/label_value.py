r"""What labels of a model are worth: DashCLIP trained on human labels, on a model's, and on both.

A grader labels pairs of the training queries that no human graded
(`experiments.label_value_pairs`); then each arm is trained with each seed and asked the held-out
queries, always against the dataset's own labels::

    label-relevance split --data data/home-depot --output SPLIT
    label-relevance fine-tune --split SPLIT --output GRADER
    python -m experiments.label_value --data data/home-depot --split SPLIT --grader GRADER \
        --output runs/label-value --seeds 0 1 2

All arms of a seed go on from the same stage 1 and take equally many steps of equally many tuples:
as many as the human labels give. A run that was stopped goes on when the same command is given
again. The folder holds the pairs, their labels, a model an arm and seed, ``label_value.json`` and
``label_value.md``.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from features.console import run_command, say
from features.errors import BadInputError

if TYPE_CHECKING:
    from embeddings.config import DashClipTraining
    from embeddings.relevance import Chosen

NO_LABELS, HUMAN, MODEL, BOTH = "no labels", "human", "model", "human and model"
ARMS: "dict[str, Chosen]" = {HUMAN: "human", MODEL: "llm", BOTH: "all"}
"""Whose labels each arm is trained on."""

_LABELS = "labels"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Train DashCLIP on human labels, on a model's and on both, and compare."""

    data: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Dataset folder with human labels."""
    split: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of label-relevance split that the grader was fine-tuned on."""
    grader: Annotated[Path, tyro.conf.arg(metavar="TOML|DIR")]
    """The grader."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder that receives labels, models and the table."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings."""
    products: int = 20
    """Products of each training query to label."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="TOML")] = None
    """Configuration, as train-dashclip takes it; a short training if not given."""


def short_training() -> "DashClipTraining":
    """Return the configuration where none is given: one epoch a stage, no mined products.

    Twelve trainings then take some 80 minutes of one core on Home Depot, a third of what the
    default configuration takes.
    """
    from embeddings.config import AlignmentConfig, CroppingConfig, DashClipTraining

    return DashClipTraining(
        cropping=CroppingConfig(epochs=1),
        alignment=AlignmentConfig(epochs=1, mined_products=0),
        threads=1,
    )


def label_value(
    data: Path,
    output: Path,
    *,
    split: Path,
    grader: Path,
    seeds: tuple[int, ...] = (0, 1, 2),
    products: int = 20,
    config: "DashClipTraining | None" = None,
    command: str = "",
) -> dict[str, Any]:
    """Label, train, measure and compare; returns the content of ``label_value.json``.

    Args:
        data: dataset folder with human labels.
        output: folder of everything.
        split: that the grader was fine-tuned on; it must hold no held-out query.
        grader: its folder or TOML file.
        seeds: of the trainings.
        products: of each training query to label.
        config: of the trainings; `short_training` if not given. Its seed and whose labels it reads
            are the arms' own.
        command: the command line, for the record.

    Raises:
        BadInputError: an input breaks a rule, or ``output`` holds something else.
    """
    from experiments.label_value_report import show, write
    from experiments.label_value_scores import HeldOut, Scores

    if len(set(seeds)) != len(seeds) or not seeds:
        raise BadInputError(f"--seeds must be one or more different numbers, got {list(seeds)}")
    if products < 1:
        raise BadInputError(f"--products must be 1 or more, got {products}")
    trainings = Trainings(data, output, config or short_training())
    trainings.refuse_leaks(split)
    labels = trainings.label(grader, products, command)
    runs: dict[str, dict[int, Scores]] = {arm: {} for arm in (NO_LABELS, *ARMS)}
    trained: dict[str, dict[str, Any]] = {arm: {} for arm in ARMS}
    held_out: HeldOut | None = None
    for seed in seeds:
        start = trainings.before_labels(seed)
        held_out = held_out or HeldOut(data, start)
        runs[NO_LABELS][seed] = held_out.scores(start)
        for arm in ARMS:
            folder, figures = trainings.arm(arm, seed, labels if arm != HUMAN else None)
            trained[arm][str(seed)] = figures
            runs[arm][seed] = held_out.scores(folder)
    assert held_out is not None
    document = write(output, data, labels, held_out, runs, trained, command=command)
    show(document)
    return document


class Trainings:
    """The trainings of all arms and seeds, each in a folder of its own.

    Args:
        data: dataset folder.
        output: folder of the folders.
        config: of the trainings.
    """

    def __init__(self, data: Path, output: Path, config: "DashClipTraining") -> None:
        from embeddings.catalog import read_catalog
        from embeddings.relevance import held_out_queries, read_relevance
        from embeddings.sampling import TupleSampler

        self._data = data
        self._output = output
        self._catalog = read_catalog(data)
        human = read_relevance(data, self._catalog, source="human")
        held_out = held_out_queries(human, held_out=config.held_out_queries)
        self._held_out = {q for q, out in zip(human.queries, held_out, strict=True) if out}
        self._human = human.take(~held_out[human.query])
        sampling = config.alignment.sampling
        tuples = len(TupleSampler(self._human, self._catalog.aisles(), sampling, seed=0))
        limit = min(tuples, config.alignment.limit or tuples)
        self._config = replace(config, alignment=replace(config.alignment, limit=limit))

    def refuse_leaks(self, split: Path) -> None:
        """Raise `BadInputError` if a held-out query is in a split that graders learn from."""
        from embeddings.labeling.judgements import PARTS, read_judgements

        for part in PARTS:
            known = self._held_out.intersection(read_judgements(split, part).pairs.queries)
            if known:
                raise BadInputError(
                    f"{split}: its part '{part}' holds {len(known):,} queries that are held out "
                    f"from the training, the first is {min(known)!r}; what a grader learns of them "
                    "would leak"
                )

    def label(self, grader: Path, products: int, command: str) -> Path:
        """Choose the pairs, have them graded, and return the folder of the labels."""
        import pyarrow.parquet as pq

        from embeddings.labeling import label
        from embeddings.labeling.options import Label
        from experiments.label_value_pairs import choose_pairs
        from features.files import atomic_file

        # The name tells how many: the labels of another number are refused as those of other pairs.
        pairs = self._output / f"pairs-{products}.parquet"
        labels = self._output / _LABELS
        if not pairs.exists():
            table = choose_pairs(self._catalog, self._human, products)
            with atomic_file(pairs) as scratch:
                pq.write_table(table, scratch)
        asked = Label(data=self._data, grader=grader, output=labels, pairs=pairs, yes=True)
        label.run(asked, command)
        return labels

    def before_labels(self, seed: int) -> Path:
        """Return the folder of a model that has been trained without labels."""
        from embeddings.train import train_dashclip

        folder = self._output / f"no-labels-{seed}"
        stage_2 = replace(self._config.alignment, epochs=0)
        config = replace(self._config, seed=seed, alignment=stage_2)
        say(f"seed {seed}, {NO_LABELS}: training into {folder}")
        train_dashclip(self._data, folder, config=config)
        return folder

    def arm(self, arm: str, seed: int, labels: Path | None) -> tuple[Path, dict[str, Any]]:
        """Return folder and figures of the model of an arm and seed."""
        from embeddings.train import begin_at_stage_2, train_dashclip

        folder = self._output / f"{arm.replace(' ', '-')}-{seed}"
        stage_2 = replace(self._config.alignment, labels=ARMS[arm])
        config = replace(self._config, seed=seed, alignment=stage_2)
        say(f"seed {seed}, labels of {arm}: training into {folder}")
        begin_at_stage_2(self._output / f"no-labels-{seed}", folder, config, labels=labels)
        return folder, train_dashclip(self._data, folder, labels=labels, config=config)


def run(options: Options) -> None:
    """Do what the command line asks for."""
    from embeddings.config import DashClipTraining
    from features.config_file import from_toml
    from ranking.run import command_line

    label_value(
        options.data,
        options.output,
        split=options.split,
        grader=options.grader,
        seeds=options.seeds,
        products=options.products,
        config=from_toml(options.config, DashClipTraining) if options.config else None,
        command=command_line("python -m experiments.label_value"),
    )


def main() -> int:
    """Run the command line."""
    return run_command(Options, run, prog="python -m experiments.label_value")


if __name__ == "__main__":
    sys.exit(main())
