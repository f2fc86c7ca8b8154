"""From the bytes of product photos to RGB images, and from those to a model's pixels.

Legend: ``K`` images, ``S`` side length in pixels.
"""

import io
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from features.console import say
from features.errors import BadInputError

if TYPE_CHECKING:
    from torch import Tensor

# For good, as changing it around each image would not be safe in threads.
warnings.simplefilter("error", Image.DecompressionBombWarning)

_FORMATS = ("JPEG", "PNG")
_WHITE = (255, 255, 255)
_MANY = 64  # images that are worth several threads
_NAMED = 5  # broken images that are named; the others are counted
_ENOUGH = 20  # images seen before the share of broken ones means anything


class ImageFaults:
    """Decodes images and keeps count of the broken ones, which count as missing.

    Args:
        max_share: the largest share of broken images among those seen that is put up with, 0 to 1.
        silent: name no product.

    Attributes:
        seen: images decoded so far, broken ones included; a missing image is none.
        broken: those of them that are broken.
    """

    def __init__(self, max_share: float = 0.1, *, silent: bool = False) -> None:
        if not 0 <= max_share <= 1:
            raise BadInputError(
                f"the largest share of broken images lies between 0 and 1, got {max_share}"
            )
        self.max_share = max_share
        self.seen = 0
        self.broken = 0
        self._silent = silent
        self._named: set[int] = set()
        self._pool = ThreadPoolExecutor(thread_name_prefix="decode")

    def decode(
        self, product_ids: Sequence[int], blobs: Sequence[bytes | None]
    ) -> list[Image.Image | None]:
        """Return the K images in RGB, upright and on white; ``None`` where missing or broken.

        The first few products with a broken image are named on standard error.

        Args:
            product_ids: [K], for the messages.
            blobs: [K] contents of JPEG or PNG files, ``None`` where a product has no image.

        Raises:
            BadInputError: of the images seen so far, 20 or more, too many are broken.
        """
        images: list[Image.Image | None] = []
        found = self._pool.map(_decode, blobs)
        for product_id, image in zip(product_ids, found, strict=True):
            images.append(self._count(product_id, image))
        if self.seen >= _ENOUGH:
            self._check_share()
        return images

    def repeat(self, *, broken: bool) -> None:
        """Count an image that was decoded for another product."""
        self.seen += 1
        self.broken += broken

    def check(self) -> None:
        """Say how many images were broken, once all were seen.

        Raises:
            BadInputError: too many were, however few were seen.
        """
        self._check_share()
        if self.broken:
            say(f"{self.broken:,} of {self.seen:,} images are broken and count as missing")

    def _count(self, product_id: int, found: Image.Image | ValueError | None) -> Image.Image | None:
        """Count what `_decode` found, name it if it is broken, return it if it is an image."""
        if found is None:
            return None
        self.seen += 1
        if not isinstance(found, ValueError):
            return found
        self.broken += 1
        if product_id not in self._named and len(self._named) < _NAMED:
            self._named.add(product_id)
            if not self._silent:
                say(f"product {product_id}: its image counts as missing: {found}")
        return None

    def _check_share(self) -> None:
        if self.broken > self.max_share * self.seen:
            named = ", ".join(map(str, sorted(self._named)))
            raise BadInputError(
                f"{self.broken:,} of {self.seen:,} images are broken, more than "
                f"{self.max_share:.0%}; among them those of products {named}"
            )


def _decode(blob: bytes | None) -> Image.Image | ValueError | None:
    try:
        return None if blob is None else decode_image(blob)
    except ValueError as error:
        return error


def decode_image(blob: bytes) -> Image.Image:
    """Return the image that a JPEG or PNG file holds: RGB, upright (EXIF), transparency on white.

    Raises:
        ValueError: the content is empty, truncated, damaged, of another format, or so large that
            Pillow takes it for a decompression bomb.
    """
    if not blob:
        raise ValueError("it is empty")
    try:
        with Image.open(io.BytesIO(blob), formats=_FORMATS) as opened:
            opened.load()
            return _on_white(ImageOps.exif_transpose(opened))
    except Image.UnidentifiedImageError:
        raise ValueError("it is neither JPEG nor PNG") from None
    except Exception as error:  # Pillow raises whatever the damage leads to, and says no closer
        raise ValueError(str(error) or type(error).__name__) from error


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to 8
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (*_WHITE, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def to_pixels(
    images: Sequence[Image.Image], size: int, mean: Sequence[float], std: Sequence[float]
) -> "Tensor":
    """Return [K, 3, S, S] float32: the images padded with white to a square, resized, normalised.

    The whole product stays in sight and keeps its proportions. Resizing is bicubic; values are
    scaled to 0 … 1 before ``mean`` is subtracted and ``std`` divides.

    Args:
        images: [K] in RGB, of any size.
        size: ``S``.
        mean: of red, green and blue.
        std: of red, green and blue.
    """
    import torch

    squares = np.empty((len(images), size, size, 3), np.uint8)

    def fill(place: int) -> None:
        squares[place] = np.asarray(_squared(images[place], size))

    if len(images) < _MANY:
        for place in range(len(images)):
            fill(place)
    else:
        with ThreadPoolExecutor() as pool:
            list(pool.map(fill, range(len(images))))
    pixels = torch.from_numpy(squares).permute(0, 3, 1, 2).contiguous().float().div_(255)
    shift, scale = (torch.tensor(values, dtype=torch.float32) for values in (mean, std))
    return pixels.sub_(shift[:, None, None]).div_(scale[:, None, None])


def _squared(image: Image.Image, size: int) -> Image.Image:
    """Return a square image of side ``S`` with ``image`` in the middle of white.

    It is resized before it is padded: the same but for a pixel at the seam, and a very long image
    makes no huge square.
    """
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (size, size), _WHITE)
    square.paste(image, ((size - width) // 2, (size - height) // 2))
    return square
