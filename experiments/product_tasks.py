"""The product tasks of the paper's Section 5: aisles and relevance grades from frozen embeddings.

Each is learnt by a small classifier from the embeddings of a trained model and of its untrained
start, on the same splits::

    python -m experiments.product_tasks --data data/fashion --model runs/fashion/model \
        --output runs/fashion/product-tasks

It writes ``product_tasks.json`` and ``product_tasks.html``, the latter with the t-SNE map of the
aisles and the densities of the cosines of query and product. A dataset without aisles, or without
relevance labels, does the other task and says so.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embeddings.encoder import Encoder
from features.console import print_table, run_command, say
from features.errors import BadInputError
from features.files import write_text
from features.schema import DatasetSchema

if TYPE_CHECKING:
    from embeddings.catalog import Catalog
    from experiments.product_task_data import AisleTask, PairTask, Vectors
    from features.page import Picture

DOCUMENT = "product_tasks.json"
PAGE = "product_tasks.html"

_NO_AISLES = "No aisle prediction: fewer than two aisles of this dataset have 5 products or more."
_NO_PAIRS = (
    "No relevance prediction: this dataset has no labels, fewer than 10 held-out queries, or one "
    "grade only."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Predict aisles and relevance grades from frozen embeddings, and draw both."""

    data: Path
    """The dataset folder."""
    output: Path
    """Folder that receives product_tasks.json and product_tasks.html."""
    model: Path | None = None
    """A trained model; without one, the packaged MiniLM as it is."""
    seeds: int = 5
    """Number of splits and starts of each classifier."""


def run(options: Options) -> None:
    """Evaluate the model of the command line."""
    from embeddings.open_encoder import open_encoder
    from ranking.run import command_line

    trained = open_encoder(options.model) if options.model else None
    product_tasks(
        options.data,
        options.output,
        trained=trained,
        untrained=_untrained(options.model),
        model=options.model,
        seeds=options.seeds,
        command=command_line("python -m experiments.product_tasks"),
    )


def _untrained(model: Path | None) -> Encoder:
    """Return what the training of ``model`` started from."""
    from embeddings.open_encoder import open_encoder
    from embeddings.train import START

    start = None if model is None else model / START
    return open_encoder(start if start is not None and start.is_dir() else None)


def product_tasks(
    data: Path,
    output: Path,
    *,
    trained: Encoder | None,
    untrained: Encoder,
    model: Path | None = None,
    seeds: int = 5,
    command: str = "",
) -> dict[str, Any]:
    """Do both tasks, print their tables, write the page and the document, and return the latter.

    Args:
        data: dataset folder.
        output: folder of the two files.
        trained: the trained encoder; ``None`` measures the untrained one alone.
        untrained: the encoder that training starts from.
        model: the folder of the trained model, which tells its training queries; ``None`` takes
            the queries that a training would hold out.
        seeds: number of splits and starts.
        command: the command line, for the page.

    Raises:
        BadInputError: the dataset breaks a rule or has neither aisles nor labels, or ``seeds`` is
            below 1.
    """
    from embeddings.catalog import read_catalog
    from experiments.product_task_data import TRAINED, UNTRAINED, read_aisles, read_pairs

    if seeds < 1:
        raise BadInputError(f"seeds must be 1 or more, got {seeds}")
    schema = DatasetSchema.load(data)
    catalog = read_catalog(data)
    aisles, pairs = read_aisles(catalog), read_pairs(data, catalog, model=model)
    if aisles is None and pairs is None:
        raise BadInputError(f"{data}: there is nothing to do. {_NO_AISLES} {_NO_PAIRS}")
    skipped = [_NO_AISLES] * (aisles is None) + [_NO_PAIRS] * (pairs is None)
    for sentence in skipped:
        say(sentence)
    encoders = {UNTRAINED: untrained} | ({TRAINED: trained} if trained else {})
    rows, vectors = _product_vectors(catalog, encoders, aisles, pairs)
    aisle, maps = _do_aisles(aisles, rows, vectors, seeds)
    relevance, densities = _do_pairs(pairs, encoders, rows, vectors, seeds)
    if relevance is not None:
        relevance["sources"] = _label_sources(data)
    document = {
        "dataset": schema.name,
        "caveat": schema.caveat,
        "encoders": {name: encoder.fingerprint for name, encoder in encoders.items()},
        "seeds": seeds,
        "skipped": skipped,
        "aisle": aisle,
        "relevance": relevance,
        "command": command,
        "versions": _versions(),
    }
    _show(document, maps + densities, output)
    return document


def _show(document: dict[str, Any], pictures: "list[Picture]", output: Path) -> None:
    """Print the tables and write both files; neither is written unless both can be."""
    from experiments.product_task_page import render_page, tables

    page, text = render_page(document, pictures), json.dumps(document, indent=2) + "\n"
    for table in tables(document):
        print_table(table.title, table.header, table.rows)
    write_text(output / PAGE, page)
    write_text(output / DOCUMENT, text)


def _product_vectors(
    catalog: "Catalog",
    encoders: Mapping[str, Encoder],
    aisles: "AisleTask | None",
    pairs: "PairTask | None",
) -> "tuple[np.ndarray, Vectors]":
    """Return the rows of all products that a task needs, and their vectors."""
    from experiments.product_task_data import IMAGE, embed_products, product_variants

    rows = np.union1d(
        np.empty(0, np.int64) if aisles is None else aisles.rows,
        np.empty(0, np.int64) if pairs is None else pairs.product,
    )
    images = catalog.has_images and any(encoder.reads_images for encoder in encoders.values())
    variants = {
        (name, variant): encode
        for name, encoder in encoders.items()
        for position, (variant, encode) in enumerate(
            product_variants(encoder, images=images).items()
        )
        if aisles is not None or position == 0  # relevance takes the main one alone
    }
    say(f"encoding {len(rows):,} products")
    vectors = embed_products(catalog, rows, variants, images=images)
    # A column of images may be empty.
    return rows, {key: v for key, v in vectors.items() if key[1] != IMAGE or v.any()}


def _do_aisles(
    task: "AisleTask | None", rows: np.ndarray, vectors: "Vectors", seeds: int
) -> "tuple[dict[str, Any] | None, list[Picture]]":
    """Return the figures and the t-SNE map of the trained encoder, or of the only one."""
    if task is None:
        return None, []
    from experiments.product_task_data import TRAINED, UNTRAINED
    from experiments.product_task_plots import (
        MOST_POINTS,
        NAMED_AISLES,
        sample_rows,
        tsne_map,
        tsne_plot,
    )
    from experiments.product_task_results import aisle_results
    from features.page import Picture

    own = {key: found[np.searchsorted(rows, task.rows)] for key, found in vectors.items()}
    results = aisle_results(task, own, seeds)
    encoder = TRAINED if any(name == TRAINED for name, _ in own) else UNTRAINED
    variant, found = _main(own, encoder)
    shown = sample_rows(len(found))
    say(f"t-SNE of {len(shown):,} products")
    picture = Picture(
        title=f"Products by aisle: {variant}, {encoder}",
        caption=f"t-SNE of at most {MOST_POINTS:,} product embeddings. The {NAMED_AISLES} most "
        "frequent aisles are named, each at its densest cluster; the others are grey.",
        svg=tsne_plot(tsne_map(found[shown]), task.classes[shown], task.names),
        is_map=True,
    )
    return results, [picture]


def _do_pairs(
    task: "PairTask | None",
    encoders: Mapping[str, Encoder],
    rows: np.ndarray,
    vectors: "Vectors",
    seeds: int,
) -> "tuple[dict[str, Any] | None, list[Picture]]":
    """Return the figures and a plot of the densities for each encoder."""
    if task is None:
        return None, []
    from experiments.product_task_plots import cosine_limits, density_plot
    from experiments.product_task_probes import cosines
    from experiments.product_task_results import relevance_results
    from features.page import Picture

    places = np.searchsorted(rows, task.product)
    sides = {
        name: (
            encoder.encode_queries(task.queries)[task.query],
            _main(vectors, name)[1][places],
        )
        for name, encoder in encoders.items()
    }
    found = {name: cosines(query, product) for name, (query, product) in sides.items()}
    limits = cosine_limits(found)
    pictures = [
        Picture(
            title=f"Cosines by relevance: {name}",
            caption="Densities of the cosines of the pairs of held-out queries; dashed lines are "
            "medians.",
            svg=density_plot(values, task.label, limits),
        )
        for name, values in found.items()
    ]
    return relevance_results(task, sides, seeds), pictures


def _main(vectors: "Vectors", encoder: str) -> tuple[str, np.ndarray]:
    """Return name and vectors of the first variant of ``encoder``."""
    return next((key[1], found) for key, found in vectors.items() if key[0] == encoder)


def _label_sources(data: Path) -> list[str]:
    """Return where the relevance labels come from, sorted: human, llm, derived."""
    import pyarrow.compute as pc

    from embeddings.catalog import RELEVANCE, open_parquet
    from features import columns
    from features.parquet import parquet_files

    found: set[str] = set()
    for path in parquet_files(data / RELEVANCE):
        with open_parquet(path, [columns.SOURCE]) as file:
            found.update(pc.unique(file.read([columns.SOURCE]).column(0)).to_pylist())
    return sorted(found)


def _versions() -> dict[str, str]:
    import platform

    from ranking.versions import installed_versions

    packages: Sequence[str] = ("dashclip-ranker", "torch", "transformers", "scikit-learn", "scipy")
    return {"python": platform.python_version()} | installed_versions(packages)


def main() -> int:
    """Run the command line."""
    return run_command(Options, run, prog="python -m experiments.product_tasks")


if __name__ == "__main__":
    sys.exit(main())
