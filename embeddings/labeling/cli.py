"""``label-relevance``: grade query-product pairs with a language model."""

import sys
from collections.abc import Sequence
from importlib import import_module

from embeddings.labeling import options
from features.console import run_command

_STEPS = {
    options.Split: "split",
    options.MakePrompt: "make_prompt",
    options.FineTune: "fine_tune",
    options.Evaluate: "evaluate",
    options.Label: "label",
    options.Report: "report",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(options.Options, _run, prog="label-relevance", arguments=arguments)  # type: ignore[arg-type]


def _run(asked: options.Options) -> None:
    command = " ".join(["label-relevance", *sys.argv[1:]])
    # A step's module, and what it computes with, is loaded when it is asked for.
    import_module(f"embeddings.labeling.{_STEPS[type(asked)]}").run(asked, command)


if __name__ == "__main__":
    sys.exit(main())
