"""The training loop: batches in a reproducible order, checkpoints, exact resume.

A run is cut into chunks of row groups (`features.batch.RecordFiles`). A checkpoint is written
after a chunk and holds everything that the next chunk depends on, so that a run killed at any
moment continues with the very same batches.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from features import columns
from features.batch import RecordFiles, RequestBatch, prefetch, request_order
from features.checkpoint import copy_into, load_state, save_state
from features.errors import BadInputError
from features.hardware import fast_precision, keep_freed_memory
from features.schema import DatasetSchema
from ranking.config import TrainingConfig
from ranking.encoded import EncodedBatch
from ranking.metrics import Predictions
from ranking.parallel import ParallelStep
from ranking.ranker import Ranker

EVALUATION_ROWS = 1 << 14
_LOSS_POINTS = 100
_SECTIONS = ("model", "adam", "tables", "best")


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a run is; saved with each checkpoint.

    Attributes:
        epoch: the current epoch, from 0.
        chunk: chunks of it that are done.
        step: optimiser steps so far.
        rows: candidates trained on so far.
        seconds: time spent in training, reading included, over all resumed parts.
        losses: (rows so far, mean log loss since the last entry).
        validation: log loss of the validation week after each epoch.
    """

    epoch: int = 0
    chunk: int = 0
    step: int = 0
    rows: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)


class Trainer:
    """Trains a `Ranker` on request records.

    Args:
        ranker: the model; changed in place.
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
        self.ranker = ranker
        self.schema = schema
        self.files = files
        self.config = config
        self.validation = validation
        self.progress = Progress()
        self.total_rows = total_rows * config.epochs
        self._tables = ranker.table_optimizers()
        self._peaks = {
            name: config.table_learning_rate
            if name.startswith("pretrained")
            else config.sparse_learning_rate
            for name, _ in self._tables
        }
        matrices = [p for p in ranker.dense_parameters() if p.dim() > 1]
        vectors = [p for p in ranker.dense_parameters() if p.dim() <= 1]
        self._adam = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            fused=True,
        )
        self._best: dict[str, Tensor] = {}
        self._clock = 0.0
        precision = fast_precision() if config.precision == "auto" else config.precision
        self._bfloat16 = precision == "bfloat16"

    def run(
        self,
        checkpoint: Path | None = None,
        on_step: Callable[[Progress, float], None] | None = None,
    ) -> Progress:
        """Train to the end, from the checkpoint where there is one.

        Args:
            checkpoint: file that holds the run's state between chunks.
            on_step: called with the progress and the loss of the batch after each step.

        Raises:
            BadInputError: the loss became NaN or infinite, or the checkpoint does not fit.
        """
        keep_freed_memory()
        if checkpoint is not None and checkpoint.exists():
            self._restore(checkpoint)
        step = ParallelStep(self.ranker, self.config.threads, bfloat16=self._bfloat16)
        # In one thread: an operation shared between cores would wait for the step's own threads.
        with one_thread(), closing(step) as gradients:
            self._train(gradients, checkpoint, on_step)
        if self._best:
            copy_into(self.ranker.trained_state(), self._best, "best epoch")
        return self.progress

    def _train(
        self,
        gradients: ParallelStep,
        checkpoint: Path | None,
        on_step: Callable[[Progress, float], None] | None,
    ) -> None:
        saved = self._clock = time.monotonic()
        while self.progress.epoch < self.config.epochs and not self._got_worse():
            for chunk in self._chunks():
                self._train_chunk(gradients, chunk, on_step)
                if checkpoint and time.monotonic() - saved > self.config.checkpoint_seconds:
                    self._save(checkpoint)
                    saved = time.monotonic()
            self._end_epoch()
            if checkpoint:
                self._save(checkpoint)

    def _chunks(self) -> Iterator[EncodedBatch]:
        """Yield the epoch's chunks from the current one on, made ahead by a worker thread."""
        seed, epoch, first = self.config.seed, self.progress.epoch, self.progress.chunk

        def encode(numbered: tuple[int, pa.Table]) -> EncodedBatch:
            chunk, records = numbered
            encoded = self.ranker.encode(RequestBatch.from_records(records, self.schema))
            order = request_order(len(records), seed=seed, epoch=epoch, chunk=chunk)
            return encoded.reorder(torch.from_numpy(order))

        reads_history = self.ranker.config.embedding_tower and self.ranker.config.purchase_history
        tables = self.files.chunks(
            self.config.chunk_groups,
            seed=seed,
            epoch=epoch,
            skip=first,
            leave_out=() if reads_history else (columns.PURCHASE_HISTORY,),
        )
        return prefetch(enumerate(tables, first), encode)

    def _train_chunk(
        self,
        gradients: ParallelStep,
        chunk: EncodedBatch,
        on_step: Callable[[Progress, float], None] | None,
    ) -> None:
        progress = self.progress
        total, rows = 0.0, 0
        for number, batch in enumerate(chunk.split(self.config.batch_rows)):
            loss = self._step(gradients, batch)
            if not math.isfinite(loss):
                raise BadInputError(
                    f"the loss became {loss} in epoch {progress.epoch + 1}, chunk "
                    f"{progress.chunk + 1}, batch {number + 1} (step {progress.step}): lower the "
                    "learning rates or look for extreme values in the dense features"
                )
            progress.step += 1
            progress.rows += len(batch.clicked)
            now = time.monotonic()
            progress.seconds += now - self._clock
            self._clock = now
            total += loss * len(batch.clicked)
            rows += len(batch.clicked)
            if rows >= self.total_rows / _LOSS_POINTS:
                progress.losses.append((progress.rows, total / rows))
                total, rows = 0.0, 0
            if on_step:
                on_step(progress, loss)
        progress.chunk += 1
        if rows:
            progress.losses.append((progress.rows, total / rows))

    def _step(self, gradients: ParallelStep, batch: EncodedBatch) -> float:
        self._set_rates(self.progress.rows / max(self.total_rows, 1))
        loss = gradients(batch)
        self._adam.step()
        return loss

    def _set_rates(self, done: float) -> None:
        """Set the learning rates at the share ``done`` of the run: linear warm-up, then cosine."""
        warmup = self.config.warmup
        if done < warmup:
            factor = (done + 1e-3) / (warmup + 1e-3)
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup + 1e-9)))
        for group in self._adam.param_groups:
            group["lr"] = self.config.learning_rate * factor
        for name, optimizer in self._tables:
            for group in optimizer.param_groups:
                group["lr"] = self._peaks[name] * factor
            optimizer.step()  # hands the rate to the fused lookup; it updates no weight

    def _got_worse(self) -> bool:
        """Whether the last epoch's validation loss is no better than an earlier one's."""
        losses = self.progress.validation
        return len(losses) > 1 and losses[-1] >= min(losses[:-1])

    def _end_epoch(self) -> None:
        progress = self.progress
        progress.epoch += 1
        progress.chunk = 0
        if self.validation is None:
            return
        predictions = predict(self.ranker, self.schema, self.validation)
        p = np.clip(predictions.probability, 1e-7, 1 - 1e-7)
        loss = -np.where(predictions.clicked, np.log(p), np.log1p(-p)).mean()
        if loss < min(progress.validation, default=math.inf):
            self._best = {k: v.clone() for k, v in self.ranker.trained_state().items()}
        progress.validation.append(float(loss))

    def _state(self) -> dict[str, dict[str, Tensor]]:
        tables = {}
        for name, optimizer in self._tables:
            for parameter, values in optimizer.state_dict()["state"].items():
                for key, value in values.items():
                    tables[f"{name}/{parameter}/{key}"] = value
        adam = {}
        for number, values in self._adam.state_dict()["state"].items():
            for key, value in values.items():
                adam[f"{number}/{key}"] = value
        return {"model": self.ranker.trained_state(), "adam": adam, "tables": tables}

    def _save(self, path: Path) -> None:
        sections = self._state() | {"best": self._best}
        tensors = {f"{s}/{n}": t for s, part in sections.items() for n, t in part.items()}
        save_state(path, tensors, asdict(self.progress))

    def _restore(self, path: Path) -> None:
        tensors, header = load_state(path)
        saved: dict[str, dict[str, Tensor]] = {section: {} for section in _SECTIONS}
        for name, tensor in tensors.items():
            section, _, rest = name.partition("/")
            saved[section][rest] = tensor
        current = self._state()
        copy_into(current["model"], saved["model"], str(path))
        copy_into(current["tables"], saved["tables"], str(path))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in saved["adam"].items():
            number, _, key = name.partition("/")
            state.setdefault(int(number), {})[key] = tensor
        groups = self._adam.state_dict()["param_groups"]
        self._adam.load_state_dict({"state": state, "param_groups": groups})
        self._best = saved["best"]
        header["losses"] = [tuple(entry) for entry in header["losses"]]
        self.progress = Progress(**header)


@torch.no_grad()
def predict(
    ranker: Ranker,
    schema: DatasetSchema,
    files: RecordFiles,
    on_rows: Callable[[int], None] | None = None,
) -> Predictions:
    """Score all records, in the order of the files.

    Args:
        ranker: the model.
        schema: of the records.
        files: request records with labels.
        on_rows: called with the number of candidates of each batch scored.
    """

    def encode(table: Any) -> tuple[RequestBatch, EncodedBatch]:
        raw = RequestBatch.from_records(table, schema)
        return raw, ranker.encode(raw)

    scores, clicked, lengths, history = [], [], [], []
    for raw, chunk in prefetch(files.chunks(16), encode):
        for batch in chunk.split(EVALUATION_ROWS):
            scores.append(torch.sigmoid(ranker(batch)).numpy())
            if on_rows:
                on_rows(len(scores[-1]))
        clicked.append(raw.clicked.numpy() > 0)
        lengths.append(raw.lengths.numpy())
        history.append(raw.history_lengths.numpy() > 0)
    return Predictions(
        clicked=np.concatenate(clicked),
        probability=np.concatenate(scores),
        lengths=np.concatenate(lengths),
        with_history=np.concatenate(history),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch's operations in this thread use one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw initial weights from ``seed`` and leave torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
