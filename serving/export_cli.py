"""``export-ranker``: a trained ranker made ready to serve."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from features.console import run_command
from ranking.cli import DEFAULT_DATASET


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Export a trained ranker: TorchScript with quantised tables, and a compiled float model.

    Every form of the model is compared with the trained ranker on requests of its evaluation week
    and on edge cases; where a probability or the AUC is out of bounds nothing is written.
    """

    run: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs") / DEFAULT_DATASET
    """Folder that train-ranker wrote."""
    data: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("data") / DEFAULT_DATASET
    """Folder of the dataset that the run was trained on."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of the exported ranker; RUN/export where not given."""
    tables: Literal["int8", "float16", "float32", "int4"] = "int8"
    """How the TorchScript file keeps its tables."""
    pt2: bool = True
    """Compile ranker.pt2 too; it needs a C++ compiler."""
    requests: int = 20_000
    """The most evaluation requests to compare on."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(Options, _export, prog="export-ranker", arguments=arguments)


def _export(options: Options) -> None:
    from serving.export import ExportConfig, export_ranker

    config = ExportConfig(table_dtype=options.tables, pt2=options.pt2, requests=options.requests)
    export_ranker(options.run, options.data, options.output or options.run / "export", config)


if __name__ == "__main__":
    raise SystemExit(main())
