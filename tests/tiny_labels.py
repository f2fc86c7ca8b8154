"""A small dataset folder with human relevance labels, and its split into parts."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.labeling.options import Split
from embeddings.labeling.split import split
from tests.tiny_dataset import BRANDS, KINDS

QUERIES = [*KINDS, *(f"{BRANDS[i % len(BRANDS)]} {kind}".lower() for i, kind in enumerate(KINDS))]
PRODUCTS = [f"{brand} {kind}" for kind in KINDS for brand in BRANDS]
FIRST_ID = 500
PAIRS = 3 * len(QUERIES)


def write_tiny_labels(folder: Path, *, raters: int = 1, noise: float = 0.0, seed: int = 0) -> Path:
    """Write ``catalog.parquet`` and ``relevance.parquet`` into a folder and return it.

    Each of 24 queries has three pairs: a product of the kind (and brand) that it asks for, highly
    relevant; one of the same aisle, or of another brand, moderately relevant; one of another aisle,
    irrelevant.

    Args:
        folder: is made where missing.
        raters: judgements a pair.
        noise: probability that a judgement is drawn at random.
        seed: of products and noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = [row for query in QUERIES for row in _pairs(query, rng)]
    query, title, label = (list(column) for column in zip(*rows, strict=True))
    given = np.repeat(np.array(label), raters)
    drawn = rng.random(len(given)) < noise
    given[drawn] = rng.integers(0, 3, int(drawn.sum()))
    catalog = {
        "product_id": FIRST_ID + np.arange(len(PRODUCTS)),
        "title": PRODUCTS,
        "aisle": [KINDS[title.split(" ", 1)[1]] for title in PRODUCTS],
    }
    relevance = {
        "query": np.repeat(query, raters).tolist(),
        "product_id": FIRST_ID + np.repeat([PRODUCTS.index(t) for t in title], raters),
        "label": pa.array(given, pa.int8()),
        "source": ["human"] * len(given),
    }
    pq.write_table(pa.table(catalog), folder / "catalog.parquet")
    pq.write_table(pa.table(relevance), folder / "relevance.parquet")
    return folder


def write_tiny_split(folder: Path, *, raters: int = 1, noise: float = 0.0, seed: int = 0) -> Path:
    """Write a dataset into ``folder/data``, its split into ``folder/split``, and return the latter.

    No query is held out for train-dashclip; a quarter each is for validation and evaluation.
    """
    data = write_tiny_labels(folder / "data", raters=raters, noise=noise, seed=seed)
    parts = folder / "split"
    split(Split(data=data, output=parts, evaluation=0.25, validation=0.25, held_out_queries=0))
    return parts


def _pairs(query: str, rng: np.random.Generator) -> list[tuple[str, str, int]]:
    """Return query, title and label of the three pairs of a query."""
    kind = query if query in KINDS else query.split(" ", 1)[1]
    brand = query.removesuffix(kind).strip().capitalize() or str(rng.choice(BRANDS))
    aisle = [other for other in KINDS if KINDS[other] == KINDS[kind] and other != kind]
    if query == kind and aisle:
        partial = f"{rng.choice(BRANDS)} {aisle[0]}"
    else:
        partial = f"{rng.choice([other for other in BRANDS if other != brand])} {kind}"
    elsewhere = rng.choice([other for other in KINDS if KINDS[other] != KINDS[kind]])
    titles = [f"{rng.choice(BRANDS)} {elsewhere}", partial, f"{brand} {kind}"]
    return [(query, title, label) for label, title in enumerate(titles)]
