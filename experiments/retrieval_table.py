"""The paper's Table 1 (Section 4.1) on a dataset folder: how well each method retrieves.

`embeddings.retrieval` holds the metrics' formulas, `experiments.retrieval_rows` the methods. Every
figure has a 95 % bootstrap interval over queries; the trained model is compared with the best of
the others, metric by metric, by the quotient of the means under the same draws.
"""

import json
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.markup import escape

from embeddings.catalog import RELEVANCE
from embeddings.open_encoder import open_encoder
from embeddings.retrieval import (
    METRICS,
    UNJUDGED,
    best_possible,
    bootstrap_means,
    import_faiss,
)
from experiments.retrieval_rows import DASHCLIP, Methods, Row, measure_rows
from experiments.retrieval_task import RetrievalTask
from features import columns
from features.console import print_table, say
from features.errors import BadInputError
from features.files import atomic_folder
from features.parquet import parquet_files
from features.schema import DatasetSchema
from ranking.versions import installed_versions

RETRIEVAL_JSON = "retrieval.json"
RETRIEVAL_MD = "retrieval.md"

SAMPLES, SEED = 2000, 0

_LABELS = {
    "graded_relevance": "Graded Rel",
    "recall": "Recall",
    "precision": "Precision",
    "ndcg": "nDCG",
}
_PAPER = {"graded_relevance": 1.26, "recall": 1.12, "precision": 1.58}  # over CLIP (image)
_PACKAGES = ("torch", "transformers", "numpy", "bm25s", "PyStemmer", "faiss-cpu")
_NOTHING = "–"  # noqa: RUF001


def benchmark_retrieval(
    data: Path,
    output: Path,
    *,
    model: Path | None = None,
    methods: Methods | None = None,
    ks: Sequence[int] = (10,),
    max_broken_images: float = 0.1,
    command: str = "",
) -> dict[str, Any]:
    """Measure every method, print the table and write ``retrieval.json`` and ``retrieval.md``.

    The queries are those that the model was not trained on or, without a model, the held-out fifth;
    the pool is all products judged for them. The same call gives the same figures.

    Args:
        data: the dataset folder.
        output: the folder to write, whole or not at all; results of an earlier call are replaced.
        model: folder of a trained model, which becomes the last row.
        methods: what it is compared with; the published checkpoints if ``None``.
        ks: lengths of the list; the first is that of the JSON's ``rows``.
        max_broken_images: the largest share of broken images that is put up with.
        command: the command line, for the report.

    Returns:
        The content of ``retrieval.json``.

    Raises:
        BadInputError: an input is missing or broken, no query can be scored, a K is below 1, FAISS
            is asked for and not installed, or ``output`` holds something else.
    """
    ks = tuple(dict.fromkeys(ks))
    if not ks or min(ks) < 1:
        raise BadInputError(f"K must be 1 or more, got {', '.join(map(str, ks)) or 'none'}")
    _refuse_foreign(output)
    schema = DatasetSchema.load(data)
    methods = methods or Methods()
    if methods.search == "faiss":
        import_faiss()
    if model is not None:
        methods = replace(methods, trained=open_encoder(model))
    task = RetrievalTask.read(data, model=model, max_broken_images=max_broken_images)
    say(f"{len(task.queries):,} queries, {len(task.pool):,} products")
    rows = list(measure_rows(task, methods, ks))
    document = {
        **_figures(task, rows, ks[0]),
        "other_k": [_figures(task, rows, k) for k in ks[1:]],
        "dataset": schema.name,
        "labels": _label_sources(data),
        "caveat": schema.caveat,
        "command": command,
        "versions": {"python": platform.python_version()} | installed_versions(_PACKAGES),
    }
    with atomic_folder(output) as folder:
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        (folder / RETRIEVAL_JSON).write_text(text, encoding="utf-8")
        (folder / RETRIEVAL_MD).write_text(_markdown(document), encoding="utf-8")
    _show(document)
    say(f"Report: {output / RETRIEVAL_MD}")
    return document


def _refuse_foreign(output: Path) -> None:
    """Raise unless ``output`` is missing, empty or holds results of this benchmark only."""
    if not output.exists():
        return
    if not output.is_dir():
        raise BadInputError(f"{output}: is a file; name a folder")
    foreign = sorted({p.name for p in output.iterdir()} - {RETRIEVAL_JSON, RETRIEVAL_MD})
    if foreign:
        raise BadInputError(
            f"{output}: holds '{foreign[0]}', which is no retrieval result; name another folder"
        )


def _label_sources(data: Path) -> list[str]:
    """Return the distinct sources of the dataset's labels, sorted."""
    found: set[str] = set()
    for path in parquet_files(data / RELEVANCE):
        found.update(pc.unique(pq.read_table(path, columns=[columns.SOURCE]).column(0)).to_pylist())
    return sorted(found)


def _figures(task: RetrievalTask, rows: Sequence[Row], k: int) -> dict[str, Any]:
    """Return what ``retrieval.json`` says for one K."""
    measured = {row.name: row.scores[k] for row in rows if row.scores is not None}
    values = np.stack([scores[metric] for scores in measured.values() for metric in METRICS], 1)
    draws = bootstrap_means(values, samples=SAMPLES, seed=SEED)
    names = list(measured)
    means = dict(zip(names, values.mean(axis=0).reshape(-1, len(METRICS)), strict=True))
    drawn = dict(
        zip(names, draws.reshape(SAMPLES, -1, len(METRICS)).transpose(1, 0, 2), strict=True)
    )
    document: dict[str, Any] = {
        "k": k,
        "queries": len(task.queries),
        "products": len(task.pool),
        "rows": [],
    }
    for row in rows:
        figures: dict[str, Any] = {"name": row.name, **dict.fromkeys(METRICS), "interval": None}
        figures |= {UNJUDGED: None, "status": "missing" if row.scores is None else "measured"}
        if row.scores is not None:
            figures |= dict(zip(METRICS, means[row.name].tolist(), strict=True))
            ends = [_interval(column) for column in drawn[row.name].T]
            figures["interval"] = dict(zip(METRICS, ends, strict=True))
            figures[UNJUDGED] = round(float(row.scores[k][UNJUDGED].sum()))
        document["rows"].append({**figures, "note": row.note})
    document["retrieved"] = min(k, len(task.pool)) * len(task.queries)
    document["perfect"] = best_possible(task.relevance, k)
    document["ratios"] = _ratios(means, drawn)
    return document


def _interval(draws: np.ndarray) -> list[float]:
    """Return the 2.5th and the 97.5th percentile."""
    return np.percentile(draws, [2.5, 97.5]).tolist()


def _ratios(means: dict[str, np.ndarray], drawn: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return, by metric, the trained model's mean over that of the best other row."""
    if DASHCLIP not in means:
        return {}
    others = [name for name in means if name != DASHCLIP]
    ratios = {}
    for column, metric in enumerate(METRICS):
        best = max(others, key=lambda name: means[name][column])
        below = drawn[best][:, column]
        if not below.all():  # a quotient needs a baseline that finds something in every draw
            continue
        ratios[metric] = {
            "baseline": best,
            "ratio": float(means[DASHCLIP][column] / means[best][column]),
            "interval": _interval(drawn[DASHCLIP][:, column] / below),
        }
    return ratios


def _show(document: dict[str, Any]) -> None:
    """Print a table for each K."""
    for figures in (document, *document["other_k"]):
        print_table(
            f"{document['dataset']}: {figures['queries']:,} queries, "
            f"{figures['products']:,} products",
            _header(figures["k"]),
            [[escape(cell) for cell in _cells(row)] for row in figures["rows"]],
        )
        for line in _ratio_lines(figures):
            say(line)
    if document["caveat"]:
        say(f"Caveat: {document['caveat']}")


def _header(k: int) -> list[str]:
    return ["embedding", *(f"{_LABELS[metric]}@{k}" for metric in METRICS), "unjudged", "note"]


def _cells(row: dict[str, Any]) -> list[str]:
    if row["interval"] is None:
        return [row["name"], *[_NOTHING] * (len(METRICS) + 1), row["note"]]
    figures = []
    for metric in METRICS:
        low, high = row["interval"][metric]
        figures.append(f"{_decimal(row[metric])} [{_decimal(low)}, {_decimal(high)}]")
    return [row["name"], *figures, f"{row[UNJUDGED]:,}", row["note"]]


def _decimal(value: float) -> str:
    return f"{value:.3f}"


def _ratio_lines(figures: dict[str, Any]) -> list[str]:
    """Return a sentence for each metric on which the trained model is compared."""
    lines = []
    for metric, found in figures["ratios"].items():
        low, high = found["interval"]
        paper = f"; the paper's is × {_PAPER[metric]:.2f}" if metric in _PAPER else ""  # noqa: RUF001
        lines.append(
            f"{_LABELS[metric]}@{figures['k']}: × {found['ratio']:.3f} "  # noqa: RUF001
            f"[{low:.3f}, {high:.3f}] of the best other row, {found['baseline']}{paper}"
        )
    return lines


def _markdown(document: dict[str, Any]) -> str:
    """Return the content of ``retrieval.md``."""
    lines = [f"# Retrieval on {document['dataset']}", ""]
    lines += [
        f"{document['queries']:,} held-out queries with a relevant product, "
        f"{document['products']:,} products; labels: {', '.join(document['labels'])}. Means over "
        f"queries with 95 % bootstrap intervals ({SAMPLES:,} draws).",
        "",
    ]
    if document["caveat"]:
        lines += [f"**Mind the data.** {document['caveat']}", ""]
    for figures in (document, *document["other_k"]):
        header = _header(figures["k"])
        lines += [f"## K = {figures['k']}", ""]
        lines += [_markdown_row(header), _markdown_row(["---"] * len(header))]
        lines += [_markdown_row(_cells(row)) for row in figures["rows"]]
        perfect = ", ".join(f"{_LABELS[m]} {_decimal(figures['perfect'][m])}" for m in METRICS)
        lines += ["", f"A perfect ranking would reach {perfect}."]
        lines += [f"Unjudged: of {figures['retrieved']:,} retrieved pairs; they count as grade 0."]
        lines += ["", *(f"- {line}" for line in _ratio_lines(figures))]
        lines += [""] if figures["ratios"] else []
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines += ["## Provenance", ""]
    if document["command"]:
        lines += [f"`{document['command']}`", ""]
    return "\n".join([*lines, f"{versions}."]) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
