"""``label-relevance evaluate``: how well graders agree with people, and which is the best.

::

    OUTPUT/
      evaluation.json  evaluation.html
      grades/GRADER/PART-HASH/*.parquet     what each grader said of each pair
      spent.sqlite                          what endpoints cost, if there are any
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from embeddings.labeling.agreement import against_the_others, rater_agreement
from embeddings.labeling.calibration import calibration
from embeddings.labeling.config import GRADER, EndpointConfig, read_grader_config
from embeddings.labeling.evaluation_page import FLOOR, page, tables
from embeddings.labeling.grades import LABELS, Grader
from embeddings.labeling.judgements import PARTS, Judgements, Part, read_judgements
from embeddings.labeling.ledger import Ledger
from embeddings.labeling.open_grader import open_grader
from embeddings.labeling.options import Evaluate
from embeddings.labeling.scores import Scored, score
from embeddings.labeling.stored_grades import StoredGrades
from features.console import print_table, progress_bar, say
from features.errors import BadInputError
from features.files import fingerprint, write_text

EVALUATION = "evaluation.json"
PAGE = "evaluation.html"
CHOSEN_BY = "quadratic_kappa"
_PARTS: tuple[Part, Part] = ("validation", "evaluation")
_SPENT = "spent.sqlite"


def run(options: Evaluate, command: str) -> None:
    """Do the step and print its figures."""
    content = evaluate(options, command)
    for table in tables(content):
        print_table(table.title, table.header, table.rows)
    say(f"best: {content['best']}, by {content['chosen_by'].replace('_', ' ')}")
    if content["humans"] is None:
        say("agreement between people: unknown, no pair of the split has two judgements")
    say(f"Figures: {options.output / EVALUATION}, {options.output / PAGE}")


def evaluate(options: Evaluate, command: str = "") -> dict[str, Any]:
    """Judge graders on both held-out parts; returns the content of ``evaluation.json``.

    What a grader has graded already is not asked again, as long as it and the pairs are the same.

    Raises:
        BadInputError: the split or a grader breaks a rule, two graders have one name, or a limit
            is reached.
    """
    paths = _named(options.graders)
    configs = [read_grader_config(path) for path in paths.values()]
    spent = None
    if any(isinstance(config, EndpointConfig) for config in configs):
        spent = options.output / _SPENT
    limits = {"max_requests": options.max_requests, "max_cost": options.max_cost}
    with closing(Ledger(spent, **limits)) as ledger:  # type: ignore[arg-type]
        openers = {name: partial(open_grader, path, ledger) for name, path in paths.items()}
        content = evaluate_graders(openers, options.split, options.output, command=command)
    write_text(options.output / PAGE, page(content))
    return content


def evaluate_graders(
    openers: Mapping[str, Callable[[], Grader]], split: Path, output: Path, *, command: str = ""
) -> dict[str, Any]:
    """Do as `evaluate` does, but for the page, with graders that are opened one after the other.

    Args:
        openers: what opens each grader, by its name, which names its folder too.
        split: folder of `label-relevance split`.
        output: folder of ``evaluation.json`` and the grades.
        command: the command line, for the record.
    """
    if output.exists() and not output.is_dir():
        raise BadInputError(f"{output}: is a file; name a folder")
    parts = {part: read_judgements(split, part) for part in _PARTS}
    label, shares = _majority(read_judgements(split, "fine_tuning"))
    truth = parts["evaluation"]
    scored: dict[str, Scored] = {}
    graders: dict[str, Any] = {}
    for name, opener in openers.items():
        scored[name], graders[name] = _judge(name, opener(), parts, output)
    best = max(graders, key=lambda name: _order(graders[name]["validation"][CHOSEN_BY]))
    everywhere = np.full(len(truth), label)
    scored[FLOOR] = score(truth.label, everywhere, truth.pairs.queries)
    floor = scored[FLOOR].figures() | {"calibration": _calibration(truth, everywhere, shares)}
    files = (split / f"{part}.parquet" for part in PARTS)
    content = {
        "command": command,
        "split": split.resolve().name,
        "split_fingerprint": fingerprint(*files),
        "evaluation_pairs": len(truth),
        "chosen_by": f"{CHOSEN_BY} on the validation part",
        "best": best,
        "graders": graders,
        "floor": {"label": LABELS[label], **floor},
        "humans": _humans(truth),
        "differences": {
            name: scored[best].less(other) for name, other in scored.items() if name != best
        },
    }
    content = _without_nan(content)
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(output / EVALUATION, text + "\n")
    return content


def _named(graders: Sequence[Path]) -> dict[str, Path]:
    """Return the graders by the name of their file, or of their folder.

    Raises:
        BadInputError: two have the same.
    """
    if not graders:
        raise BadInputError("--graders: name one grader or more")
    named: dict[str, Path] = {}
    for path in graders:
        of_folder = path.name == GRADER or path.is_dir()
        folder = path.parent if path.name == GRADER else path
        name = folder.resolve().name if of_folder else path.stem
        if name in named:
            raise BadInputError(f"--graders: {named[name]} and {path} have one name, '{name}'")
        named[name] = path
    return named


def _judge(
    name: str, grader: Grader, parts: Mapping[Part, Judgements], output: Path
) -> tuple[Scored, dict[str, Any]]:
    """Have both parts graded; returns the scores on the last one and what is told of the grader."""
    content: dict[str, Any] = {
        "model": grader.model,
        "prompt_version": grader.prompt_version,
        "fingerprint": grader.fingerprint,
    }
    for part, truth in parts.items():
        stored = StoredGrades(output / "grades" / name, part, grader, truth.pairs)
        with progress_bar() as bar:
            task = bar.add_task(f"{name}: {part}", total=len(truth), completed=len(stored))
            stored.complete(lambda count, bar=bar, task=task: bar.advance(task, count))  # type: ignore[misc]
        grades = stored.grades
        scored = score(truth.label, grades.label, truth.pairs.queries)
        content[part] = {
            **scored.figures(),
            "calibration": _calibration(truth, grades.label, grades.probability),
            "pairs_per_second": len(truth) / stored.seconds if stored.seconds else None,
        }
    return scored, content


def _calibration(
    truth: Judgements, label: np.ndarray, probability: np.ndarray
) -> dict[str, Any] | None:
    return calibration(truth.label, label, np.broadcast_to(probability, (len(truth), len(LABELS))))


def _majority(part: Judgements) -> tuple[int, np.ndarray]:
    """Return the most frequent label of a part, and the share of each ([3])."""
    counts = np.bincount(part.label, minlength=len(LABELS))
    return int(counts.argmax()), counts / counts.sum()


def _humans(truth: Judgements) -> dict[str, Any] | None:
    """Return how people agree with each other; ``None`` where each pair has one judgement."""
    agreed = rater_agreement(truth)
    if agreed is None:
        return None
    others, own, pair = against_the_others(truth)
    queries = [truth.pairs.queries[position] for position in pair]
    return {"agreement": asdict(agreed), "evaluation": score(others, own, queries).figures()}


def _order(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _without_nan(value: Any) -> Any:
    """Return a document with ``None`` where a figure has no value: JSON knows no NaN."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
