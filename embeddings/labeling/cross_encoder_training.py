"""Fine-tuning of the cross-encoder on human labels (paper, Section 2.2).

Legend: ``P`` pairs, ``3`` labels.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from embeddings.batching import padded
from embeddings.config import StageConfig
from embeddings.distributed import device
from embeddings.labeling.agreement import label_counts
from embeddings.labeling.config import CrossEncoderConfig
from embeddings.labeling.cross_encoder import CrossEncoder, classify, source
from embeddings.labeling.fine_tuned_folder import (
    CHECKPOINT,
    agreement,
    begin,
    finish,
    validation_figures,
)
from embeddings.labeling.judgements import Judgements, read_judgements
from embeddings.labeling.pair_classifier import PairClassifier, load_pair_classifier
from embeddings.stage import Batch, Progress, StageLoop, describe
from features.console import say
from features.hardware import fast_precision, keep_freed_memory
from features.monitor import Monitor

WEIGHTS = "model"
CHECKPOINT_SECONDS = 300.0
_POOL = 64  # batches whose pairs are sorted by length among each other


def fine_tune(
    config: CrossEncoderConfig, folder: Path, split: Path, output: Path, *, command: str = ""
) -> dict[str, Any]:
    """Fine-tune a cross-encoder; returns the content of ``metrics.json``.

    The epoch with the lowest loss on the validation part is kept, and one temperature fitted there
    makes its probabilities calibrated (Guo and others 2017). The evaluation part is not read.

    Args:
        config: of the start and of the training.
        folder: what a relative path in ``config`` begins at.
        split: folder of ``label-relevance split``.
        output: the grader's folder.
        command: the command line, for the record.

    Raises:
        BadInputError: an input breaks a rule, ``output`` holds something else, or the loss became
            infinite.
    """
    if (figures := begin(output, config, folder, split, command)) is not None:
        return figures
    training = read_judgements(split, "fine_tuning")
    validation = read_judgements(split, "validation")
    with _threads(config.threads):
        keep_freed_memory()
        classifier = load_pair_classifier(source(config, folder), max_tokens=config.max_tokens)
        classifier.to(device()).freeze(config.frozen_layers)
        stage = FineTuning(classifier, config, training, validation)
        progress = _train(stage, output)
        logits = classify(classifier, validation.pairs, threads=config.threads)
    classifier.temperature = fit_temperature(logits, targets(validation))
    classifier.save(output / WEIGHTS)
    tuned = replace(config, model=WEIGHTS)
    figures = {
        "command": command,
        "kind": config.kind,
        **_figures(stage, progress),
        "temperature": classifier.temperature,
        **validation_figures(CrossEncoder.open(tuned, output), validation),
    }
    return finish(output, tuned, figures)


class FineTuning:
    """What `embeddings.stage.StageLoop` asks of a stage.

    Args:
        classifier: to train, in place.
        config: of the training.
        training: pairs to learn.
        validation: pairs that choose the epoch.
    """

    name = "fine-tuning"

    def __init__(
        self,
        classifier: PairClassifier,
        config: CrossEncoderConfig,
        training: Judgements,
        validation: Judgements,
    ) -> None:
        self.classifier = classifier
        self.validation = validation
        self.examples = len(training)
        self.config = StageConfig(
            epochs=config.epochs,
            batch=config.batch,
            learning_rate=config.learning_rate,
            warmup=config.warmup,
            weight_decay=config.weight_decay,
        )
        self.seed = config.seed
        self.threads = config.threads
        self.targets = targets(training)
        self._tokens, self._title = classifier.tokenize(
            training.pairs.queries, training.pairs.titles
        )
        self._lengths = np.fromiter(map(len, self._tokens), np.int64, self.examples)
        self._validation_targets = torch.from_numpy(targets(validation))

    def batches(self, epoch: int, size: int) -> Iterator[Batch]:
        """Yield the batches of an epoch, each of pairs of like length, in a random order."""
        draw = np.random.default_rng((self.seed, epoch))
        order = draw.permutation(self.examples)
        order = order[: self.examples // size * size]
        pools = [order[at : at + _POOL * size] for at in range(0, len(order), _POOL * size)]
        order = np.concatenate([p[np.argsort(self._lengths[p], kind="stable")] for p in pools])
        for number in draw.permutation(len(order) // size):
            yield (order[number * size : (number + 1) * size],)

    def prepare(self, batch: Batch) -> None:
        """Nothing is to be read."""

    def loss(self, batch: Batch, *, epoch: float, seed: int) -> tuple[Tensor, dict[str, float]]:
        """Return the cross entropy to what humans said."""
        rows = batch[0]
        ids, mask = padded([self._tokens[row] for row in rows], self._pad)
        title, said = torch.from_numpy(self._title[rows]), torch.from_numpy(self.targets[rows])
        ids, title, mask, said = (t.to(self.classifier.device) for t in (ids, title, mask, said))
        loss = cross_entropy(self.classifier(ids, title, mask), said)
        return loss, {"loss": float(loss.detach())}

    def after_step(self) -> None:
        """Nothing follows a step."""

    def evaluate(self) -> dict[str, float]:
        """Return the figures on the validation part."""
        logits = classify(self.classifier, self.validation.pairs, threads=self.threads)
        loss = float(cross_entropy(torch.from_numpy(logits), self._validation_targets))
        labels = logits.argmax(1).astype(np.int8)
        return {"score": loss, "loss": loss, **agreement(self.validation.label, labels)}

    def state(self) -> dict[str, Tensor]:
        """A stopped run needs nothing but the model."""
        return {}

    @property
    def _pad(self) -> int:
        return int(self.classifier.tokenizer.pad_token_id or 0)


def targets(judgements: Judgements) -> np.ndarray:
    """Return [P, 3] float32: the share of a pair's judgements that are each label."""
    counts = label_counts(judgements).astype(np.float32)
    return counts / counts.sum(1, keepdims=True)


def fit_temperature(logits: np.ndarray, given: np.ndarray) -> float:
    """Return the temperature with the lowest cross entropy.

    Args:
        logits: [P, 3].
        given: [P, 3] shares of the labels.
    """
    from scipy.optimize import minimize_scalar

    scores, wanted = torch.from_numpy(logits).double(), torch.from_numpy(given).double()
    found = minimize_scalar(
        lambda log: float(cross_entropy(scores * np.exp(-log), wanted)),
        bounds=(np.log(0.05), np.log(20.0)),
        method="bounded",
    )
    return float(np.exp(found.x))


def _figures(stage: FineTuning, progress: Progress) -> dict[str, Any]:
    kept = ("epoch", "examples", "seconds", "losses", "evaluations", "best")
    return {
        "training_pairs": stage.examples,
        "training_pairs_per_second": progress.examples / max(progress.seconds, 1e-9),
        **{name: value for name, value in asdict(progress).items() if name in kept},
    }


def _train(stage: FineTuning, output: Path) -> Progress:
    on_gpu = stage.classifier.device.type == "cuda"
    loop = StageLoop(
        stage,
        stage.classifier,  # type: ignore[arg-type]
        checkpoint=output / CHECKPOINT,
        seconds=CHECKPOINT_SECONDS,
        patience=max(1, stage.config.epochs),
        bfloat16=on_gpu or fast_precision() == "bfloat16",
        seed=stage.seed,
    )
    say(
        f"{stage.name}: {stage.examples:,} pairs an epoch, {stage.config.epochs} epochs of "
        f"{loop.steps} steps of {loop.batch}"
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


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
