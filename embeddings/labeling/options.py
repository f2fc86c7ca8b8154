"""What the steps of ``label-relevance`` are asked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

Folder = Annotated[Path, tyro.conf.arg(metavar="DIR")]
GraderPath = Annotated[Path, tyro.conf.arg(metavar="TOML|DIR")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Split human labels into parts for fine-tuning, validation and evaluation.

    No query is in two parts, and the labels are mixed alike in all. Queries that train-dashclip and
    benchmark-retrieval hold out are left out, so that labels of the grader leak none of them.
    """

    data: Folder
    """Dataset folder: catalog.parquet and relevance.parquet, of which the human rows count."""
    output: Folder
    """Folder of the parts."""
    evaluation: float = 1 / 7
    """Share of the queries to judge graders on (paper: 100,000 of 700,000 pairs)."""
    validation: float = 0.1
    """Share of the queries that choose between epochs and graders."""
    held_out_queries: float = 0.2
    """Share of the queries that train-dashclip holds out; 0 for none."""
    seed: int = 0
    """Another one draws other queries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MakePrompt:
    """Make a prompt of a template and human examples, and show how it asks."""

    split: Folder
    """Folder of ``label-relevance split``; examples are of its fine-tuning part."""
    output: Annotated[Path, tyro.conf.arg(metavar="TOML")]
    """The prompt's file."""
    template: str = "relevance-1"
    """Name of a packaged prompt, or path of a TOML file."""
    examples: int = 2
    """Examples of each label."""
    seed: int = 0
    """Another one chooses other examples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTune:
    """Fine-tune a grader on human labels, here or, for an endpoint, where it runs.

    A stopped run carries on when the same command is given again.
    """

    split: Folder
    """Folder of ``label-relevance split``."""
    output: Folder
    """Folder of the fine-tuned grader."""
    grader: GraderPath | None = None
    """The grader to start from; a cross-encoder from the packaged MiniLM if not given."""
    yes: bool = False
    """Start a job at an endpoint without asking."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Judge graders by held-out human labels, beside how far humans agree.

    Of several, the best on the validation part is named; its figures are those on the evaluation
    part.
    """

    split: Folder
    """Folder of ``label-relevance split``."""
    graders: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="TOML|DIR")]
    """The graders: TOML files or folders of ``label-relevance fine-tune``."""
    output: Folder
    """Folder of evaluation.json, evaluation.html and the grades."""
    max_requests: int | None = None
    """Requests to endpoints after which the run stops; the same command then goes on."""
    max_cost: float | None = None
    """Money after which the run stops, in the currency of the graders' prices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """Grade pairs that nobody graded; the rows fit into relevance.parquet.

    A stopped run carries on when the same command is given again; no pair is paid twice.
    """

    data: Folder
    """Dataset folder: catalog.parquet for the titles, and what --pairs are taken from."""
    grader: GraderPath
    """A grader's TOML file, or a folder of ``label-relevance fine-tune``."""
    output: Folder
    """Folder of the labels."""
    pairs: Annotated[Path | None, tyro.conf.arg(metavar="PARQUET")] = None
    """Pairs to grade: query, product_id; if not given, those of the impressions without a human
    label, the most frequent queries first."""
    limit: int | None = None
    """The most pairs to grade."""
    max_requests: int | None = None
    """Requests after which the run stops, over all its parts."""
    max_cost: float | None = None
    """Money after which the run stops, in the currency of the grader's prices."""
    cache: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Answers to reuse over runs; in the output folder if not given."""
    ask_above_cost: float = 10.0
    """Estimated cost above which the run asks before it starts."""
    ask_above_hours: float = 12.0
    """Estimated time above which the run asks before it starts."""
    yes: bool = False
    """Start without asking."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Describe labels: distribution, coverage of searches, disagreement with humans, a sample."""

    labels: Folder
    """Folder of ``label-relevance label``."""
    data: Folder
    """Dataset folder that the pairs are of."""
    output: Folder
    """Folder of report.html and report.json."""
    seed: int = 0
    """Another one draws another sample."""


Options = (
    Annotated[Split, tyro.conf.subcommand("split")]
    | Annotated[MakePrompt, tyro.conf.subcommand("prompt")]
    | Annotated[FineTune, tyro.conf.subcommand("fine-tune")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Label, tyro.conf.subcommand("label")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)
