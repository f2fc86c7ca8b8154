"""What the product tasks learn from: aisles, graded pairs, and vectors of frozen encoders.

Legend: ``N`` products, ``P`` pairs of query and product, ``Q`` queries, ``D`` embedding dimension.
A product's *row* is its position in the catalog.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

import numpy as np

from embeddings.catalog import RELEVANCE, Catalog
from embeddings.encoder import Encoder
from embeddings.images import ImageFaults

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_TEXT = "image-text"
TEXT = "text only"
IMAGE = "image only"

# Which encoder: as it is after training, or as training starts.
TRAINED = "trained"
UNTRAINED = "untrained start"

SMALLEST_AISLE = 5  # products; a fifth of them is then at least one product to test on
FEWEST_QUERIES = 10  # so that training, stopping and testing all get some
MOST_PRODUCTS = 20_000  # the paper has 16,875
MOST_PAIRS = 50_000  # the paper has 40,752

# Vectors of products by encoder and by what of a product it encodes.
Vectors = dict[tuple[str, str], np.ndarray]
Key = TypeVar("Key")
Encode = Callable[[list[str], "list[Image | None]"], np.ndarray]


@runtime_checkable
class OneModality(Protocol):
    """What an encoder of images and titles offers besides the vectors of both together."""

    def encode_titles(self, texts: Sequence[str]) -> np.ndarray:
        """Return [N, D] float32 vectors of titles alone."""
        ...

    def encode_images(self, images: "Sequence[Image | None]") -> np.ndarray:
        """Return [N, D] float32 vectors of images alone; zeros where there is none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AisleTask:
    """Products whose aisle is to be predicted (Section 5.1).

    Attributes:
        rows: [N] int64, ascending rows of the catalog.
        classes: [N] int64, positions in ``names``.
        names: of the aisles, sorted; each has `SMALLEST_AISLE` products or more.
        left_out: number of products of each smaller aisle.
    """

    rows: np.ndarray
    classes: np.ndarray
    names: list[str]
    left_out: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairTask:
    """Graded pairs of queries that the encoder has not been trained on (Section 5.2).

    Attributes:
        queries: [Q] distinct texts.
        query: [P] int64, positions in ``queries``.
        product: [P] int64, rows of the catalog.
        label: [P] int64: 0 IR, 1 MR, 2 HR.
    """

    queries: list[str]
    query: np.ndarray
    product: np.ndarray
    label: np.ndarray


def read_aisles(catalog: Catalog, *, most: int = MOST_PRODUCTS, seed: int = 0) -> AisleTask | None:
    """Return the products with a known aisle, at most ``most`` of them, drawn at random.

    ``None`` where fewer than two aisles have `SMALLEST_AISLE` products.

    Raises:
        BadInputError: the column ``aisle`` cannot be read or is not text.
    """
    # NOTE[DIFF]: the paper takes the products of the 2 % of its pairs that are set aside; here all
    # products of the catalog count, because no aisle is ever shown to the encoders.
    aisles = catalog.aisles()
    rows = np.flatnonzero(aisles >= 0)
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
    counts = np.bincount(aisles[rows], minlength=len(catalog.aisle_names))
    kept = np.flatnonzero(counts >= SMALLEST_AISLE)
    if len(kept) < 2:
        return None
    small = np.flatnonzero((counts > 0) & (counts < SMALLEST_AISLE))
    rows = rows[np.isin(aisles[rows], kept)]
    return AisleTask(
        rows=rows,
        classes=np.searchsorted(kept, aisles[rows]),
        names=[catalog.aisle_names[aisle] for aisle in kept],
        left_out={catalog.aisle_names[aisle]: int(counts[aisle]) for aisle in small},
    )


def read_pairs(
    folder: Path,
    catalog: Catalog,
    *,
    model: Path | None = None,
    most: int = MOST_PAIRS,
    seed: int = 0,
) -> PairTask | None:
    """Return the graded pairs of held-out queries; whole queries, about ``most`` pairs at most.

    Held out are the queries that ``model`` was not trained on; without a model, those that a
    training with default settings would hold out. ``None`` where there are no labels, fewer than
    `FEWEST_QUERIES` such queries, or one label only.

    Raises:
        BadInputError: the labels cannot be read or break the rules.
    """
    from embeddings.relevance import read_relevance, split_queries, unseen

    if not (folder / RELEVANCE).exists():
        return None
    relevance = read_relevance(folder, catalog)
    held_out = split_queries(relevance)[1] if model is None else unseen(relevance, model)
    query, pairs = np.unique(held_out.query, return_inverse=True)
    if len(pairs) > most:
        order = np.random.default_rng(seed).permutation(len(query))
        counts = np.bincount(pairs)[order].cumsum()
        held_out = held_out.take(np.isin(pairs, order[counts <= most]))
        query, pairs = np.unique(held_out.query, return_inverse=True)
    if len(query) < FEWEST_QUERIES or len(np.unique(held_out.label)) < 2:
        return None
    return PairTask(
        queries=[held_out.queries[position] for position in query],
        query=pairs,
        product=held_out.product,
        label=held_out.label.astype(np.int64),
    )


def product_variants(encoder: Encoder, *, images: bool) -> dict[str, Encode]:
    """Return the ways in which ``encoder`` can encode products, by name, the main one first.

    Args:
        encoder: one that also has the methods of `OneModality` gives three.
        images: whether there are any; else no row is made of images only.
    """
    if not encoder.reads_images:
        return {TEXT: lambda titles, _: encoder.encode_products(titles)}
    variants: dict[str, Encode] = {IMAGE_TEXT: encoder.encode_products}
    if isinstance(encoder, OneModality):
        unimodal: OneModality = encoder
        variants[TEXT] = lambda titles, _: unimodal.encode_titles(titles)
        if images:
            variants[IMAGE] = lambda _, pictures: unimodal.encode_images(pictures)
    return variants


def embed_products(
    catalog: Catalog, rows: np.ndarray, variants: Mapping[Key, Encode], *, images: bool
) -> dict[Key, np.ndarray]:
    """Return the [N, D] float32 vectors of the products at ``rows``, by the key of the variant.

    Args:
        catalog: of the dataset.
        rows: [N] ascending.
        variants: as `product_variants` returns them, of one encoder or of several.
        images: whether to decode images; else no product has one.

    Raises:
        BadInputError: too many images are broken.
    """
    wanted = np.zeros(len(catalog), bool)
    wanted[rows] = True
    parts: dict[Key, list[np.ndarray]] = {name: [] for name in variants}
    faults = ImageFaults()
    start = 0
    for ids, titles, blobs in catalog.with_images():
        kept = np.flatnonzero(wanted[start : start + len(ids)])
        start += len(ids)
        if not len(kept):
            continue
        some = [titles[i] for i in kept]
        found = [blobs[i] if images else None for i in kept]
        pictures = faults.decode([ids[i] for i in kept], found)
        for name, encode in variants.items():
            parts[name].append(encode(some, pictures))
    faults.check()
    return {name: np.concatenate(vectors) for name, vectors in parts.items()}
