"""The folder of a fine-tuned grader, and the run that fills it.

::

    OUTPUT/
      grader.toml      the grader, whose weights lie beside it
      metrics.json     figures of the fine-tuning; comes last and says that the grader is whole
      run.json         what the run is made of: data, configuration, command
      checkpoint/      state of the training, while it lasts
"""

import json
import resource
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from embeddings.labeling import scores
from embeddings.labeling.calibration import calibration
from embeddings.labeling.config import GRADER, GraderConfig, write_grader_config
from embeddings.labeling.grades import UNGRADED, Grader, grade_all
from embeddings.labeling.judgements import PARTS, Judgements
from features.console import say
from features.errors import BadInputError
from features.files import fingerprint, write_text

METRICS = "metrics.json"
CHECKPOINT = Path("checkpoint", "state.safetensors")
_RECORD = "run.json"


def begin(
    output: Path, config: GraderConfig, folder: Path, split: Path, command: str
) -> dict[str, Any] | None:
    """Make the folder this run's, or find that it is already; the figures of one that is done.

    Args:
        output: the folder; made where it is missing.
        config: of the grader to start from.
        folder: what relative paths in ``config`` begin at.
        split: of `label-relevance split`.
        command: the command line, for the record.

    Returns:
        The content of ``metrics.json`` where the run is complete, else ``None``.

    Raises:
        BadInputError: the output holds something else, or the split lacks a file.
    """
    identity = _identity(config, folder, split)
    record = output / _RECORD
    if output.exists() and not output.is_dir():
        raise BadInputError(f"{output}: is a file; name a folder")
    if record.is_file():
        found = json.loads(record.read_text(encoding="utf-8"))
        for name, value in identity.items():
            if found.get(name) != value:
                raise BadInputError(
                    f"{output}: holds another run (its {name} differs); choose another --output "
                    "or remove it"
                )
        finished = output / METRICS
        if finished.is_file():
            say(f"{output}: this grader is fine-tuned already; its figures:")
            return dict(json.loads(finished.read_text(encoding="utf-8")))
        return None
    if output.exists() and any(".partial-" not in path.name for path in output.iterdir()):
        raise BadInputError(
            f"{output}: exists and is no run of label-relevance fine-tune; choose another --output"
        )
    output.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps(identity | {"command": command}, indent=2) + "\n")
    return None


def finish(output: Path, config: GraderConfig, figures: dict[str, Any]) -> dict[str, Any]:
    """Write ``grader.toml`` and then ``metrics.json``; what only a stopped run needs goes.

    Args:
        output: the folder; weights and whatever else the grader reads are written already.
        config: of the fine-tuned grader, with paths relative to the folder.
        figures: the content of ``metrics.json``; returned as it is.
    """
    write_grader_config(output / GRADER, config)
    write_text(output / METRICS, json.dumps(figures, indent=2) + "\n")
    shutil.rmtree(output / CHECKPOINT.parent, ignore_errors=True)
    return figures


def validation_figures(grader: Grader, validation: Judgements) -> dict[str, Any]:
    """Grade the validation part; returns what ``metrics.json`` tells of it."""
    began = time.perf_counter()
    grades = grade_all(grader, validation.pairs)
    seconds = time.perf_counter() - began
    sure = calibration(validation.label, grades.label, grades.probability) or {}
    return {
        "validation": {
            "pairs": len(validation),
            "ungraded": int((grades.label == UNGRADED).sum()),
            **agreement(validation.label, grades.label),
            **{k: sure[k] for k in ("log_loss", "expected_calibration_error") if k in sure},
        },
        "grading_pairs_per_second": len(validation) / max(seconds, 1e-9),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def agreement(human: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Return accuracy, macro F1 and Cohen's kappa, plain and quadratic, of labels [P] int8.

    Where chance alone agrees fully, a kappa is 0.
    """
    found = scores.figures(scores.score(human, label, [""] * len(human)).tables.sum(0))
    return {name: float(np.nan_to_num(found[name])) for name in scores.INTERVALS}


def _identity(config: GraderConfig, folder: Path, split: Path) -> dict[str, Any]:
    """Return what makes one run: its configuration, what it starts from, and the two parts."""
    parts = [split / f"{part}.parquet" for part in PARTS if part != "evaluation"]
    for path in parts:
        if not path.is_file():
            raise BadInputError(f"{path}: no such file; `label-relevance split` writes it")
    settings = asdict(config)
    settings.pop("threads", None)  # it changes no more than the time
    for name, value in settings.items():
        if isinstance(value, str) and value and (folder / value).exists():
            settings[name] = fingerprint(folder / value)  # wherever it lies
    return {
        "configuration": {"kind": config.kind, **settings},
        "data": fingerprint(*parts),
    }
