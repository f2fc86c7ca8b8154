"""What a variant of DashCLIP's training reaches on held-out queries and titles, as a table.

Legend: ``Q`` queries, ``N`` products, ``S`` seeds.
"""

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embeddings.catalog import RELEVANCE, read_catalog
from embeddings.encoder import Encoder
from embeddings.open_encoder import open_encoder
from embeddings.retrieval import METRICS, bootstrap_means, score_ranking
from embeddings.train import START
from experiments.product_task_data import embed_products, product_variants, read_aisles
from experiments.product_task_probes import AISLE_PROBE, aisle_split, probe, summary
from experiments.retrieval_task import RetrievalTask
from features.console import print_table, say
from features.files import write_text
from features.schema import DatasetSchema
from ranking.versions import installed_versions

JSON, MARKDOWN = "ablation.json", "ablation.md"
K = 10
AISLE_PRODUCTS = 6_000  # at most; encoding more of them takes longer than it tells
AISLE_SEEDS = 3
_RECALLS = ("image_to_title_recall_at_10", "title_to_image_recall_at_10")
_HEADER = (
    *("variant", "image → title R@10", "title → image R@10"),
    *(f"Graded Rel@{K}", "− base [95 %]", f"Recall@{K}", f"Precision@{K}", f"nDCG@{K}"),  # noqa: RUF001
    *("aisle macro F1", "seconds"),
)
_NOTHING = "–"  # noqa: RUF001


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scores:
    """What a model reached.

    Attributes:
        retrieval: [Q] of each of `embeddings.retrieval.METRICS`; empty without relevance labels.
        aisle_macro_f1: [S]; empty without aisles.
    """

    retrieval: dict[str, np.ndarray]
    aisle_macro_f1: np.ndarray


class HeldOut:
    """The held-out queries of a dataset with the pool of their products, and products with aisles.

    Args:
        data: dataset folder.
        model: a model that was trained on it; tells which queries it has not seen.
    """

    def __init__(self, data: Path, model: Path) -> None:
        self._catalog = read_catalog(data)
        self.retrieval: RetrievalTask | None = None
        if (data / RELEVANCE).exists():
            self.retrieval = RetrievalTask.read(data, model=model)
        self.aisles = read_aisles(self._catalog, most=AISLE_PRODUCTS)

    def scores(self, model: Path, *, untrained: bool = False) -> Scores:
        """Return what a model reaches; measured once and kept in its folder.

        Args:
            model: folder of a run of ``train-dashclip``.
            untrained: measure what that run started from.
        """
        kept = model / ("evaluation-start.json" if untrained else "evaluation.json")
        if not kept.exists():
            encoder = open_encoder(model / START if untrained else model)
            say(f"{model}{' (untrained)' if untrained else ''}: evaluating")
            found = {"retrieval": self._retrieval(encoder), "aisle_macro_f1": self._aisles(encoder)}
            write_text(kept, json.dumps(found) + "\n")
        content = json.loads(kept.read_text(encoding="utf-8"))
        return Scores(
            retrieval={name: np.array(values) for name, values in content["retrieval"].items()},
            aisle_macro_f1=np.array(content["aisle_macro_f1"]),
        )

    def _retrieval(self, encoder: Encoder) -> dict[str, list[float]]:
        task = self.retrieval
        if task is None:
            return {}
        queries = task.encode_queries(encoder.encode_queries)
        ranking = task.rank(queries, task.encode_products(encoder), K, "exact")
        found = score_ranking(ranking, task.relevance, K)
        return {metric: found[metric].tolist() for metric in METRICS}

    def _aisles(self, encoder: Encoder) -> list[float]:
        task = self.aisles
        if task is None:
            return []
        images = self._catalog.has_images and encoder.reads_images
        main = dict(list(product_variants(encoder, images=images).items())[:1])
        [vectors] = embed_products(self._catalog, task.rows, main, images=images).values()
        splits = [aisle_split(task.classes, seed) for seed in range(AISLE_SEEDS)]
        runs = probe(vectors, task.classes, splits, classes=len(task.names), config=AISLE_PROBE)
        return [float(value) for value in runs.macro_f1]


class Table:
    """The rows so far, printed and written.

    Args:
        data: dataset folder.
        output: folder of ``ablation.json`` and ``ablation.md``.
        command: the command line.
    """

    def __init__(self, data: Path, output: Path, command: str) -> None:
        schema = DatasetSchema.load(data)
        packages = ("dashclip-ranker", "torch", "transformers", "scikit-learn")
        self._output = output
        self._base: dict[str, np.ndarray] | None = None
        self._document: dict[str, Any] = {
            "dataset": schema.name,
            "caveat": schema.caveat,
            "k": K,
            "rows": [],
            "same_as_base": [],
            "command": command,
            "versions": {"python": platform.python_version()} | installed_versions(packages),
        }

    def asks(self, held_out: HeldOut) -> None:
        """Note what is asked."""
        task, aisles = held_out.retrieval, held_out.aisles
        self._document |= {
            "queries": len(task.queries) if task else 0,
            "products": len(task.pool) if task else 0,
            "aisle_products": len(aisles.rows) if aisles else 0,
            "aisles": len(aisles.names) if aisles else 0,
        }

    def same(self, name: str) -> None:
        """Note a variant that is the base."""
        self._document["same_as_base"].append(name)

    def add(self, name: str, scores: Scores, training: dict[str, Any] | None) -> None:
        """Add a row; the first that was trained is the base.

        Args:
            name: of the variant.
            scores: what it reached.
            training: content of its ``training.json``; ``None`` for the untrained start.
        """
        base = self._base
        if training is not None and base is None:
            self._base = scores.retrieval
        stages = training["stages"] if training else []
        self._document["rows"].append(
            {
                "name": name,
                "title_recall": _title_recall(stages),
                "retrieval": _retrieval(scores.retrieval, base),
                "aisle_macro_f1": (
                    summary(scores.aisle_macro_f1) if len(scores.aisle_macro_f1) else None
                ),
                "seconds": {stage["name"]: stage["seconds"] for stage in stages},
            }
        )

    def write(self) -> None:
        """Write both files with the rows so far."""
        text = json.dumps(self._document, indent=2, allow_nan=False) + "\n"
        write_text(self._output / JSON, text)
        write_text(self._output / MARKDOWN, _markdown(self._document, self._cells()))

    def show(self) -> dict[str, Any]:
        """Print the table, write both files and return the content of ``ablation.json``."""
        self.write()
        print_table(f"Ablation on {self._document['dataset']}", _HEADER, self._cells())
        for line in _remarks(self._document):
            say(line)
        return self._document

    def _cells(self) -> list[list[str]]:
        return [_cells(row) for row in self._document["rows"]]


def _title_recall(stages: list[dict[str, Any]]) -> dict[str, list[float]] | None:
    """Return recall@10 between images and held-out titles before and after stage 1."""
    for stage in stages:
        found = stage["evaluations"]
        if found and _RECALLS[0] in found[0]:
            after = found[stage["best"] or -1]
            return {name: [found[0][name], after[name]] for name in _RECALLS}
    return None


def _retrieval(
    scores: dict[str, np.ndarray], base: dict[str, np.ndarray] | None
) -> dict[str, Any] | None:
    """Return means with 95 % bootstrap intervals, and the same of the differences to the base.

    Differences are paired: query by query.
    """
    if not scores:
        return None
    values = np.stack([scores[metric] for metric in METRICS], axis=1)
    means = dict(zip(METRICS, _with_interval(values), strict=True))
    if base is None:
        return {metric: {**found, "difference": None} for metric, found in means.items()}
    values -= np.stack([base[metric] for metric in METRICS], axis=1)
    differences = zip(METRICS, _with_interval(values), strict=True)
    return {metric: {**means[metric], "difference": found} for metric, found in differences}


def _with_interval(values: np.ndarray) -> list[dict[str, Any]]:
    ends = np.percentile(bootstrap_means(values), [2.5, 97.5], axis=0).T
    return [
        {"mean": float(mean), "interval": interval.tolist()}
        for mean, interval in zip(values.mean(axis=0), ends, strict=True)
    ]


def _cells(row: dict[str, Any]) -> list[str]:
    recall, retrieval, aisle = row["title_recall"], row["retrieval"], row["aisle_macro_f1"]
    recalls = [
        f"{recall[name][0]:.3f} → {recall[name][1]:.3f}" if recall else _NOTHING
        for name in _RECALLS
    ]
    measured = [_NOTHING] * (len(METRICS) + 1)
    if retrieval:
        measured = [f"{retrieval[metric]['mean']:.3f}" for metric in METRICS]
        measured.insert(1, _difference(retrieval[METRICS[0]]["difference"]))
    seconds = sum(row["seconds"].values())
    return [
        row["name"],
        *recalls,
        *measured,
        f"{aisle['mean']:.3f} ± {aisle['std']:.3f}" if aisle else _NOTHING,
        f"{seconds:,.0f}" if row["seconds"] else _NOTHING,
    ]


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return _NOTHING
    low, high = found["interval"]
    return f"{found['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"


def _remarks(document: dict[str, Any]) -> list[str]:
    """Return the sentences below the table."""
    lines = []
    if document["same_as_base"]:
        lines.append(f"As the base is already: {', '.join(document['same_as_base'])}.")
    if document.get("queries"):
        lines.append(
            f"{document['queries']:,} held-out queries, {document['products']:,} products; "
            "intervals over queries, differences paired."
        )
    if document.get("aisle_products"):
        lines.append(
            f"Aisles: {document['aisle_products']:,} products of {document['aisles']:,} aisles, "
            f"mean and standard deviation over {AISLE_SEEDS} splits."
        )
    if document["caveat"]:
        lines.append(f"Caveat: {document['caveat']}")
    return lines


def _markdown(document: dict[str, Any], rows: list[list[str]]) -> str:
    """Return the content of ``ablation.md``."""
    table = [list(_HEADER), ["---"] * len(_HEADER), *rows]
    lines = [f"# Ablation on {document['dataset']}", ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in table]
    lines += ["", *(f"- {line}" for line in _remarks(document))]
    lines += [
        "- Descriptive: no setting was chosen by this table. Each row was trained with one seed.",
        "",
    ]
    if document["command"]:
        lines += [f"`{document['command']}`", ""]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return "\n".join([*lines, f"{versions}."]) + "\n"
