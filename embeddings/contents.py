"""One pass over a catalog with images: what there is to encode of each product.

A product's *content* is its title and its image; products of one content share a vector. A broken
image counts as missing, so such a product's content is its title.

Legend: ``N`` products.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from embeddings.catalog import Catalog
from embeddings.images import ImageFaults
from embeddings.vector_store import VectorStore, content_key

if TYPE_CHECKING:
    from PIL.Image import Image

PRODUCT = "product"
_AT_ONCE = 256  # contents encoded together; up to five times as many images are in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Illustrated:
    """A content with an image."""

    key: bytes
    title: str
    image: "Image"


class CatalogReading:
    """Reads titles and images once, in the catalog's order, and never holds all images.

    Args:
        catalog: with a column of images.
        store: vectors of contents that need not be encoded; their images are not decoded.
        faults: decodes images and counts the broken ones.

    Attributes:
        keys: the content of each product read so far; ``None`` where it has neither title nor
            image.
        titles: the contents without an image found so far, with their titles.
    """

    def __init__(self, catalog: Catalog, store: VectorStore, faults: ImageFaults) -> None:
        self.keys: list[bytes | None] = []
        self.titles: dict[bytes, str] = {}
        self._catalog = catalog
        self._store = store
        self._faults = faults
        self._found: set[bytes] = set()

    def new(self) -> Iterator[tuple[int, list[Illustrated]]]:
        """Yield lists of contents with an image to encode, each with the products read so far.

        All but the last list are of one length, counted from the first content that the store does
        not hold: a run that goes on where another stopped gets the lists that were left.

        Raises:
            BadInputError: the column cannot be read, or too many images are broken.
        """
        waiting: list[Illustrated] = []
        for ids, titles, blobs in self._catalog.with_images():
            waiting += self._read(ids, titles, blobs)
            while len(waiting) >= _AT_ONCE:
                yield len(self.keys), waiting[:_AT_ONCE]
                waiting = waiting[_AT_ONCE:]
        yield len(self.keys), waiting

    def _read(
        self, ids: Sequence[int], titles: Sequence[str], blobs: Sequence[bytes | None]
    ) -> list[Illustrated]:
        """Note the contents of some products; return those with an image that are new."""
        keys: list[bytes | None] = [None] * len(ids)
        unknown, bare = [], []
        for row, (title, blob) in enumerate(zip(titles, blobs, strict=True)):
            if blob is None:
                bare.append(row)
                continue
            key = keys[row] = content_key(PRODUCT, title, blob)
            if key in self._found or key in self._store:
                self._faults.seen += 1
            else:
                unknown.append((row, key))
        rows = [row for row, _ in unknown]
        images = self._faults.decode([ids[row] for row in rows], [blobs[row] for row in rows])
        new = []
        for (row, key), image in zip(unknown, images, strict=True):
            if image is None:
                bare.append(row)
            elif key not in self._found:
                self._found.add(key)
                new.append(Illustrated(key=key, title=titles[row], image=image))
        for row in bare:
            keys[row] = None
            if title := titles[row]:
                keys[row] = key = content_key(PRODUCT, title)
                self.titles[key] = title
        self.keys += keys
        return new
