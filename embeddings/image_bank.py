"""Every image of a training run, by catalog row, as the first trainable layer takes it.

What a frozen trunk or frozen layers say of an image is computed once and kept (in float16) as long
as it fits into memory. Otherwise the files are spooled into one memory-mapped file, to be decoded
when they are asked for.

Legend: ``N`` images asked for, ``L`` places of an image, ``C`` channels.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from embeddings.catalog import Catalog
from embeddings.dashclip import DashClip
from embeddings.image_trunk import TrunkEmbeddings
from embeddings.images import ImageFaults, decode_image, to_pixels
from features.console import progress_bar
from features.files import atomic_file

_BATCH = 32


class ImageBank:
    """The readable images of a catalog.

    Args:
        catalog: whose images.
        model: the encoders, in evaluation mode as far as they are frozen.
        depth: image layers that are frozen.
        room: bytes that kept features may take.
        faults: counts the images that cannot be read; they are missing from then on.
        spool: file for the images where features are not kept.
        bfloat16: whether frozen layers compute in bfloat16.

    Attributes:
        has_image: [catalog rows] bool.
        bytes: memory that the features take.
        depth: as given.
        layer: the first layer that `states` leaves to run.
        frozen: whether `states` are the same throughout a stage.

    Raises:
        BadInputError: too many images are broken.
    """

    def __init__(
        self,
        catalog: Catalog,
        model: DashClip,
        *,
        depth: int,
        room: float,
        faults: ImageFaults,
        spool: Path,
        bfloat16: bool,
    ) -> None:
        assert model.vision_model is not None
        self._model = model
        self._bfloat16 = bfloat16
        self.depth = depth
        trunk = isinstance(model.vision_model.embeddings, TrunkEmbeddings)
        self.layer = 0 if trunk else depth
        self.frozen = trunk or depth > 0
        size = model.config.vision_config.image_size
        one = self._frozen(torch.zeros(1, 3, size, size, device=model.device))
        self.bytes = len(catalog) * one.numel() * 2
        self._features: Tensor | None = None
        self._files: pa.ChunkedArray | None = None
        self._ready: dict[int, Future[Tensor]] = {}
        self._pool = ThreadPoolExecutor(torch.get_num_threads(), "images")
        if self.frozen and self.bytes <= room:
            place = self._keep(catalog, faults)
        else:
            self.bytes = 0
            place = self._spool(catalog, faults, spool)
        faults.check()
        self._place = place
        self.has_image = place >= 0

    def states(self, rows: Tensor, model: DashClip | None = None) -> Tensor:
        """Return ``[N, L, C]``, what `DashClip.run_image` takes from `layer` on.

        Args:
            rows: ``[N]`` catalog rows, all with an image.
            model: whose patches to take where nothing is frozen; the bank's own where None.
        """
        places = self._place[rows]
        assert bool((places >= 0).all()), "a row without an image"
        if self._features is not None:
            return self._features[places.to(self._features.device)].float()
        self.prepare(rows)
        pixels = torch.stack([self._ready[place].result() for place in places.tolist()])
        for place in places.unique().tolist():
            del self._ready[place]
        return self._frozen(pixels.to(self._model.device), model)

    def prepare(self, rows: Tensor) -> None:
        """Begin to read the images of some rows, for `states` to find them ready.

        Rows without an image are passed over, and nothing is to be done where features are kept.
        """
        if self._features is None:
            for place in self._place[rows].unique().tolist():
                if place >= 0 and place not in self._ready:
                    self._ready[place] = self._pool.submit(self._read, place)

    def _read(self, place: int) -> Tensor:
        """Return the ``[3, S, S]`` pixels of an image of the spool."""
        assert self._files is not None
        config = self._model.config
        size = config.vision_config.image_size
        image = decode_image(self._files[place].as_py())
        return to_pixels([image], size, config.image_mean, config.image_std)[0]

    def _pixels(self, images: Sequence[Image.Image]) -> Tensor:
        config = self._model.config
        size = config.vision_config.image_size
        return to_pixels(images, size, config.image_mean, config.image_std).to(self._model.device)

    def _frozen(self, pixels: Tensor, model: DashClip | None = None) -> Tensor:
        """Return what precedes the first trainable layer, without gradient where it is frozen."""
        model, kind = model or self._model, self._model.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self._bfloat16):
            if not self.layer:  # a trunk has no gradient by itself, BLIP's patches are trained
                return model.embed_image(pixels).float()
            with torch.no_grad():
                return model.run_image(model.embed_image(pixels), last=self.layer).float()

    def _keep(self, catalog: Catalog, faults: ImageFaults) -> Tensor:
        """Compute all features; returns the place of each catalog row among them, -1 for none."""
        place, parts, kept = torch.full((len(catalog),), -1), [], 0
        with torch.no_grad():
            for rows, images, _ in _readable(catalog, faults):
                place[rows] = torch.arange(kept, kept + len(rows))
                kept += len(rows)
                parts += [
                    self._frozen(self._pixels(images[i : i + _BATCH])).half()
                    for i in range(0, len(images), _BATCH)
                ]
        if parts:
            self._features = torch.cat(parts)
        return place

    def _spool(self, catalog: Catalog, faults: ImageFaults, path: Path) -> Tensor:
        """Copy the readable files into one Arrow file, mapped into memory."""
        place, kept = torch.full((len(catalog),), -1), 0
        schema = pa.schema([("image", pa.binary())])
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as scratch, pa.ipc.new_file(str(scratch), schema) as file:
            for rows, _, blobs in _readable(catalog, faults):
                place[rows] = torch.arange(kept, kept + len(rows))
                kept += len(rows)
                file.write_batch(pa.record_batch([pa.array(blobs, pa.binary())], schema=schema))
        self._files = pa.ipc.open_file(pa.memory_map(str(path))).read_all().column(0)
        return place


def _readable(
    catalog: Catalog, faults: ImageFaults
) -> Iterator[tuple[Tensor, list[Image.Image], list[bytes]]]:
    """Yield the catalog rows, the images and their files, of those that can be read."""
    with progress_bar() as bar:
        task = bar.add_task("reading images", total=len(catalog))
        start = 0
        for ids, _, blobs in catalog.with_images():
            decoded = faults.decode(ids, blobs)
            found = [row for row, image in enumerate(decoded) if image is not None]
            if found:
                rows = torch.tensor(found) + start
                images = [image for image in decoded if image is not None]
                yield rows, images, [blob for row in found if (blob := blobs[row]) is not None]
            start += len(ids)
            bar.update(task, advance=len(ids))
