"""One training step on a GPU: every operation is enqueued, none is waited for."""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranking.device_input import DeviceBatch, DeviceInput, LookUp, read_behind
from ranking.encoded import EncodedBatch
from ranking.ranker import Ranker
from ranking.step import StepInput

# Begins to sum the parameters' gradients and the loss over processes; what it returns ends it.
BeginSum = Callable[[list[nn.Parameter], Tensor], Callable[[], Tensor]]


class DeviceStep:
    """Computes gradients of a ranker on the device that it was moved to.

    Args:
        ranker: the model.
        device: where it is.
        bfloat16: multiply matrices in bfloat16; weights, sums and everything else stay float32.
        look_up: what frozen tables give, where the ranker alone does not know.
        begin_sum: where each of several processes has a part of the batch: begins to sum the
            dense parameters' gradients, and returns what ends it and gives the sum of the losses.
    """

    def __init__(
        self,
        ranker: Ranker,
        device: torch.device,
        *,
        bfloat16: bool,
        look_up: LookUp | None = None,
        begin_sum: BeginSum | None = None,
    ) -> None:
        self._ranker = ranker
        self._parameters = ranker.dense_parameters()
        self._device = device
        self._bfloat16 = bfloat16
        self._look_up = look_up or ranker.frozen_lookups
        self._begin_sum = begin_sum
        self._input = DeviceInput(device, self._look_up)

    def ahead(self, steps: Iterable[StepInput]) -> Iterator[StepInput]:
        """Yield the steps with their batches on the device, each brought one step ahead."""
        return self._input(steps)

    def behind(self, losses: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, float]]:
        """Yield the losses as numbers, each some steps later."""
        return read_behind(losses)

    def close(self) -> None:
        """Let the device end what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def __call__(self, batch: EncodedBatch, weight: float | None = None) -> Tensor:
        """Set the dense parameters' gradients, update the tables, return the mean log loss.

        Args:
            batch: on the device; of several processes, this one's part, which may be empty.
            weight: what all parts together count in the loss; that of ``batch`` where None.

        Returns:
            A number on the device.
        """
        weight = max(batch.total_weight() if weight is None else weight, 1e-9)
        frozen = batch.frozen if isinstance(batch, DeviceBatch) else self._look_up(batch)
        trained = self._ranker.trained_lookups(batch)
        leaves = {name: value.detach().requires_grad_() for name, value in trained.items()}
        loss = self._loss(batch, leaves | frozen) / weight
        count = len(self._parameters)
        found = torch.autograd.grad(loss, [*self._parameters, *leaves.values()])
        for parameter, gradient in zip(self._parameters, found[:count], strict=True):
            parameter.grad = gradient
        end_sum = self._begin_sum(self._parameters, loss.detach()) if self._begin_sum else None
        pairs = zip(trained.values(), found[count:], strict=True)
        updated = [(value, gradient) for value, gradient in pairs if value.requires_grad]
        torch.autograd.backward([value for value, _ in updated], [grad for _, grad in updated])
        return end_sum() if end_sum else loss.detach()

    def _loss(self, batch: EncodedBatch, inputs: dict[str, Tensor]) -> Tensor:
        request_c = batch.request_of_candidate()
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bfloat16):
            logits = self._ranker.dense(inputs, request_c)
        weight_c = batch.weight.index_select(0, request_c)
        return F.binary_cross_entropy_with_logits(
            logits.float(), batch.clicked, weight_c, reduction="sum"
        )
