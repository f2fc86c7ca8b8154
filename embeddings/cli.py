"""``build-tables``: encode a catalog and its queries into embedding tables."""

import sys
from dataclasses import dataclass
from pathlib import Path

from features.console import run_command


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Encode the catalog and the queries of a dataset folder into embedding tables."""

    data: Path
    """The dataset folder."""
    output: Path
    """The folder to write; it appears whole or not at all."""
    model: Path | None = None
    """A local sentence encoder in transformers' form; the packaged MiniLM if not given."""


def main() -> int:
    """Run the command and return its exit status."""
    return run_command(Options, _build, prog="build-tables")


def _build(options: Options) -> None:
    from embeddings.build import build_tables
    from embeddings.text_encoder import TextEncoder

    encoder = TextEncoder(options.model) if options.model else None
    build_tables(options.data, options.output, encoder)


if __name__ == "__main__":
    sys.exit(main())
