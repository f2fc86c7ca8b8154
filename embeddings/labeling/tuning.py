"""What graders that are fine-tuned here share: targets, the loop, and its figures."""

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embeddings.config import StageConfig
from embeddings.labeling.agreement import label_counts
from embeddings.labeling.config import CausalConfig, CrossEncoderConfig
from embeddings.labeling.fine_tuned_folder import CHECKPOINT
from embeddings.labeling.judgements import Judgements
from embeddings.stage import Batch, Progress, Stage, StageLoop, describe
from features.console import say
from features.monitor import Monitor

_CHECKPOINT_SECONDS = 300.0


def targets(judgements: Judgements) -> np.ndarray:
    """Return [P, 3] float32: the share of a pair's judgements that are each label."""
    counts = label_counts(judgements).astype(np.float32)
    return counts / counts.sum(1, keepdims=True)


class LabelStage:
    """What stages that learn human labels share of what `embeddings.stage.StageLoop` asks for.

    Args:
        config: of the training.
        training: pairs to learn.
        validation: pairs that choose the epoch.
        weight_decay: of AdamW, on matrices.
    """

    name = "fine-tuning"

    def __init__(
        self,
        config: CrossEncoderConfig | CausalConfig,
        training: Judgements,
        validation: Judgements,
        *,
        weight_decay: float,
    ) -> None:
        self.config = StageConfig(
            epochs=config.epochs,
            batch=config.batch,
            learning_rate=config.learning_rate,
            warmup=config.warmup,
            weight_decay=weight_decay,
        )
        self.seed = config.seed
        self.examples = len(training)
        self.targets = targets(training)
        self.validation = validation
        self.validation_targets = torch.from_numpy(targets(validation))

    def prepare(self, batch: Batch) -> None:
        """Nothing is to be read."""

    def after_step(self) -> None:
        """Nothing follows a step."""

    def state(self) -> dict[str, Tensor]:
        """A stopped run needs nothing but the model."""
        return {}


def tune(stage: Stage, model: Any, output: Path, *, bfloat16: bool, seed: int) -> Progress:
    """Run all epochs of a stage and leave the model as it was after the best one.

    Args:
        stage: what is learnt.
        model: a module, changed in place.
        output: the grader's folder; a stopped run goes on from the checkpoint in it.
        bfloat16: multiply matrices in bfloat16.
        seed: of the run.
    """
    loop = StageLoop(
        stage,
        model,
        checkpoint=output / CHECKPOINT,
        seconds=_CHECKPOINT_SECONDS,
        patience=max(1, stage.config.epochs),
        bfloat16=bfloat16,
        seed=seed,
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(
        f"{stage.name}: {trained:,} weights, {stage.examples:,} pairs an epoch, "
        f"{stage.config.epochs} epochs of {loop.steps} steps of {loop.batch}"
    )
    board = output / "tensorboard"
    with closing(Monitor(stage.name, loop.total, "pairs", board)) as monitor:

        def note(progress: Progress, figures: dict[str, float]) -> None:
            monitor.step(done=progress.examples, seconds=progress.seconds, figures=figures)

        def tell(epoch: int, found: dict[str, float]) -> None:
            monitor.evaluated(epoch, found)
            when = f"after epoch {epoch}" if epoch else "before training"
            say(f"{stage.name}, {when}: {describe(found)}")

        return loop.run(note, tell)


def tuning_figures(pairs: int, progress: Progress) -> dict[str, Any]:
    """Return what ``metrics.json`` tells of the training.

    Args:
        pairs: of the fine-tuning part.
        progress: of the finished run.
    """
    kept = ("epoch", "examples", "seconds", "losses", "evaluations", "best")
    return {
        "training_pairs": pairs,
        "training_pairs_per_second": progress.examples / max(progress.seconds, 1e-9),
        **{name: value for name, value in asdict(progress).items() if name in kept},
    }
