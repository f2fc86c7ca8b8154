"""Batches in rows and scaled values: what the trained part of the ranker reads.

Legend: ``B`` requests, ``C`` candidates of all of them, ``H`` purchases of all histories, ``S``
sparse features (binned ones included) and ``D`` dense features of one level.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from ranking.versions import check_versions

check_versions()

import fbgemm_gpu  # noqa: E402, F401 (registers the operators)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedBatch:
    """A `RequestBatch` in rows and scaled values: what the trained part of the ranker reads.

    Attributes:
        request_rows: [S, B] int64 rows of the trainable request tables.
        request_dense: [B, D] float32.
        candidate_rows: [S, C] int64.
        candidate_dense: [C, D] float32.
        candidate_offsets: [B + 1] int64, where each request's candidates begin.
        query: [B] int64 rows of the query table.
        history: [H] int64 rows of the product table.
        history_age: [H] float32, days between each purchase and the request.
        history_offsets: [B + 1] int64.
        product: [C] int64 rows of the product table.
        clicked: [C] float32; empty where unknown.
        weight: [B] float32, what each request counts in the loss.
    """

    request_rows: Tensor
    request_dense: Tensor
    candidate_rows: Tensor
    candidate_dense: Tensor
    candidate_offsets: Tensor
    query: Tensor
    history: Tensor
    history_age: Tensor
    history_offsets: Tensor
    product: Tensor
    clicked: Tensor
    weight: Tensor

    @property
    def rows(self) -> int:
        """C."""
        return self.candidate_dense.shape[0]

    def to(self, device: torch.device) -> "EncodedBatch":
        """Return the batch on a device, itself where it is there; a GPU is not waited for."""
        if self.weight.device == device:
            return self
        values = {field.name: getattr(self, field.name) for field in fields(EncodedBatch)}
        return EncodedBatch(**{name: _copy(value, device) for name, value in values.items()})

    def total_weight(self) -> float:
        """Return what all candidates together count in the loss."""
        return float(self.weight @ self.candidate_offsets.diff().float())

    def request_of_candidate(self) -> Tensor:
        """Return [C] int64: the request that each candidate belongs to."""
        return torch.repeat_interleave(self.candidate_offsets.diff(), output_size=self.rows)

    def edges(self, parts: int) -> list[tuple[int, int]]:
        """Return ranges of whole requests that share the candidates as evenly as they can.

        There are at most ``parts`` of them, none without a request.
        """
        return edges(self.candidate_offsets, parts)

    def split(self, batch_rows: int) -> Iterator["EncodedBatch"]:
        """Yield batches of whole requests of about ``batch_rows`` candidates."""
        for first, last in self.edges(number_of_batches(self.rows, batch_rows)):
            yield self.select(first, last)

    def reorder(self, order: Tensor) -> "EncodedBatch":
        """Return the requests in another order ([B] int64), each with its candidates."""
        turn = order.int()
        lengths, history_lengths = self.candidate_offsets.diff(), self.history_offsets.diff()
        positions = _permute(turn, lengths, torch.arange(self.rows))
        return EncodedBatch(
            request_rows=self.request_rows.index_select(1, order),
            request_dense=self.request_dense.index_select(0, order),
            candidate_rows=self.candidate_rows.index_select(1, positions),
            candidate_dense=self.candidate_dense.index_select(0, positions),
            candidate_offsets=offsets(lengths.index_select(0, order)),
            query=self.query.index_select(0, order),
            history=_permute(turn, history_lengths, self.history),
            history_age=_permute(turn, history_lengths, self.history_age),
            history_offsets=offsets(history_lengths.index_select(0, order)),
            product=self.product.index_select(0, positions) if len(self.product) else self.product,
            clicked=self.clicked.index_select(0, positions) if len(self.clicked) else self.clicked,
            weight=self.weight.index_select(0, order),
        )

    def candidates(self, first: int, last: int) -> slice:
        """Return the range of the candidates of the requests from ``first`` up to ``last``."""
        return slice(int(self.candidate_offsets[first]), int(self.candidate_offsets[last]))

    def select(self, first: int, last: int) -> "EncodedBatch":
        """Return the requests from ``first`` up to ``last``, as views."""
        candidates = self.candidates(first, last)
        items = slice(int(self.history_offsets[first]), int(self.history_offsets[last]))
        return EncodedBatch(
            request_rows=self.request_rows[:, first:last],
            request_dense=self.request_dense[first:last],
            candidate_rows=self.candidate_rows[:, candidates],
            candidate_dense=self.candidate_dense[candidates],
            candidate_offsets=self.candidate_offsets[first : last + 1] - candidates.start,
            query=self.query[first:last],
            history=self.history[items],
            history_age=self.history_age[items],
            history_offsets=self.history_offsets[first : last + 1] - items.start,
            product=self.product[candidates],
            clicked=self.clicked[candidates],
            weight=self.weight[first:last],
        )


def _copy(values: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and not values.is_cuda:  # only from pinned memory it copies unattended
        values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values)
    return values.to(device, non_blocking=True)


def offsets(lengths: Tensor) -> Tensor:
    """Return [N + 1] int64: where each of N lists of these lengths begins, and the end."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def edges(candidate_offsets: Tensor, parts: int) -> list[tuple[int, int]]:
    """Return ranges of whole requests, given where each one's candidates begin ([B + 1] int64).

    They share the candidates as evenly as they can; there are at most ``parts`` of them, none
    without a request.
    """
    targets = torch.arange(1, parts) * int(candidate_offsets[-1]) // parts
    cuts = torch.searchsorted(candidate_offsets, targets).tolist()
    pairs = pairwise([0, *cuts, len(candidate_offsets) - 1])
    return [(first, last) for first, last in pairs if last > first]


def number_of_batches(rows: int, batch_rows: int) -> int:
    """Return into how many batches of about ``batch_rows`` candidates a chunk of ``rows`` goes."""
    return max(1, round(rows / batch_rows))


def _permute(order: Tensor, lengths: Tensor, values: Tensor) -> Tensor:
    """Return the lists of these lengths, laid end to end, in another order ([B] int32)."""
    if values.numel() == 0:
        return values
    found = torch.ops.fbgemm.permute_1D_sparse_data(order, lengths.int(), values, None, None)
    return found[1]
