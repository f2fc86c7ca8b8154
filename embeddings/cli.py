"""``build-tables``: encode a catalog and its queries into embedding tables."""

import sys
from dataclasses import dataclass
from pathlib import Path

from features.console import run_command


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Encode the catalog and the queries of a dataset folder into embedding tables.

    A run that was stopped goes on where it was; a changed catalog encodes only what changed.
    Started by torchrun, it encodes in several processes, with the same result.
    """

    data: Path
    """The dataset folder."""
    output: Path
    """The folder to write; tables in it stay until the new ones are whole."""
    model: Path | None = None
    """A model of train-dashclip, or a sentence encoder in transformers' form; the packaged MiniLM
    if not given."""
    max_broken_images: float = 0.1
    """The run stops if more than this share of the images is broken; else they count as missing."""


def main() -> int:
    """Run the command and return its exit status."""
    return run_command(Options, _build, prog="build-tables")


def _build(options: Options) -> None:
    from embeddings.build import build_tables_together
    from embeddings.distributed import process_group
    from embeddings.open_encoder import open_encoder

    with process_group():
        build_tables_together(
            options.data,
            options.output,
            open_encoder(options.model),
            max_broken_images=options.max_broken_images,
        )


if __name__ == "__main__":
    sys.exit(main())
