"""One training step on several cores.

A step's dense work is a hundred small operations. Sharing each of them between cores makes every
one wait for the slowest core; here each core takes a share of the batch's requests through all of
them, with one thread, and the cores meet once a step. The figures are those of the whole batch.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ranking.encoded import EncodedBatch
from ranking.ranker import Ranker

_CANDIDATE_INPUTS = ("candidate", "product", "history_counts")
_ROWS, _REQUESTS = 128, 16  # padded to multiples of these
_SHARE_ROWS = 4096  # fewer rows pay more for each operation, more fall out of the caches


@dataclass(frozen=True, slots=True)
class _Share:
    """What one core found: its part of the loss, of the parameters' and the inputs' gradients."""

    loss: float
    parameters: tuple[Tensor, ...]
    inputs: dict[str, Tensor]


class ParallelStep:
    """Computes gradients of a ranker with several threads.

    Args:
        ranker: the model.
        threads: number of cores to use.
        bfloat16: multiply matrices in bfloat16.
    """

    def __init__(self, ranker: Ranker, threads: int, *, bfloat16: bool) -> None:
        self._ranker = ranker
        self._parameters = ranker.dense_parameters()
        self._threads = threads
        self._bfloat16 = bfloat16
        self._pool = ThreadPoolExecutor(threads, "step", partial(torch.set_num_threads, 1))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, batch: EncodedBatch) -> float:
        """Set the dense parameters' gradients, update the tables, return the mean log loss."""
        trained = self._ranker.trained_lookups(batch)
        run: Callable[[tuple[int, int]], _Share] = partial(self._share, batch, trained)
        shares = list(self._pool.map(run, batch.edges(self._number_of_shares(batch.rows))))
        for number, parameter in enumerate(self._parameters):
            parameter.grad = torch.stack([s.parameters[number] for s in shares]).sum(0)
        roots = {name: value for name, value in trained.items() if value.requires_grad}
        gradients = [torch.cat([share.inputs[name] for share in shares]) for name in roots]
        torch.autograd.backward(list(roots.values()), gradients)
        return sum(share.loss for share in shares)

    def _number_of_shares(self, rows: int) -> int:
        """Return a multiple of the threads: small shares even out what else the cores do."""
        return self._threads * max(1, round(rows / (self._threads * _SHARE_ROWS)))

    def _share(
        self, batch: EncodedBatch, trained: dict[str, Tensor], edge: tuple[int, int]
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
        loss = losses / max(batch.total_weight(), 1e-9)
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
