"""Stage 1: continual pre-training on images and titles (paper, Section 3.2.1).

Image-text contrast (ITC) with momentum encoders, queues and soft labels, and image-text matching
(ITM) with hard negatives drawn by similarity, as in ALBEF (Section 3) and BLIP.

Legend: ``B`` products of a batch over all processes, ``b`` those of this process, ``M`` keys of the
contrast, ``D`` embedding dimension, ``L`` image tokens, ``H`` hidden size.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from embeddings import distributed
from embeddings.config import PretrainingConfig
from embeddings.dashclip import DashClip
from embeddings.image_bank import ImageBank
from embeddings.losses import contrast, hard_negatives, similarities, soft_targets
from embeddings.momentum import MomentumEncoders, Queue
from embeddings.products import Products
from embeddings.retrieval import recall_at_k_pairs
from embeddings.stage import Batch

_LOWEST_TEMPERATURE = math.log(0.001)  # as ALBEF and BLIP clamp it
_HIGHEST_TEMPERATURE = math.log(0.5)
_EVALUATION_BATCH = 64


class _Views(NamedTuple):
    """What the encoders make of some products.

    Attributes:
        image_tokens: ``[b, L, H]``.
        image: ``[b, D]`` unit vectors.
        text: ``[b, D]`` unit vectors.
    """

    image_tokens: Tensor
    image: Tensor
    text: Tensor


class Pretraining:
    """Stage 1 on the products that have both an image and a title; the others are masked.

    Args:
        model: the encoders.
        config: of the stage.
        products: titles and images.
        train: catalog rows to train on.
        held_out: catalog rows to evaluate on; their titles are not among those of ``train``.
        seed: of the order.
    """

    name = "stage 1"

    def __init__(
        self,
        model: DashClip,
        config: PretrainingConfig,
        products: Products,
        train: np.ndarray,
        held_out: np.ndarray,
        *,
        seed: int,
    ) -> None:
        assert products.images is not None
        self.model = model
        self.config = config
        self.examples = len(train)
        self._products = products
        self._images: ImageBank = products.images
        self._train = train
        self._held_out = held_out
        self._seed = seed
        self._slow = MomentumEncoders(model, config.momentum) if config.momentum else None
        size = min(config.queue, max(0, len(train) - config.batch)) if config.momentum else 0
        self._queue = Queue(size, model.config.projection_dim, model.device)

    def batches(self, epoch: int, size: int) -> Iterator[Batch]:
        """Yield catalog rows in an order of the epoch's own."""
        rows = np.random.default_rng((self._seed, 1, epoch)).permutation(self._train)
        for start in range(0, len(rows) - size + 1, size):
            yield (rows[start : start + size],)

    def prepare(self, batch: Batch) -> None:
        """Begin to read this process's images of a batch."""
        rows = torch.from_numpy(batch[0])[distributed.own_slice(len(batch[0]))]
        self._images.prepare(rows[self._usable(rows)])

    def loss(self, batch: Batch, *, epoch: float, seed: int) -> tuple[Tensor, dict[str, float]]:
        """Return this process's part of ITC + ITM; see `embeddings.stage.Stage`.

        Products without an image or without a title take no part; a batch of nothing else has a
        loss of 0.
        """
        rows = torch.from_numpy(batch[0])
        usable = self._usable(rows)
        own = distributed.own_slice(len(rows))
        mine = rows[own][usable[own]]
        count = max(1, int(usable.sum()))
        if distributed.world() > 1 and not bool(usable.all()):
            raise AssertionError("several processes train on whole pairs only")
        if not len(mine):
            return self._nothing()
        pictures = self._images.states(mine)
        views = self._views(self.model, mine, pictures)
        everyone = rows[usable]
        keys = self._products.title_of[everyone].to(self.model.device)
        image_all, text_all = distributed.gather(views.image), distributed.gather(views.text)
        temperature = self.model.log_temperature.exp()
        slow = None
        if self._slow is not None:
            with torch.no_grad():
                if not self._images.frozen:
                    pictures = self._images.states(mine, self._slow.model)
                slow = self._views(self._slow.model, mine, pictures)
        itc = self._contrast(views, slow, image_all, text_all, mine, keys, temperature, epoch)
        loss = itc.sum() / count
        figures = {"itc": float(distributed.total(loss.detach()))}
        if self.config.matching:
            similarity = (similarities(views.image, text_all) / temperature).detach()
            reverse = (similarities(views.text, image_all) / temperature).detach()
            tokens = distributed.gather(views.image_tokens)
            noise = torch.rand(2, len(everyone), len(everyone), generator=_generator(seed))
            noise = noise[:, own] if len(mine) < len(everyone) else noise
            itm = self._matching(views, mine, everyone, tokens, similarity, reverse, noise)
            loss = loss + itm.sum() / (3 * count)
            figures["itm"] = float(distributed.total(itm.detach().sum() / (3 * count)))
        figures["loss"] = float(distributed.total(loss.detach()))
        return loss, figures

    def after_step(self) -> None:
        """Move the momentum encoders and keep the temperature within its bounds."""
        with torch.no_grad():
            self.model.log_temperature.clamp_(_LOWEST_TEMPERATURE, _HIGHEST_TEMPERATURE)
        if self._slow is not None:
            self._slow.update()

    def evaluate(self) -> dict[str, float]:
        """Return recall@10 between images and titles, and the matching loss that is stopped on."""
        rows = torch.from_numpy(self._held_out)
        if not len(rows):
            return {}
        image, text, itm = [], [], []
        keys = self._products.title_of[rows].to(self.model.device)
        for part in rows.split(_EVALUATION_BATCH):
            views = self._views(self.model, part, self._images.states(part))
            image.append(views.image)
            text.append(views.text)
            noise = torch.rand(2, len(part), len(part), generator=_generator(0))
            close = similarities(views.image, views.text) / self.model.log_temperature.exp()
            tokens = views.image_tokens
            itm.append(self._matching(views, part, part, tokens, close, close.t(), noise))
        images, texts = (torch.cat(part).float().cpu().numpy() for part in (image, text))
        groups = keys.cpu().numpy()
        loss = float(torch.cat(itm).mean())
        return {
            "score": loss,
            "itm_loss": loss,
            "image_to_title_recall_at_10": recall_at_k_pairs(images, texts, 10, groups),
            "title_to_image_recall_at_10": recall_at_k_pairs(texts, images, 10, groups),
        }

    def state(self) -> dict[str, Tensor]:
        """Return the momentum encoders and the queue."""
        slow = self._slow.state() if self._slow is not None else {}
        state = {f"momentum/{name}": tensor for name, tensor in slow.items()}
        if len(self._queue.key):
            state |= {f"queue/{name}": tensor for name, tensor in self._queue.state().items()}
        return state

    def _usable(self, rows: Tensor) -> Tensor:
        return self._images.has_image[rows] & (self._products.title_of[rows] >= 0)

    def _nothing(self) -> tuple[Tensor, dict[str, float]]:
        zero = sum(
            (p.sum() * 0 for p in self.model.parameters() if p.requires_grad), torch.zeros(())
        )
        return zero, {"loss": 0.0}

    def _views(self, model: DashClip, rows: Tensor, pictures: Tensor) -> _Views:
        """Encode products whose images are given as the first trainable layer takes them."""
        tokens = model.run_image(pictures, first=self._images.layer)
        pooled = self._products.titles.pooled(self._products.title_of[rows], model)
        return _Views(tokens, model.image_embedding(tokens), model.title_embedding(pooled))

    def _contrast(
        self,
        views: _Views,
        slow: _Views | None,
        image_all: Tensor,
        text_all: Tensor,
        mine: Tensor,
        keys: Tensor,
        temperature: Tensor,
        epoch: float,
    ) -> Tensor:
        """Return the ``[b]`` losses of image to text and text to image, halved (ITC)."""
        own = self._products.title_of[mine].to(keys.device)
        if slow is None:  # the batch itself gives the keys
            same = own[:, None] == keys[None, :]
            targets = soft_targets(torch.zeros(same.shape, device=keys.device), same, 0.0)
            forward = contrast(similarities(views.image, text_all) / temperature, targets)
            return (
                forward + contrast(similarities(views.text, image_all) / temperature, targets)
            ) / 2
        alpha = self.config.alpha * min(1.0, epoch / max(self.config.alpha_epochs, 1e-9))
        with torch.no_grad():
            slow_image, slow_text = distributed.gather(slow.image), distributed.gather(slow.text)
            queued_image, queued_text, queued_key = self._queue.filled()
            key_image = torch.cat([slow_image, queued_image])
            key_text = torch.cat([slow_text, queued_text])
            same = own[:, None] == torch.cat([keys, queued_key])[None, :]
            to_text = soft_targets(similarities(slow.image, key_text) / temperature, same, alpha)
            to_image = soft_targets(similarities(slow.text, key_image) / temperature, same, alpha)
        forward = contrast(similarities(views.image, key_text) / temperature, to_text)
        backward = contrast(similarities(views.text, key_image) / temperature, to_image)
        self._queue.push(slow_image, slow_text, keys)
        return (forward + backward) / 2

    def _matching(
        self,
        views: _Views,
        mine: Tensor,
        everyone: Tensor,
        tokens_all: Tensor,
        image_to_text: Tensor,
        text_to_image: Tensor,
        noise: Tensor,
    ) -> Tensor:
        """Return the losses of pairs, of pairs with another image, and with another text (ITM).

        Rows without any negative in the batch are left out.
        """
        noise = noise.to(tokens_all.device)
        keys = self._products.title_of.to(tokens_all.device)
        same = keys[mine][:, None] == keys[everyone][None, :]
        other_image, found = hard_negatives(text_to_image, same, noise[0])
        other_text, _ = hard_negatives(image_to_text, same, noise[1])
        kept = found.nonzero().squeeze(1)
        texts = torch.cat([mine, mine[kept.cpu()], everyone[other_text[kept].cpu()]])
        tokens = torch.cat(
            [views.image_tokens, tokens_all[other_image[kept]], views.image_tokens[kept]]
        )
        pooled = self._products.grounded(self.model, texts, tokens)
        target = torch.zeros(len(texts), dtype=torch.long, device=pooled.device)
        target[: len(mine)] = 1
        return F.cross_entropy(self.model.match_logits(pooled), target, reduction="none")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
