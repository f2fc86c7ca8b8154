"""The grader that reads query and title together, at work.

Legend: ``P`` pairs, ``T`` tokens of the longest pair of a batch, ``3`` labels.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from embeddings.batching import TOKEN_BUDGET, for_each, padded, token_batches
from embeddings.labeling.config import CrossEncoderConfig
from embeddings.labeling.grades import LABELS, Grades, Pairs
from embeddings.text_encoder import TextEncoder
from features.errors import BadInputError
from features.files import fingerprint
from features.hardware import fast_precision, keep_freed_memory

if TYPE_CHECKING:
    import torch

    from embeddings.labeling.pair_classifier import PairClassifier

_CHUNK_PAIRS = 4096  # graded together, so that texts of like length make a batch
_GPU_TOKENS = 65_536


class CrossEncoder:
    """Grades with a fine-tuned `PairClassifier`; implements `embeddings.labeling.grades.Grader`.

    Args:
        classifier: on the device to compute on.
        threads: cores to compute on, where there is no GPU.
        model: the grader's name.
        fingerprint: of weights, tokenizer and configuration.
    """

    prompt_version = ""
    chunk_pairs = _CHUNK_PAIRS

    def __init__(
        self, classifier: "PairClassifier", *, threads: int, model: str, fingerprint: str
    ) -> None:
        self.model = model
        self.fingerprint = fingerprint
        self._classifier = classifier
        self._threads = threads

    @classmethod
    def open(cls, config: CrossEncoderConfig, folder: Path) -> "CrossEncoder":
        """Return the grader of a folder that ``label-relevance fine-tune`` wrote.

        Raises:
            BadInputError: it was not fine-tuned, or a file is missing or damaged.
        """
        from embeddings.labeling.pair_classifier import has_head, load_pair_classifier

        name = source(config, folder)
        if not has_head(name):
            raise BadInputError(
                f"{name}: a cross-encoder grades once it is fine-tuned: run `label-relevance "
                "fine-tune` and name its output"
            )
        classifier = load_pair_classifier(name, max_tokens=config.max_tokens)
        keep_freed_memory()
        weights = fingerprint(Path(name))
        return cls(
            classifier.to(_device()),
            threads=config.threads,
            model=f"{folder.resolve().name}-{weights[:8]}",
            fingerprint=f"cross-encoder-{weights}-{config.max_tokens}",
        )

    def grade(self, pairs: Pairs) -> Iterator[Grades]:
        """Yield the grades of a chunk of pairs after the other, in their order."""
        for first in range(0, len(pairs), self.chunk_pairs):
            position = np.arange(first, min(first + self.chunk_pairs, len(pairs)))
            logits = classify(self._classifier, pairs.take(position), threads=self._threads)
            yield Grades(
                position=position,
                label=logits.argmax(1).astype(np.int8),
                probability=softmax(logits / self._classifier.temperature),
            )


def source(config: CrossEncoderConfig, folder: Path) -> str:
    """Return the folder or hub name of the weights that a configuration in ``folder`` names."""
    if not config.model:
        return str(TextEncoder.packaged().folder)
    return str(folder / config.model) if (folder / config.model).is_dir() else config.model


def classify(classifier: "PairClassifier", pairs: Pairs, *, threads: int) -> np.ndarray:
    """Return the logits [P, 3] float32 of pairs, without the temperature.

    On the processor each core takes a batch at a time, so that the result does not depend on how
    many there are.
    """
    import torch

    if not len(pairs):
        return np.empty((0, len(LABELS)), np.float32)
    tokens, title = classifier.tokenize(pairs.queries, pairs.titles)
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    cuda = classifier.device.type == "cuda"
    batches = list(token_batches(lengths, _GPU_TOKENS if cuda else TOKEN_BUDGET))
    logits = np.empty((len(tokens), len(LABELS)), np.float32)
    pad = classifier.tokenizer.pad_token_id or 0

    def forward(rows: np.ndarray) -> None:
        with torch.inference_mode(), autocast(classifier.device):
            ids, mask = padded([tokens[row] for row in rows], pad)
            given = (ids, torch.from_numpy(title[rows]), mask)
            logits[rows] = classifier(*(t.to(classifier.device) for t in given)).cpu()

    before = torch.get_num_threads()
    torch.set_num_threads(1 if cuda else threads)
    try:
        for_each(forward, batches)
    finally:
        torch.set_num_threads(before)
    return logits


def autocast(device: "torch.device") -> "torch.autocast":
    """Return the context in which a classifier computes, in bfloat16 where that is fast."""
    import torch

    fast = device.type == "cuda" or fast_precision() == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities [P, 3] float32 of logits."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return (powers / powers.sum(1, keepdims=True)).astype(np.float32)


def _device() -> "torch.device":
    from embeddings.distributed import device

    return device()
