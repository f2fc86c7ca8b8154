"""Momentum encoders and the queues of their embeddings (ALBEF, Section 3.2; BLIP alike).

Legend: ``B`` rows of a batch, ``Q`` rows of a queue, ``D`` embedding dimension.
"""

import copy

import torch
from torch import Tensor

from embeddings.dashclip import DashClip


class MomentumEncoders:
    """A slowly moving copy of the encoders.

    Args:
        model: the encoders that are trained.
        momentum: share of the copy that each update keeps.
    """

    def __init__(self, model: DashClip, momentum: float) -> None:
        self.momentum = momentum
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        slow = dict(self.model.named_parameters())
        self._pairs = [(slow[name], parameter) for name, parameter in trained.items()]
        self._names = list(trained)

    @torch.no_grad()
    def update(self) -> None:
        """Move the copy towards the trained encoders."""
        slow = [pair[0] for pair in self._pairs]
        torch._foreach_lerp_(slow, [pair[1] for pair in self._pairs], 1 - self.momentum)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that differ from the trained model's."""
        return {name: slow for name, (slow, _) in zip(self._names, self._pairs, strict=True)}


class Queue:
    """Ring of the latest embeddings, with the key that tells whose they are.

    Args:
        size: ``Q``; 0 for no queue.
        dim: ``D``.
        device: where it lies.
    """

    def __init__(self, size: int, dim: int, device: torch.device) -> None:
        self.image = torch.zeros(size, dim, device=device)
        self.text = torch.zeros(size, dim, device=device)
        self.key = torch.full((size,), -1, dtype=torch.long, device=device)
        self.position = torch.zeros(2, dtype=torch.long)  # next row to write, rows filled

    def filled(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the ``[<= Q, D]`` images, ``[<= Q, D]`` texts and keys that are there."""
        count = int(self.position[1])
        return self.image[:count], self.text[:count], self.key[:count]

    @torch.no_grad()
    def push(self, image: Tensor, text: Tensor, key: Tensor) -> None:
        """Add ``[B, D]`` images and texts, over the oldest where the ring is full."""
        size = len(self.key)
        count = min(len(key), size)
        if not count:
            return
        start = int(self.position[0])
        rows = (torch.arange(count, device=self.key.device) + start) % size
        self.image[rows], self.text[rows] = image[-count:].float(), text[-count:].float()
        self.key[rows] = key[-count:]
        self.position[0] = (start + count) % size
        self.position[1] = min(size, int(self.position[1]) + count)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of the queue."""
        names = ("image", "text", "key", "position")
        return {name: getattr(self, name) for name in names}
