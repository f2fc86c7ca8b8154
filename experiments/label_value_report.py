"""The figures of `experiments.label_value`, as a document and as tables."""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.label_value import ARMS, BOTH, HUMAN, MODEL, NO_LABELS
from experiments.label_value_scores import AUC, F1, F1_WITH_COSINE, MEASURES, K
from features.console import print_table, say
from features.files import write_text
from features.schema import DatasetSchema

if TYPE_CHECKING:
    from experiments.label_value_scores import HeldOut, Scores

JSON, MARKDOWN = "label_value.json", "label_value.md"

_NAMES = {
    "graded_relevance": f"Graded Rel@{K}",
    "recall": f"Recall@{K}",
    "precision": f"Precision@{K}",
    "ndcg": f"nDCG@{K}",
    F1: "relevance F1",
    F1_WITH_COSINE: "relevance F1, with cosine",
    AUC: "AUC of the cosine",
}
_COMPARED = ((BOTH, HUMAN), (MODEL, HUMAN), (BOTH, MODEL), (HUMAN, NO_LABELS))
_NOTHING = "–"  # noqa: RUF001
_MINUS = "−"  # noqa: RUF001


def write(
    output: Path,
    data: Path,
    labels: Path,
    held_out: "HeldOut",
    runs: "Mapping[str, Mapping[int, Scores]]",
    trained: Mapping[str, Mapping[str, Any]],
    *,
    command: str,
) -> dict[str, Any]:
    """Write ``label_value.json`` and ``label_value.md`` and return the content of the former.

    Args:
        output: folder of both.
        data: dataset folder.
        labels: folder of the model's labels.
        held_out: what was asked.
        runs: what each arm reached, by seed.
        trained: content of ``training.json`` of each arm and seed.
        command: the command line.
    """
    from experiments.label_value_scores import differences, figures
    from ranking.versions import installed_versions

    schema = DatasetSchema.load(data)
    packages = ("dashclip-ranker", "torch", "transformers", "scikit-learn", "scipy")
    document = {
        "dataset": schema.name,
        "caveat": schema.caveat,
        "k": K,
        "queries": len(held_out.task.queries),
        "products": len(held_out.task.pool),
        "pairs": len(held_out.pairs.label),
        "labels": _labels(labels),
        "arms": [
            {
                "name": arm,
                **figures(found),
                "training": _training(trained[arm]) if arm in ARMS else None,
            }
            for arm, found in runs.items()
        ],
        "differences": [
            {"of": arm, "to": other, **differences(runs[arm], runs[other])}
            for arm, other in _COMPARED
        ],
        "command": command,
        "versions": {"python": platform.python_version()} | installed_versions(packages),
    }
    write_text(output / JSON, json.dumps(document, indent=2, allow_nan=False) + "\n")
    write_text(output / MARKDOWN, _markdown(document))
    return document


def show(document: Mapping[str, Any]) -> None:
    """Print the tables."""
    for title, header, rows in _tables(document):
        print_table(title, header, rows)
    for line in _remarks(document):
        say(line)


def _labels(folder: Path) -> dict[str, Any]:
    """Return how many pairs the model labelled, and how."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from embeddings.relevance import label_files
    from features import columns

    table = pq.ParquetDataset(label_files(folder)).read(
        [columns.QUERY, columns.LABEL, "model", "prompt_version"]
    )
    return {
        "pairs": len(table),
        "queries": len(pc.unique(table[columns.QUERY])),
        "labels": np.bincount(table[columns.LABEL].to_numpy(), minlength=3).tolist(),
        "models": pc.unique(table["model"]).to_pylist(),
        "prompt_versions": pc.unique(table["prompt_version"]).to_pylist(),
    }


def _training(runs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the seeds of an arm were trained on, and the seconds that it took each."""
    [first, *_] = runs.values()
    stage_2 = first["stages"][-1]
    return {
        "pairs": first["training_pairs"],
        "queries": first["training_queries"],
        "tuples_an_epoch": stage_2["examples_an_epoch"],
        "tuples_trained_on": stage_2["examples"],
        "seconds": {seed: run["stages"][-1]["seconds"] for seed, run in runs.items()},
    }


def _tables(document: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, header and rows of each table."""
    reached = [
        [arm["name"], *_trained_on(arm["training"]), *(_mean(arm[name]) for name in MEASURES)]
        for arm in document["arms"]
    ]
    apart = [
        [f"{row['of']} {_MINUS} {row['to']}", *(_difference(row[name]) for name in MEASURES)]
        for row in document["differences"]
    ]
    names = [_NAMES[name] for name in MEASURES]
    header = ["labels of", "pairs", "tuples, of", *names]
    return [
        (f"What labels of a model are worth: {document['dataset']}", header, reached),
        ("Differences", ["labels of", *names], apart),
    ]


def _trained_on(training: Mapping[str, Any] | None) -> tuple[str, str]:
    if training is None:
        return _NOTHING, _NOTHING
    tuples = f"{training['tuples_trained_on']:,}, {training['tuples_an_epoch']:,}"
    return f"{training['pairs']:,}", tuples


def _mean(found: Mapping[str, Any]) -> str:
    if found["std"] is None:
        return f"{found['mean']:.4f}"
    return f"{found['mean']:.4f} ± {found['std']:.4f}"


def _difference(found: Mapping[str, Any]) -> str:
    if found["interval"] is None:
        return f"{found['lift']:+.4f}"
    low, high = found["interval"]
    p_value = found["p_value"]
    chance = "p < 0.001" if p_value < 0.001 else f"p {p_value:.3f}"
    return f"{found['lift']:+.4f} [{low:+.4f}, {high:+.4f}], {chance}"


def _remarks(document: Mapping[str, Any]) -> list[str]:
    """Return the sentences below the tables."""
    labels = document["labels"]
    shares = [f"{count / max(labels['pairs'], 1):.1%}" for count in labels["labels"]]
    return [
        f"{document['queries']:,} held-out queries, {document['products']:,} products; relevance "
        f"on {document['pairs']:,} graded pairs. Means and standard deviations over seeds.",
        f"The model labelled {labels['pairs']:,} pairs of {labels['queries']:,} training queries: "
        f"{shares[0]} irrelevant, {shares[1]} moderately, {shares[2]} highly relevant.",
        "Each arm of a seed went on from the same model without labels, over equally many tuples; "
        "'tuples, of' is how many it was trained on and how many an epoch of its labels has.",
        "Intervals are of 95 %: of retrieval over queries and seeds, of relevance over seeds.",
        *([f"Caveat: {document['caveat']}"] if document["caveat"] else []),
    ]


def _markdown(document: Mapping[str, Any]) -> str:
    lines = []
    for title, header, rows in _tables(document):
        lines += [f"## {title}", ""]
        cells = [header, ["---"] * len(header), *rows]
        lines += ["| " + " | ".join(row) + " |" for row in cells] + [""]
    lines += [f"- {line}" for line in _remarks(document)]
    if document["command"]:
        lines += ["", f"`{document['command']}`"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return "\n".join([*lines, "", f"{versions}."]) + "\n"
