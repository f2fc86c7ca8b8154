"""``label-relevance fine-tune``: a grader that is taught by human labels."""

from pathlib import Path
from typing import Any

from embeddings.labeling.config import (
    CausalConfig,
    CrossEncoderConfig,
    EndpointConfig,
    read_grader_config,
)
from embeddings.labeling.fine_tuned_folder import METRICS
from embeddings.labeling.options import FineTune
from features.console import print_table, say


def run(options: FineTune, command: str) -> None:
    """Do the step and show its figures."""
    say(f"fine-tuning on {options.split} into {options.output}")
    figures = fine_tune(
        options.split, options.output, grader=options.grader, yes=options.yes, command=command
    )
    rows = [(name.replace("_", " "), _shown(value)) for name, value in _flat(figures).items()]
    print_table("label-relevance fine-tune", ("what", "figure"), rows)
    say(f"the same as JSON: {options.output / METRICS}")


def fine_tune(
    split: Path,
    output: Path,
    *,
    grader: Path | None = None,
    yes: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Fine-tune a grader on a split; returns the content of ``metrics.json``.

    A run that was stopped carries on; one that is complete is not repeated.

    Args:
        split: folder of `label-relevance split`.
        output: the grader's folder.
        grader: TOML file or folder of the grader to start from; a cross-encoder from the packaged
            MiniLM if not given.
        yes: start a job at an endpoint without asking.
        command: the command line, for the record.

    Raises:
        BadInputError: an input breaks a rule, or ``output`` holds something else.
    """
    config = read_grader_config(grader) if grader else CrossEncoderConfig()
    folder = (grader if grader.is_dir() else grader.parent) if grader else Path()
    if isinstance(config, EndpointConfig):
        from embeddings.labeling import endpoint_fine_tuning

        return endpoint_fine_tuning.fine_tune(
            config, folder, split, output, command=command, yes=yes
        )
    if isinstance(config, CausalConfig):
        from embeddings.labeling import causal_training

        return causal_training.fine_tune(config, folder, split, output, command=command)
    if isinstance(config, CrossEncoderConfig):
        from embeddings.labeling import cross_encoder_training

        return cross_encoder_training.fine_tune(config, folder, split, output, command=command)
    from embeddings.labeling import similarity

    return similarity.fine_tune(config, folder, split, output, command=command)


def _flat(figures: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the figures of nested dicts in one, without lists and texts."""
    flat: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}: ")
        elif isinstance(value, int | float):
            flat[f"{prefix}{name}"] = value
    return flat


def _shown(value: float) -> str:
    if isinstance(value, int) or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.4f}"
