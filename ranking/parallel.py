"""One training step on several cores.

A step's dense work is a hundred small operations. Sharing each of them between cores makes every
one wait for the slowest core; here each core takes a share of the batch's requests through all of
them, with one thread, and the cores meet once a step. The figures are those of the whole batch.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranking.encoded import EncodedBatch
from ranking.ranker import Ranker
from ranking.step import StepInput

_CANDIDATE_INPUTS = ("candidate", "product", "history_counts")
_ROWS, _REQUESTS = 128, 16  # padded to multiples of these
_SHARE_ROWS = 4096  # fewer rows pay more for each operation, more fall out of the caches


@dataclass(frozen=True, slots=True)
class _Share:
    """What one core found: its part of the loss, of the parameters' and the inputs' gradients."""

    loss: float
    parameters: tuple[Tensor, ...]
    inputs: dict[str, Tensor]


# Begins to sum the parameters' gradients and the loss over processes; what it returns ends it.
BeginSum = Callable[[list[nn.Parameter], float], Callable[[], float]]


class ParallelStep:
    """Computes gradients of a ranker with several threads.

    Args:
        ranker: the model.
        threads: number of cores to use.
        bfloat16: multiply matrices in bfloat16.
        begin_sum: where each of several processes has a part of the batch: begins to sum the
            dense parameters' gradients, and returns what ends it and gives the sum of the losses.
    """

    def __init__(
        self,
        ranker: Ranker,
        threads: int,
        *,
        bfloat16: bool,
        begin_sum: BeginSum | None = None,
    ) -> None:
        self._ranker = ranker
        self._parameters = ranker.dense_parameters()
        self._threads = threads
        self._bfloat16 = bfloat16
        self._begin_sum = begin_sum
        self._pool = ThreadPoolExecutor(threads, "step", partial(torch.set_num_threads, 1))

    def ahead(self, steps: Iterable[StepInput]) -> Iterator[StepInput]:
        """Yield the steps as they are: their batches lie where they are computed."""
        return iter(steps)

    def behind(self, losses: Iterator[tuple[int, float]]) -> Iterator[tuple[int, float]]:
        """Yield (rows, loss) of each step as they are: they are numbers already."""
        return losses

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, batch: EncodedBatch, weight: float | None = None) -> float:
        """Set the dense parameters' gradients, update the tables, return the mean log loss.

        Args:
            batch: of several processes, this one's part; it may be empty.
            weight: what all parts together count in the loss; that of ``batch`` where None.
        """
        weight = max(batch.total_weight() if weight is None else weight, 1e-9)
        trained = self._ranker.trained_lookups(batch)
        run: Callable[[tuple[int, int]], _Share] = partial(self._share, batch, weight, trained)
        shares = list(self._pool.map(run, batch.edges(self._number_of_shares(batch.rows))))
        for number, parameter in enumerate(self._parameters):
            found = [share.parameters[number] for share in shares]
            parameter.grad = torch.stack(found or [torch.zeros_like(parameter)]).sum(0)
        loss = sum(share.loss for share in shares)
        end_sum = self._begin_sum(self._parameters, loss) if self._begin_sum else None
        roots = {name: value for name, value in trained.items() if value.requires_grad}
        gradients = [
            torch.cat([share.inputs[name] for share in shares] or [torch.zeros_like(value)])
            for name, value in roots.items()
        ]
        torch.autograd.backward(list(roots.values()), gradients)
        return end_sum() if end_sum else loss

    def _number_of_shares(self, rows: int) -> int:
        """Return a multiple of the threads: small shares even out what else the cores do."""
        return self._threads * max(1, round(rows / (self._threads * _SHARE_ROWS)))

    def _share(
        self, batch: EncodedBatch, weight: float, trained: dict[str, Tensor], edge: tuple[int, int]
    ) -> _Share:
        part = batch.select(*edge)
        ranges = {name: batch.candidates(*edge) for name in _CANDIDATE_INPUTS}
        leaves = {
            name: _padded(value.detach()[ranges.get(name, slice(*edge))], name).requires_grad_()
            for name, value in trained.items()
        }
        frozen = {n: _padded(value, n) for n, value in self._ranker.frozen_lookups(part).items()}
        request_c = part.request_of_candidate()
        request_c = F.pad(request_c, (0, -part.rows % _ROWS), value=len(leaves["request"]) - 1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._bfloat16):
            logits = self._ranker.dense(leaves | frozen, request_c)[: part.rows]
        weight_c = part.weight.index_select(0, request_c[: part.rows])
        losses = F.binary_cross_entropy_with_logits(
            logits.float(), part.clicked, weight_c, reduction="sum"
        )
        loss = losses / weight
        found = torch.autograd.grad(loss, [*self._parameters, *leaves.values()])
        count = len(self._parameters)
        inputs = {
            name: gradient[: part.rows if name in _CANDIDATE_INPUTS else len(part.query)]
            for name, gradient in zip(leaves, found[count:], strict=True)
        }
        return _Share(loss.item(), found[:count], inputs)


def _padded(value: Tensor, name: str) -> Tensor:
    """Return ``value`` [N, F] with rows of zeros up to one of few sizes.

    oneDNN compiles a matrix product for each new shape, at the cost of the product itself, and
    batches of whole requests would all have another one.
    """
    step = _ROWS if name in _CANDIDATE_INPUTS else _REQUESTS
    return F.pad(value, (0, 0, 0, -len(value) % step))
