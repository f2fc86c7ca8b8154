"""What a GPU trains on, brought to it while it computes the step before.

::

    copying stream     batch 1 | lookups 1 | batch 2 | lookups 2 | batch 3 | …
    computing stream                       | step 1              | step 2  | …
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from ranking.encoded import EncodedBatch
from ranking.step import StepInput

LookUp = Callable[[EncodedBatch], dict[str, Tensor]]
Given = TypeVar("Given")

_BEHIND = 16  # steps whose losses a GPU may owe


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBatch(EncodedBatch):
    """A batch on a device, with what its frozen tables give.

    Attributes:
        frozen: see `Ranker.frozen_lookups`.
    """

    frozen: dict[str, Tensor]

    @classmethod
    def of(cls, batch: EncodedBatch, frozen: dict[str, Tensor]) -> "DeviceBatch":
        """Return ``batch`` with ``frozen``."""
        values = {field.name: getattr(batch, field.name) for field in fields(EncodedBatch)}
        return cls(frozen=frozen, **values)

    def tensors(self) -> Iterator[Tensor]:
        """Yield all that it holds."""
        yield from (getattr(self, field.name) for field in fields(EncodedBatch))
        yield from self.frozen.values()


class DeviceInput:
    """Brings batches to a device, and looks up there what needs no gradient, one step ahead.

    On a GPU this has a stream of its own, so that copies and lookups run while the step before is
    computed. On the CPU each batch comes when it is asked for.

    Args:
        device: where the steps are computed.
        look_up: returns what frozen tables give for a batch on the device.
    """

    def __init__(self, device: torch.device, look_up: LookUp) -> None:
        self._device = device
        self._look_up = look_up
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, steps: Iterable[StepInput]) -> Iterator[StepInput]:
        """Yield the steps with a `DeviceBatch` each."""
        if self._stream is None:
            return (replace(step, batch=self._bring(step.batch)) for step in steps)
        # The tables may have been written, at the start or by a checkpoint, by the other stream.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return (self._arrived(*sent) for sent in one_ahead(map(self._send, steps)))

    @torch.no_grad()
    def _bring(self, batch: EncodedBatch) -> DeviceBatch:
        there = batch.to(self._device)
        return DeviceBatch.of(there, self._look_up(there))

    def _send(self, step: StepInput) -> tuple[StepInput, DeviceBatch, torch.cuda.Event]:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            batch = self._bring(step.batch)
        return step, batch, self._stream.record_event()

    def _arrived(self, step: StepInput, batch: DeviceBatch, event: torch.cuda.Event) -> StepInput:
        """Let the stream that computes wait for a batch, and its memory for that stream."""
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(event)
        for tensor in batch.tensors():
            tensor.record_stream(computing)
        return replace(step, batch=batch)


def one_ahead(items: Iterable[Given]) -> Iterator[Given]:
    """Yield each item once the next one has been taken."""
    waiting: list[Given] = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting


def read_behind(
    losses: Iterable[tuple[int, Tensor]], most: int = _BEHIND
) -> Iterator[tuple[int, float]]:
    """Yield losses as numbers, each once ``most`` later ones are under way.

    To read a number off a GPU at once is to wait until it has nothing left to do.
    """
    owed: deque[tuple[int, _Sent]] = deque()
    for rows, loss in losses:
        owed.append((rows, _Sent(loss)))
        if len(owed) > most:
            rows_before, sent = owed.popleft()
            yield rows_before, sent.read()
    for rows_before, sent in owed:
        yield rows_before, sent.read()


class _Sent:
    """A number on its way from a device."""

    def __init__(self, number: Tensor) -> None:
        self._number = number.detach().to("cpu", non_blocking=True)
        self._event = None
        if number.is_cuda:
            self._event = torch.cuda.current_stream(number.device).record_event()

    def read(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        return self._number.item()
