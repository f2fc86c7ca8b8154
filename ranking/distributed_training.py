"""The training loop in several processes: the batches, the steps and the figures of one.

A chunk holds the same requests in the same order as in one process, and is cut into the same
batches. Each process reads some of its row groups and takes, of every batch, the requests that it
read; the gradients of all parts are summed as those of one batch::

    row groups of a chunk      A     B     C     D       process 0 reads A and C, 1 reads B and D
    its requests, shuffled     b2 a1 c7 | d3 a5 b1 | …   batches of one process
    process 0                     a1 c7 |    a5    | …
    process 1                  b2       | d3    b1 | …

Legend: ``B`` requests of a chunk, ``b`` those of this process.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from features.batch import ChunkShare, RecordFiles, RequestBatch, prefetch, request_order
from features.schema import DatasetSchema
from ranking.config import TrainingConfig
from ranking.device import training_device, training_precision
from ranking.device_model import move_ranker
from ranking.device_step import DeviceStep
from ranking.distributed import (
    begin_sum,
    from_first,
    gather_to_first,
    greatest,
    own_threads,
    rank,
    reading_group,
    world,
)
from ranking.distributed_frozen import FrozenShards
from ranking.distributed_tables import Piece, SpreadTraining
from ranking.encoded import EncodedBatch, edges, number_of_batches, offsets
from ranking.metrics import Predictions
from ranking.parallel import ParallelStep
from ranking.prediction import EVALUATION_GROUPS, EVALUATION_ROWS, log_loss, score
from ranking.ranker import Ranker
from ranking.sharded_checkpoint import gather_whole, newest, read_any, save_sharded
from ranking.step import Step, StepInput
from ranking.training import Trainer


class DistributedTrainer(Trainer):
    """Trains a `Ranker` in all processes of the group as `Trainer` does in one.

    The model's tables are spread over the processes as soon as it is made; see
    `ranking.distributed_tables` and `ranking.distributed_frozen`.

    Args:
        ranker: the model, the same in every process; changed in place.
        schema: of the records.
        files: training records.
        total_rows: candidates in them, which fix the number of steps.
        config: how to train.
        validation: records of the validation week, or None.
    """

    def __init__(
        self,
        ranker: Ranker,
        schema: DatasetSchema,
        files: RecordFiles,
        total_rows: int,
        config: TrainingConfig,
        validation: RecordFiles | None = None,
    ) -> None:
        self._device = training_device(config.device)
        self.spread = SpreadTraining(ranker, config.batch_rows, self._device)
        move_ranker(ranker, self._device)
        self.frozen = FrozenShards(ranker)
        super().__init__(ranker, schema, files, total_rows, config, validation)
        self._bfloat16 = training_precision(config.precision, self._device) == "bfloat16"
        for name, _ in self.spread.copied:
            self._peaks[name] = config.sparse_learning_rate

    def predict(self, files: RecordFiles) -> Predictions | None:
        """Score all records, each in one process; the first gets the predictions in order."""
        part = _predict_share(self.ranker, self.schema, self.frozen, files)
        parts = gather_to_first(part)
        return _in_order(parts) if parts else None

    def whole_state(self) -> dict[str, Tensor] | None:
        """Return what training changed, by the names of one ranker, in the first process."""
        return gather_whole(self._trained_state(), self.spread.weights)

    def _table_optimizers(self) -> list[tuple[str, Any]]:
        return self.spread.fused

    def _gradients(self) -> Step:
        if self._device.type == "cuda":
            return DeviceStep(
                self.ranker,
                self._device,
                bfloat16=self._bfloat16,
                look_up=lambda batch: self.ranker.frozen_lookups(self.frozen.localize(batch)),
                begin_sum=begin_sum,
            )
        return ParallelStep(
            self.ranker,
            own_threads(self.config.threads),
            bfloat16=self._bfloat16,
            begin_sum=begin_sum,
        )

    def _trained_state(self) -> dict[str, Tensor]:
        tables = {name: piece.rows for name, piece in self.spread.weights.items()}
        return self.ranker.trained_state() | tables

    def _momenta(self) -> dict[str, Tensor]:
        return {name: piece.rows for name, piece in self.spread.momenta.items()}

    def _is_due(self, saved: float) -> bool:
        return from_first(lambda: super(DistributedTrainer, self)._is_due(saved))

    def _validation_loss(self, files: RecordFiles) -> float:
        predictions = self.predict(files)
        return from_first(lambda: log_loss(predictions) if predictions else 0.0)

    def _set_rates(self, done: float) -> None:
        super()._set_rates(done)
        for name, optimizer in self.spread.copied:
            for group in optimizer.param_groups:
                group["lr"] = self._peaks[name] * self._factor(done)

    def _step(self, gradients: Step, step: StepInput) -> Any:
        loss = super()._step(gradients, step)
        self.spread.step()
        return loss

    # Checkpoints.

    def _pieces(self) -> dict[str, Piece]:
        pieces = {f"tables/{name}": piece for name, piece in self.spread.momenta.items()}
        for section in ("model", "best"):
            pieces |= {f"{section}/{name}": piece for name, piece in self.spread.weights.items()}
        return pieces

    def _write(self, path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        save_sharded(path, tensors, self._pieces(), header)

    def _load(self, path: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]] | None:
        found = from_first(lambda: newest(path))
        return (found, *read_any(found, self._pieces())) if found is not None else None

    # Batches.

    def _chunks(self) -> Iterator[Iterable[StepInput]]:
        seed, epoch, first = self.config.seed, self.progress.epoch, self.progress.chunk

        def encode(numbered: tuple[int, ChunkShare]) -> tuple[EncodedBatch, "_Chunk"]:
            number, share = numbered
            raw = RequestBatch.from_records(share.records, self.schema)
            order = request_order(len(share.owner), seed=seed, epoch=epoch, chunk=number)
            chunk = _Chunk.plan(raw, share.owner, order)
            encoded = self.ranker.encode(raw)
            return encoded.reorder(torch.from_numpy(chunk.own_order)), chunk

        shares = self.files.shares(
            self.config.chunk_groups,
            rank=rank(),
            world=world(),
            seed=seed,
            epoch=epoch,
            skip=first,
            leave_out=self._not_read(),
        )
        for encoded, chunk in prefetch(enumerate(shares, first), encode):
            yield self._steps(encoded, chunk)

    def _steps(self, encoded: EncodedBatch, chunk: "_Chunk") -> Iterator[StepInput]:
        for first, last in chunk.batches(self.config.batch_rows):
            part = encoded.select(*np.searchsorted(chunk.own_places, (first, last)).tolist())
            lengths = chunk.lengths[first:last]
            yield StepInput(
                batch=part if self._device.type == "cuda" else self.frozen.localize(part),
                rows=int(lengths.sum()),
                weight=float(chunk.weight[first:last] @ lengths.float()),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """A shuffled chunk of B requests, b of which this process reads.

    Attributes:
        lengths: [B] int64, candidates of each request.
        weight: [B] float32, what each counts in the loss.
        own_places: [b] int64, where in the chunk this process's requests stand, ascending.
        own_order: [b] int64, which of the requests that it read stands there.
    """

    lengths: Tensor
    weight: Tensor
    own_places: np.ndarray
    own_order: np.ndarray

    @classmethod
    def plan(cls, own: RequestBatch, owner: np.ndarray, order: np.ndarray) -> "_Chunk":
        """Agree with the other processes on a chunk; called by the thread that reads.

        Args:
            own: what this process read.
            owner: [B] int64, of each request, as they are stored, the process that reads it.
            order: [B] int64, the order of the requests.
        """
        parts: list[Any] = [None] * world()
        sizes = (own.lengths.numpy(), own.weight.numpy())
        dist.all_gather_object(parts, sizes, group=reading_group())
        lengths, weight = np.zeros(len(owner), np.int64), np.zeros(len(owner), np.float32)
        for number, (its_lengths, its_weight) in enumerate(parts):
            lengths[owner == number], weight[owner == number] = its_lengths, its_weight
        is_own = owner == rank()
        place_among_own = np.cumsum(is_own) - 1
        own_places = np.flatnonzero(is_own[order])
        return cls(
            lengths=torch.from_numpy(lengths[order]),
            weight=torch.from_numpy(weight[order]),
            own_places=own_places,
            own_order=place_among_own[order[own_places]],
        )

    def batches(self, batch_rows: int) -> list[tuple[int, int]]:
        """Return the ranges of requests that one process would take as its batches."""
        candidate_offsets = offsets(self.lengths)
        return edges(candidate_offsets, number_of_batches(int(candidate_offsets[-1]), batch_rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """What one process scored: `Predictions`, and the place of each request among all."""

    places: np.ndarray
    clicked: np.ndarray
    probability: np.ndarray
    lengths: np.ndarray
    with_history: np.ndarray


@torch.no_grad()
def _predict_share(
    ranker: Ranker, schema: DatasetSchema, frozen: FrozenShards, files: RecordFiles
) -> _Scored:
    """Score the records that fall to this process; all must call it at the same time."""

    def encode(share: ChunkShare) -> tuple[ChunkShare, RequestBatch, EncodedBatch]:
        raw = RequestBatch.from_records(share.records, schema)
        return share, raw, ranker.encode(raw)

    begin = 0
    scores: list[np.ndarray] = [np.zeros(0, np.float32)]
    found: dict[str, list[np.ndarray]] = {
        name: [np.zeros(0, kind)]
        for name, kind in (
            ("places", np.int64),
            ("clicked", bool),
            ("lengths", np.int64),
            ("with_history", bool),
        )
    }
    shares = files.shares(EVALUATION_GROUPS, rank=rank(), world=world())
    for share, raw, chunk in prefetch(shares, encode):
        batches = list(chunk.split(EVALUATION_ROWS))
        # Tables are looked up together: a process that is through goes on with empty batches.
        batches += [chunk.select(0, 0)] * (greatest(len(batches)) - len(batches))
        scores += [score(ranker, frozen.localize(batch.to(ranker.device))) for batch in batches]
        found["places"].append(begin + np.flatnonzero(share.owner == rank()))
        found["clicked"].append(raw.clicked.numpy() > 0)
        found["lengths"].append(raw.lengths.numpy())
        found["with_history"].append(raw.history_lengths.numpy() > 0)
        begin += len(share.owner)
    joined = {name: np.concatenate(parts) for name, parts in found.items()}
    return _Scored(probability=np.concatenate(scores), **joined)


def _in_order(parts: list[_Scored]) -> Predictions:
    """Return the predictions of all records, in the order of the files."""
    places = np.concatenate([part.places for part in parts])
    order = np.argsort(places)
    assert np.array_equal(places[order], np.arange(len(places))), "every request exactly once"
    lengths = np.concatenate([part.lengths for part in parts])
    begins = np.cumsum(lengths) - lengths
    ordered = lengths[order]
    within = np.arange(ordered.sum()) - np.repeat(np.cumsum(ordered) - ordered, ordered)
    rows = np.repeat(begins[order], ordered) + within
    return Predictions(
        clicked=np.concatenate([part.clicked for part in parts])[rows],
        probability=np.concatenate([part.probability for part in parts])[rows],
        lengths=ordered,
        with_history=np.concatenate([part.with_history for part in parts])[order],
    )
