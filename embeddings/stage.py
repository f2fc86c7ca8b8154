"""The loop that both stages of DashCLIP's training share: steps, checkpoints, exact resume.

A stage says what its batches are, what their loss is and how good the model is after an epoch; the
loop steps, in one process or in several that torchrun started. Whatever a step draws at random is
seeded by stage, epoch and step, so that a run that was killed goes on as if it had not been.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from embeddings import distributed
from embeddings.config import StageConfig
from embeddings.dashclip import DashClip
from features.checkpoint import copy_into, load_state, save_state
from features.errors import BadInputError

Batch = tuple[np.ndarray, ...]

_LOSS_POINTS = 100


class Stage(Protocol):
    """What the loop asks of a stage.

    Attributes:
        name: of its figures.
        config: how it steps.
        examples: examples of an epoch.
    """

    name: str
    examples: int

    @property
    def config(self) -> StageConfig: ...  # noqa: D102

    def batches(self, epoch: int, size: int) -> Iterator[Batch]:
        """Yield the whole batches of an epoch: arrays of ``size`` rows each."""
        ...

    def prepare(self, batch: Batch) -> None:
        """Begin to read what the loss of a batch will need, while another one is computed."""
        ...

    def loss(self, batch: Batch, *, epoch: float, seed: int) -> tuple[Tensor, dict[str, float]]:
        """Return this process's part of the loss of a batch, and figures to show.

        The parts of all processes sum to the mean over the batch.
        """
        ...

    def after_step(self) -> None:
        """Do what follows an optimiser step."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Return the figures of the model as it is; by ``"score"``, the lowest, one is kept."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a resumed run needs besides the model's."""
        ...


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a stage is; saved with each checkpoint.

    Attributes:
        epoch: the current epoch, from 0.
        step: optimiser steps of it that are done.
        examples: examples trained on so far.
        seconds: time in training, over all resumed parts.
        losses: (examples so far, mean loss since the last entry).
        unnoted: loss of each step since then.
        evaluations: figures before training and after each epoch.
        best: the epoch (0: before training) whose model is kept.
        done: whether the stage has ended.
    """

    epoch: int = 0
    step: int = 0
    examples: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    unnoted: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    best: int = 0
    done: bool = False


class StageLoop:
    """Trains one stage.

    Args:
        stage: what to train.
        model: the encoders; changed in place.
        checkpoint: file of the run's state.
        seconds: time between two checkpoints.
        patience: evaluations without a better score before the stage ends; 0 for all epochs and
            the last model.
        bfloat16: whether matrix products are in bfloat16.
        seed: of everything that steps draw.
    """

    def __init__(
        self,
        stage: Stage,
        model: DashClip,
        *,
        checkpoint: Path,
        seconds: float,
        patience: int,
        bfloat16: bool,
        seed: int,
    ) -> None:
        self.stage = stage
        self.model = model
        self.checkpoint = checkpoint
        self.progress = Progress()
        self._seconds = seconds
        self._patience = patience
        self._bfloat16 = bfloat16
        self._seed = seed
        config = stage.config
        unit = config.accumulate * distributed.world()
        if config.batch % unit:
            raise BadInputError(
                f"{stage.name}: a batch of {config.batch} does not divide into {unit} equal parts "
                f"({config.accumulate} to accumulate times {distributed.world()} processes)"
            )
        self.batch = min(config.batch, stage.examples) // unit * unit
        if not self.batch:
            raise BadInputError(
                f"{stage.name}: {stage.examples} examples are fewer than the {unit} parts of a "
                "batch (parts to accumulate times processes)"
            )
        examples = min(stage.examples, config.limit) if config.limit else stage.examples
        self.steps = max(1, examples // self.batch)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in named]
        self._parameters: list[nn.Parameter] = [parameter for _, parameter in named]
        self._adam = torch.optim.AdamW(
            [
                {
                    "params": [p for p in self._parameters if p.dim() > 1],
                    "weight_decay": config.weight_decay,
                },
                {"params": [p for p in self._parameters if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
        )
        for parameter in self._parameters:  # so that a checkpoint has what it restores into
            self._adam.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._best: dict[str, Tensor] = {}

    @property
    def total(self) -> int:
        """Examples of all epochs."""
        return self.steps * self.batch * self.stage.config.epochs

    def run(
        self,
        on_step: Callable[[Progress, dict[str, float]], None] | None = None,
        on_evaluation: Callable[[int, dict[str, float]], None] | None = None,
    ) -> Progress:
        """Train to the end, from the checkpoint where there is one of this stage.

        Args:
            on_step: called after each step with the progress and the step's figures.
            on_evaluation: called after each evaluation with the epochs done and what it gave.

        Raises:
            BadInputError: the loss became NaN or infinite, or the checkpoint does not fit.
        """
        progress = self.progress
        if self.checkpoint.exists():
            self._restore()
        if not progress.evaluations:
            self._evaluate(on_evaluation)
        saved = time.monotonic()
        while progress.epoch < self.stage.config.epochs and not self._stale():
            first = progress.step
            batches = self.stage.batches(progress.epoch, self.batch)
            clock = time.monotonic()
            ahead = self._ahead(islice(batches, first, self.steps))
            for number, batch in enumerate(ahead, first):
                figures = self._step(batch, number)
                progress.step = number + 1
                progress.examples += self.batch
                clock, before = time.monotonic(), clock
                progress.seconds += clock - before
                self._note(figures["loss"])
                if on_step:
                    on_step(progress, figures)
                if time.monotonic() - saved > self._seconds:
                    self._save()
                    saved = time.monotonic()
            progress.epoch, progress.step = progress.epoch + 1, 0
            self._evaluate(on_evaluation)
            self._save()
        if self._best:
            copy_into(self._model_state(), self._best, "best epoch")
        progress.done = True
        return progress

    def _ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches, the next one being prepared meanwhile."""
        waiting: Batch | None = None
        for batch in batches:
            for part in self._parts(batch):
                self.stage.prepare(part)
            if waiting is not None:
                yield waiting
            waiting = batch
        if waiting is not None:
            yield waiting

    def _step(self, batch: Batch, number: int) -> dict[str, float]:
        """Take one optimiser step on a batch, part by part."""
        config, epoch = self.stage.config, self.progress.epoch
        self._set_training()
        figures: dict[str, float] = {}
        self._adam.zero_grad(set_to_none=True)
        for part, rows in enumerate(self._parts(batch)):
            seed = self._seed_of(epoch, number, part)
            torch.manual_seed(seed + distributed.rank())
            with self._autocast():
                loss, found = self.stage.loss(rows, epoch=epoch + number / self.steps, seed=seed)
            (loss / config.accumulate).backward()
            for name, value in found.items():
                figures[name] = figures.get(name, 0.0) + value / config.accumulate
        if not math.isfinite(figures["loss"]):
            raise BadInputError(
                f"{self.stage.name}: the loss became {figures['loss']} in epoch {epoch + 1}, step "
                f"{number + 1}: lower the learning rate"
            )
        distributed.sum_gradients(self._parameters)
        nn.utils.clip_grad_norm_(self._parameters, config.clip)
        for group in self._adam.param_groups:
            group["lr"] = config.learning_rate * self._rate(epoch * self.steps + number)
        self._adam.step()
        self.stage.after_step()
        return figures

    def _parts(self, batch: Batch) -> list[Batch]:
        """Return the parts of a batch whose gradients are accumulated."""
        share = self.batch // self.stage.config.accumulate
        starts = range(0, self.batch, share)
        return [tuple(array[start : start + share] for array in batch) for start in starts]

    def _rate(self, step: int) -> float:
        """Share of the peak learning rate: a linear warm-up, then a cosine to 0."""
        total = self.steps * self.stage.config.epochs
        warmup = max(1, round(total * self.stage.config.warmup))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    def _note(self, loss: float) -> None:
        """Take a step's loss into the curve, which has about a hundred points."""
        progress = self.progress
        progress.unnoted.append(loss)
        every = max(1, self.steps * self.stage.config.epochs // _LOSS_POINTS)
        if len(progress.unnoted) == every or progress.examples == self.total:
            mean = sum(progress.unnoted) / len(progress.unnoted)
            progress.losses.append((progress.examples, mean))
            progress.unnoted.clear()

    def _evaluate(self, on_evaluation: Callable[[int, dict[str, float]], None] | None) -> None:
        self.model.eval()
        with torch.no_grad(), self._autocast():
            figures = self.stage.evaluate()
        self.progress.evaluations.append(figures)
        if on_evaluation:
            on_evaluation(self.progress.epoch, figures)
        scores = [entry.get("score", math.inf) for entry in self.progress.evaluations]
        # The untrained model is never the one to keep: its matching head knows nothing.
        if self._patience and len(scores) > 1 and scores[-1] <= min(scores[1:]):
            self.progress.best = len(scores) - 1
            self._best = {name: t.detach().clone() for name, t in self._model_state().items()}

    def _stale(self) -> bool:
        """Whether the last evaluations brought no better score."""
        if not self._patience or len(self.progress.evaluations) < 2:
            return False
        return self.progress.epoch - self.progress.best >= self._patience

    def _set_training(self) -> None:
        """Switch to training, what is frozen aside: it must say the same each time."""
        self.model.train()
        for module in self.model.modules():
            own = list(module.parameters())
            if own and not any(parameter.requires_grad for parameter in own):
                module.eval()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self._bfloat16)

    def _seed_of(self, *numbers: int) -> int:
        entropy = (self._seed, *self.stage.name.encode(), *numbers)
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint32)[0])

    def _model_state(self) -> dict[str, Tensor]:
        return dict(zip(self._names, self._parameters, strict=True))

    def _state(self) -> dict[str, Tensor]:
        state = {f"model/{name}": value for name, value in self._model_state().items()}
        state |= {f"stage/{name}": value for name, value in self.stage.state().items()}
        for name, parameter in self._model_state().items():
            for key, value in self._adam.state[parameter].items():
                state[f"adam/{name}/{key}"] = value
        return state

    def _save(self) -> None:
        """Write a checkpoint: the first process does, by its own clock; no other waits for it."""
        if distributed.rank() == 0:
            best = {f"best/{name}": value for name, value in self._best.items()}
            header = {"stage": self.stage.name, "progress": asdict(self.progress)}
            save_state(self.checkpoint, self._state() | best, header)

    def _restore(self) -> None:
        tensors, header = load_state(self.checkpoint)
        if header.get("stage") != self.stage.name:
            return
        best = {name[5:]: tensors.pop(name) for name in list(tensors) if name.startswith("best/")}
        copy_into(self._state(), tensors, str(self.checkpoint))
        for name, value in header["progress"].items():
            setattr(self.progress, name, value)
        self.progress.losses = [(examples, loss) for examples, loss in self.progress.losses]
        device = self.model.device
        self._best = {name: tensor.to(device) for name, tensor in best.items()}


def describe(evaluation: dict[str, Any]) -> str:
    """Return an evaluation's figures as one phrase."""
    return ", ".join(
        f"{k.replace('_', ' ')} {v:.4f}" for k, v in evaluation.items() if k != "score"
    )
