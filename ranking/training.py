"""The training loop: batches in a reproducible order, checkpoints, exact resume.

A run is cut into chunks of row groups (`features.batch.RecordFiles`). A checkpoint is written
after a chunk and holds everything that the next chunk depends on, so that a run killed at any
moment continues with the very same batches.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
from ranking.prediction import log_loss, predict
from ranking.ranker import Ranker
from ranking.step import Step, StepInput

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
    """Trains a `Ranker` on request records, on cores of one machine.

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
        self._tables = self._table_optimizers()
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

        A checkpoint that several processes wrote beside the file is taken up too.

        Raises:
            BadInputError: the loss became NaN or infinite, or the checkpoint does not fit.
        """
        keep_freed_memory()
        if checkpoint is not None:
            self._restore(checkpoint)
        # In one thread: an operation shared between cores would wait for the step's own threads.
        with one_thread(), closing(self._gradients()) as gradients:
            self._train(gradients, checkpoint, on_step)
        if self._best:
            copy_into(self._trained_state(), self._best, "best epoch")
        return self.progress

    def predict(self, files: RecordFiles) -> Predictions | None:
        """Score all records; of several processes only the first has the predictions."""
        return predict(self.ranker, self.schema, files)

    def whole_state(self) -> dict[str, Tensor] | None:
        """Return what training changed; of several processes only the first has it."""
        return self.ranker.trained_state()

    # What `ranking.distributed_training` and `ranking.device_training` do in another way.

    def _table_optimizers(self) -> list[tuple[str, Any]]:
        return self.ranker.table_optimizers()

    def _gradients(self) -> Step:
        return ParallelStep(self.ranker, self.config.threads, bfloat16=self._bfloat16)

    def _trained_state(self) -> dict[str, Tensor]:
        """Return what training changes, as far as this process holds it."""
        return self.ranker.trained_state()

    def _is_due(self, saved: float) -> bool:
        """Whether it is time for a checkpoint, the last one having been written at ``saved``."""
        return time.monotonic() - saved > self.config.checkpoint_seconds

    def _validation_loss(self, files: RecordFiles) -> float:
        return log_loss(predict(self.ranker, self.schema, files))

    def _train(
        self,
        gradients: Step,
        checkpoint: Path | None,
        on_step: Callable[[Progress, float], None] | None,
    ) -> None:
        saved = self._clock = time.monotonic()
        while self.progress.epoch < self.config.epochs and not self._got_worse():
            for chunk in self._chunks():
                self._train_chunk(gradients, chunk, on_step)
                if checkpoint and self._is_due(saved):
                    self._save(checkpoint)
                    saved = time.monotonic()
            self._end_epoch()
            if checkpoint:
                self._save(checkpoint)

    def _chunks(self) -> Iterator[Iterable[StepInput]]:
        """Yield the steps of the epoch's chunks from the current one on."""
        for chunk in self._read():
            yield (
                StepInput(batch=batch, rows=batch.rows, weight=batch.total_weight())
                for batch in chunk.split(self.config.batch_rows)
            )

    def _read(self) -> Iterator[EncodedBatch]:
        """Yield the epoch's chunks from the current one on, made ahead by a worker thread."""
        seed, epoch, first = self.config.seed, self.progress.epoch, self.progress.chunk

        def encode(numbered: tuple[int, pa.Table]) -> EncodedBatch:
            chunk, records = numbered
            encoded = self.ranker.encode(RequestBatch.from_records(records, self.schema))
            order = request_order(len(records), seed=seed, epoch=epoch, chunk=chunk)
            return encoded.reorder(torch.from_numpy(order))

        tables = self.files.chunks(
            self.config.chunk_groups,
            seed=seed,
            epoch=epoch,
            skip=first,
            leave_out=self._not_read(),
        )
        return prefetch(enumerate(tables, first), encode)

    def _not_read(self) -> tuple[str, ...]:
        """Return the columns that the model does not read."""
        reads_history = self.ranker.config.embedding_tower and self.ranker.config.purchase_history
        return () if reads_history else (columns.PURCHASE_HISTORY,)

    def _train_chunk(
        self,
        gradients: Step,
        chunk: Iterable[StepInput],
        on_step: Callable[[Progress, float], None] | None,
    ) -> None:
        progress = self.progress
        total, rows = 0.0, 0
        losses = gradients.behind(self._losses(gradients, gradients.ahead(chunk)))
        for number, (step_rows, loss) in enumerate(losses):
            if not math.isfinite(loss):
                raise BadInputError(
                    f"the loss became {loss} in epoch {progress.epoch + 1}, chunk "
                    f"{progress.chunk + 1}, batch {number + 1} (step {progress.step}): lower the "
                    "learning rates or look for extreme values in the dense features"
                )
            progress.step += 1
            progress.rows += step_rows
            now = time.monotonic()
            progress.seconds += now - self._clock
            self._clock = now
            total += loss * step_rows
            rows += step_rows
            if rows >= self.total_rows / _LOSS_POINTS:
                progress.losses.append((progress.rows, total / rows))
                total, rows = 0.0, 0
            if on_step:
                on_step(progress, loss)
        progress.chunk += 1
        if rows:
            progress.losses.append((progress.rows, total / rows))

    def _losses(self, gradients: Step, chunk: Iterable[StepInput]) -> Iterator[tuple[int, Any]]:
        """Do the steps of a chunk; yields the rows of each and its loss, as the step gives it."""
        done = self.progress.rows
        for step in chunk:
            self._set_rates(done / max(self.total_rows, 1))
            yield step.rows, self._step(gradients, step)
            done += step.rows

    def _step(self, gradients: Step, step: StepInput) -> Any:
        loss = gradients(step.batch, step.weight)
        self._adam.step()
        return loss

    def _factor(self, done: float) -> float:
        """Return what rates are multiplied by at the share ``done``: linear warm-up, cosine."""
        warmup = self.config.warmup
        if done < warmup:
            return (done + 1e-3) / (warmup + 1e-3)
        return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup + 1e-9)))

    def _set_rates(self, done: float) -> None:
        """Set the learning rates at the share ``done`` of the run."""
        factor = self._factor(done)
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
        loss = self._validation_loss(self.validation)
        if loss < min(progress.validation, default=math.inf):
            state = self._trained_state()
            self._best = {k: v.to("cpu", copy=True) for k, v in state.items()}
        progress.validation.append(loss)

    def _momenta(self) -> dict[str, Tensor]:
        """Return what the tables' optimisers keep, as far as this process holds it."""
        return {
            f"{name}/{parameter}/{key}": value
            for name, optimizer in self._tables
            for parameter, values in optimizer.state_dict()["state"].items()
            for key, value in values.items()
        }

    def _state(self) -> dict[str, dict[str, Tensor]]:
        adam = {
            f"{number}/{key}": value
            for number, values in self._adam.state_dict()["state"].items()
            for key, value in values.items()
        }
        return {"model": self._trained_state(), "adam": adam, "tables": self._momenta()}

    def _save(self, path: Path) -> None:
        sections = self._state() | {"best": self._best}
        tensors = {f"{s}/{n}": t.cpu() for s, part in sections.items() for n, t in part.items()}
        self._write(path, tensors, asdict(self.progress))

    def _write(self, path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        save_state(path, tensors, header)
        if len(list(path.parent.iterdir())) > 1:  # others that several processes wrote
            from ranking.sharded_checkpoint import remove_others

            remove_others(path, path)

    def _load(self, path: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]] | None:
        """Return the newest checkpoint, its tensors and its header; None where there is none."""
        if {found.name for found in path.parent.glob("*")} <= {path.name}:
            return (path, *load_state(path)) if path.exists() else None
        from ranking.sharded_checkpoint import newest, read_any

        found = newest(path)
        return (found, *read_any(found, {})) if found is not None else None

    def _restore(self, path: Path) -> None:
        loaded = self._load(path)
        if loaded is None:
            return
        path, tensors, header = loaded
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
