"""Fine-tuning of the cross-encoder on human labels (paper, Section 2.2).

Legend: ``P`` pairs, ``3`` labels.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from embeddings.batching import padded, torch_threads
from embeddings.distributed import device
from embeddings.labeling.config import CrossEncoderConfig
from embeddings.labeling.cross_encoder import CrossEncoder, classify, source
from embeddings.labeling.fine_tuned_folder import agreement, begin, finish, validation_figures
from embeddings.labeling.judgements import Judgements, read_judgements
from embeddings.labeling.pair_classifier import PairClassifier, load_pair_classifier
from embeddings.labeling.tuning import LabelStage, targets, tune, tuning_figures
from embeddings.stage import Batch
from features.hardware import fast_precision, keep_freed_memory

WEIGHTS = "model"
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
    with torch_threads(config.threads):
        keep_freed_memory()
        classifier = load_pair_classifier(source(config, folder), max_tokens=config.max_tokens)
        classifier.to(device()).freeze(config.frozen_layers)
        stage = FineTuning(classifier, config, training, validation)
        on_gpu = classifier.device.type == "cuda"
        progress = tune(
            stage,
            classifier,
            output,
            bfloat16=on_gpu or fast_precision() == "bfloat16",
            seed=config.seed,
        )
        logits = classify(classifier, validation.pairs, threads=config.threads)
    classifier.temperature = fit_temperature(logits, targets(validation))
    classifier.save(output / WEIGHTS)
    tuned = replace(config, model=WEIGHTS)
    figures = {
        "command": command,
        "kind": config.kind,
        **tuning_figures(stage.examples, progress),
        "temperature": classifier.temperature,
        **validation_figures(CrossEncoder.open(tuned, output), validation),
    }
    return finish(output, tuned, figures)


class FineTuning(LabelStage):
    """What `embeddings.stage.StageLoop` asks of a stage.

    Args:
        classifier: to train, in place.
        config: of the training.
        training: pairs to learn.
        validation: pairs that choose the epoch.
    """

    def __init__(
        self,
        classifier: PairClassifier,
        config: CrossEncoderConfig,
        training: Judgements,
        validation: Judgements,
    ) -> None:
        super().__init__(config, training, validation, weight_decay=config.weight_decay)
        self.classifier = classifier
        self.threads = config.threads
        self._tokens, self._title = classifier.tokenize(
            training.pairs.queries, training.pairs.titles
        )
        self._lengths = np.fromiter(map(len, self._tokens), np.int64, self.examples)

    def batches(self, epoch: int, size: int) -> Iterator[Batch]:
        """Yield the batches of an epoch, each of pairs of like length, in a random order."""
        draw = np.random.default_rng((self.seed, epoch))
        order = draw.permutation(self.examples)
        order = order[: self.examples // size * size]
        pools = [order[at : at + _POOL * size] for at in range(0, len(order), _POOL * size)]
        order = np.concatenate([p[np.argsort(self._lengths[p], kind="stable")] for p in pools])
        for number in draw.permutation(len(order) // size):
            yield (order[number * size : (number + 1) * size],)

    def loss(self, batch: Batch, *, epoch: float, seed: int) -> tuple[Tensor, dict[str, float]]:
        """Return the cross entropy to what humans said."""
        rows = batch[0]
        ids, mask = padded([self._tokens[row] for row in rows], self._pad)
        title, said = torch.from_numpy(self._title[rows]), torch.from_numpy(self.targets[rows])
        ids, title, mask, said = (t.to(self.classifier.device) for t in (ids, title, mask, said))
        loss = cross_entropy(self.classifier(ids, title, mask), said)
        return loss, {"loss": float(loss.detach())}

    def evaluate(self) -> dict[str, float]:
        """Return the figures on the validation part."""
        logits = classify(self.classifier, self.validation.pairs, threads=self.threads)
        loss = float(cross_entropy(torch.from_numpy(logits), self.validation_targets))
        labels = logits.argmax(1).astype(np.int8)
        return {"score": loss, "loss": loss, **agreement(self.validation.label, labels)}

    @property
    def _pad(self) -> int:
        return int(self.classifier.tokenizer.pad_token_id or 0)


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
