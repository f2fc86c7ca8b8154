"""The retrieval task of Section 4.1 on a dataset folder: held-out queries and their pool.

Legend: ``Q`` queries, ``N`` products of the pool, ``D`` embedding dimension, ``K`` length of the
list.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from embeddings.catalog import Catalog, read_catalog
from embeddings.images import ImageFaults
from embeddings.relevance import Relevance, read_relevance, split_queries, unseen
from embeddings.retrieval import Search, answerable_queries, top_k
from features.console import progress_bar
from features.errors import BadInputError

if TYPE_CHECKING:
    from PIL import Image

    from embeddings.encoder import Encoder

_TEXTS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProductVectors:
    """What an encoder says of a pool.

    Attributes:
        vectors: [n, D] float32.
        places: [n] places in the pool, ascending, of the products that have a vector.
    """

    vectors: np.ndarray
    places: np.ndarray


class RetrievalTask:
    """Queries to answer and the pool of products to answer them from.

    Args:
        catalog: of the dataset.
        relevance: the judged pairs of the held-out queries; their products are the pool.
        faults: counts broken images.

    Attributes:
        queries: [Q] texts of the held-out queries that have a relevant product, sorted.
        pool: [N] rows of the catalog, ascending.
        titles: [N] texts, empty where a product has none.

    Raises:
        BadInputError: no held-out query has a relevant product.
    """

    def __init__(self, catalog: Catalog, relevance: Relevance, faults: ImageFaults) -> None:
        self.catalog = catalog
        self.relevance = relevance
        self.faults = faults
        self.queries = [relevance.queries[query] for query in answerable_queries(relevance)]
        if not self.queries:
            raise BadInputError(
                f"{catalog.path.parent}: no held-out query has a relevant product; nothing to score"
            )
        self.pool = np.unique(relevance.product)
        self.titles: list[str] = catalog.titles.take(self.pool).fill_null("").to_pylist()
        self._images_checked = False

    @classmethod
    def read(
        cls, data: Path, *, model: Path | None = None, max_broken_images: float = 0.1
    ) -> "RetrievalTask":
        """Read a dataset folder and hold queries out.

        Args:
            data: the dataset folder.
            model: a trained model; the queries that it was not trained on are held out. Without
                one, a fifth of the queries, or the dataset's own split.
            max_broken_images: the largest share of broken images that is put up with.

        Raises:
            BadInputError: a file is missing or broken, or no query is left.
        """
        faults = ImageFaults(max_broken_images)
        catalog = read_catalog(data)
        relevance = read_relevance(data, catalog)
        held_out = unseen(relevance, model) if model else split_queries(relevance)[1]
        if not len(held_out):
            raise BadInputError(
                f"{data}: {f'{model} was trained on all its queries' if model else 'too few'}; "
                "no query is held out"
            )
        return cls(catalog, held_out, faults)

    @cached_property
    def titled(self) -> np.ndarray:
        """Places in the pool of the products that have a title."""
        return np.flatnonzero([bool(title) for title in self.titles])

    def rank(
        self, queries_qd: np.ndarray, products: ProductVectors, k: int, search: Search
    ) -> np.ndarray:
        """Return the catalog rows [Q, min(K, N)] of the nearest products by cosine, best first.

        Products without a vector follow in the catalog's order.
        """
        found, _ = top_k(_unit(queries_qd), _unit(products.vectors), k, search=search)
        places = products.places[found]
        lacking = min(k, len(self.pool)) - places.shape[1]
        if lacking > 0:
            others = np.setdiff1d(np.arange(len(self.pool)), products.places)[:lacking]
            others = np.broadcast_to(others, (len(places), lacking))
            places = np.concatenate([places, others], axis=1)
        return self.pool[places]

    def cosines(self, queries_qd: np.ndarray, products: ProductVectors) -> np.ndarray:
        """Return the cosine [Q, N] of each query with each product of the pool, float32.

        Products without a vector share the lowest cosine of the query.
        """
        found = np.asarray(_unit(queries_qd) @ _unit(products.vectors).T, np.float32)
        cosines = np.repeat(found.min(axis=1, keepdims=True), len(self.pool), axis=1)
        cosines[:, products.places] = found
        return cosines

    def encode_queries(self, encode: Callable[[Sequence[str]], np.ndarray]) -> np.ndarray:
        """Return [Q, D] vectors of the queries."""
        return _in_parts("queries", encode, self.queries)

    def encode_titles(self, encode: Callable[[Sequence[str]], np.ndarray]) -> ProductVectors:
        """Return the vectors of the products that have a title; each text is encoded once."""
        distinct = sorted({self.titles[place] for place in self.titled})
        number = {title: row for row, title in enumerate(distinct)}
        rows = [number[self.titles[place]] for place in self.titled]
        vectors = _in_parts("titles", encode, distinct) if distinct else np.empty((0, 1))
        return ProductVectors(vectors=vectors[rows], places=self.titled)

    def encode_images(
        self, encode: Callable[[Sequence["Image.Image"]], np.ndarray]
    ) -> ProductVectors:
        """Return the vectors of the products that have an image; none where nobody has one."""
        vectors, places = [np.empty((0, 1), np.float32)], [np.empty(0, np.int64)]
        for batch, _, images in self._with_images() if self.catalog.has_images else ():
            having = [row for row, image in enumerate(images) if image is not None]
            if having:
                vectors.append(encode([image for image in images if image is not None]))
                places.append(batch[having])
        return ProductVectors(
            vectors=np.concatenate(vectors[1:] or vectors), places=np.concatenate(places)
        )

    def encode_products(self, encoder: "Encoder") -> ProductVectors:
        """Return an encoder's vectors of the products: of titles or of titles and images.

        A product that has nothing that the encoder reads has none.
        """
        if not (encoder.reads_images and self.catalog.has_images):
            return self.encode_titles(encoder.encode_products)
        vectors, places = [np.empty((0, encoder.dim), np.float32)], [np.empty(0, np.int64)]
        for batch, titles, images in self._with_images():
            having = [row for row, title in enumerate(titles) if title or images[row] is not None]
            if having:
                vectors.append(
                    encoder.encode_products(
                        [titles[row] for row in having], [images[row] for row in having]
                    )
                )
                places.append(batch[having])
        return ProductVectors(vectors=np.concatenate(vectors), places=np.concatenate(places))

    def _with_images(
        self,
    ) -> Iterator[tuple[np.ndarray, list[str], list["Image.Image | None"]]]:
        """Yield places, titles and decoded images of the pool's products, batch by batch."""
        place_of = np.full(len(self.catalog), -1)
        place_of[self.pool] = np.arange(len(self.pool))
        start = 0
        with progress_bar() as bar:
            task = bar.add_task("products", total=len(self.catalog))
            for ids, titles, blobs in self.catalog.with_images():
                places = place_of[start : start + len(ids)]
                start += len(ids)
                rows = np.flatnonzero(places >= 0)
                images = self.faults.decode([ids[r] for r in rows], [blobs[r] for r in rows])
                yield places[rows], [titles[row] for row in rows], images
                bar.advance(task, len(ids))
        if not self._images_checked:  # later passes see the same images again
            self.faults.check()
            self._images_checked = True


def _in_parts(
    what: str, encode: Callable[[Sequence[str]], np.ndarray], texts: list[str]
) -> np.ndarray:
    """Return the vectors of texts; texts of like length go together, which spares padding."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    parts = []
    with progress_bar() as bar:
        task = bar.add_task(what, total=len(texts))
        for start in range(0, len(order), _TEXTS_AT_ONCE):
            rows = order[start : start + _TEXTS_AT_ONCE]
            parts.append(encode([texts[row] for row in rows]))
            bar.advance(task, len(rows))
    vectors = np.concatenate(parts)
    return vectors[np.argsort(order)]


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors of L2 norm 1; zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)
