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


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Which calls of an encoder one of several processes makes: every ``of``-th.

    What a call encodes depends on the catalog and on finished tables alone, not on who makes it
    or on what a run that was stopped had done.
    """

    number: int = 0
    of: int = 1

    def has(self, call: int) -> bool:
        """Return whether this process makes the call."""
        return call % self.of == self.number


class CatalogReading:
    """Reads titles and images once, in the catalog's order, and never holds all images.

    Args:
        catalog: with a column of images.
        store: vectors of contents that need not be encoded; their images are not decoded.
        faults: decodes images and counts the broken ones.
        share: whose images are decoded; those of others are taken for whole.

    Attributes:
        keys: the content of each product read so far; ``None`` where it has neither title nor
            image.
        titles: the contents of products without an image, with their titles.
        bared: the contents of products whose image is broken, with their titles; once `new` has
            ended.
    """

    def __init__(
        self, catalog: Catalog, store: VectorStore, faults: ImageFaults, share: Share
    ) -> None:
        self.keys: list[bytes | None] = []
        self.titles: dict[bytes, str] = {}
        self.bared: dict[bytes, str] = {}
        self._catalog = catalog
        self._store = store
        self._faults = faults
        self._share = share
        self._found: set[bytes] = set()
        self._repeated: list[bytes] = []
        self._broken: set[bytes] = set()

    def new(self) -> Iterator[tuple[int, list[Illustrated]]]:
        """Yield lists of contents with an image to encode, each with the products read so far.

        Contents that finished tables do not hold are taken by the `_AT_ONCE`, in the catalog's
        order; a list is what is left of them without those that are broken or in the store.

        Raises:
            BadInputError: the column cannot be read, or too many images are broken.
        """
        waiting: list[_Found] = []
        call = 0
        for ids, titles, blobs in self._catalog.with_images():
            waiting += self._read(ids, titles, blobs)
            while len(waiting) >= _AT_ONCE:
                yield len(self.keys), self._decoded(call, waiting[:_AT_ONCE])
                waiting = waiting[_AT_ONCE:]
                call += 1
        yield len(self.keys), self._decoded(call, waiting)
        self._leave_out_broken()

    def _read(
        self, ids: Sequence[int], titles: Sequence[str], blobs: Sequence[bytes | None]
    ) -> list["_Found"]:
        """Note the contents of some products; return those with an image that tables lack."""
        found = []
        for product_id, title, blob in zip(ids, titles, blobs, strict=True):
            key = None
            if blob is not None:
                key = content_key(PRODUCT, title, blob)
                if self._store.is_settled(key):
                    self._faults.repeat(broken=False)
                elif key not in self._found:
                    self._found.add(key)
                    found.append(_Found(key=key, product_id=product_id, title=title, blob=blob))
                else:
                    self._repeated.append(key)
            elif title:
                key = content_key(PRODUCT, title)
                self.titles[key] = title
            self.keys.append(key)
        return found

    def _decoded(self, call: int, found: list["_Found"]) -> list[Illustrated]:
        """Return what of one call is to be encoded here."""
        missing = [content for content in found if content.key not in self._store]
        for _ in range(len(found) - len(missing)):
            self._faults.repeat(broken=False)
        if not self._share.has(call):
            return []
        images = self._faults.decode(
            [content.product_id for content in missing], [content.blob for content in missing]
        )
        decoded = []
        for content, image in zip(missing, images, strict=True):
            if image is None:
                self._broken.add(content.key)
            else:
                decoded.append(Illustrated(key=content.key, title=content.title, image=image))
        return decoded

    def _leave_out_broken(self) -> None:
        """Let the products with a broken image be what their titles are."""
        for key in self._repeated:
            self._faults.repeat(broken=key in self._broken)
        if not self._broken:
            return
        for row, title in enumerate(self._catalog.titles):
            if self.keys[row] in self._broken:
                self.keys[row] = None
                if text := title.as_py():
                    self.keys[row] = bare = content_key(PRODUCT, text)
                    self.bared[bare] = text


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A content with an image that is not decoded yet, and the first product that has it."""

    key: bytes
    product_id: int
    title: str
    blob: bytes
