"""The floor for all graders: the cosine of a sentence encoder that saw no label.

What is fitted are the cuts alone: a multinomial logistic regression of the label on the cosine,
which is one number for each pair.

Legend: ``P`` pairs, ``3`` labels.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from embeddings.encoder import Encoder
from embeddings.labeling.config import SimilarityConfig
from embeddings.labeling.cross_encoder import softmax
from embeddings.labeling.fine_tuned_folder import begin, finish, validation_figures
from embeddings.labeling.grades import LABELS, Grades, Pairs
from embeddings.labeling.judgements import read_judgements
from embeddings.open_encoder import open_encoder
from features.errors import BadInputError
from features.files import write_text

CUTS = "cuts.json"
_CHUNK_PAIRS = 4096
_WEAK = 1e6  # inverse strength of the prior: next to none


class SimilarityGrader:
    """Grades by cosine; implements `embeddings.labeling.grades.Grader`.

    Args:
        encoder: of queries and titles.
        slope: [3] how a label's logit grows with the cosine.
        intercept: [3] a label's logit at cosine 0.
        model: the grader's name.
    """

    prompt_version = ""
    chunk_pairs = _CHUNK_PAIRS

    def __init__(
        self, encoder: Encoder, slope: np.ndarray, intercept: np.ndarray, *, model: str
    ) -> None:
        cuts = ",".join(f"{value:.6g}" for value in (*slope, *intercept))
        self.model = model
        self.fingerprint = f"similarity-{encoder.fingerprint}-{cuts}"
        self._encoder = encoder
        self._slope = slope
        self._intercept = intercept

    @classmethod
    def open(cls, config: SimilarityConfig, folder: Path) -> "SimilarityGrader":
        """Return the grader of a folder that ``label-relevance fine-tune`` wrote.

        Raises:
            BadInputError: its cuts or its encoder cannot be read.
        """
        path = folder / CUTS
        try:
            cuts = json.loads(path.read_text(encoding="utf-8"))
            slope, intercept = (np.array(cuts[name], float) for name in ("slope", "intercept"))
        except FileNotFoundError as error:
            raise BadInputError(
                f"{path}: no such file; a similarity grades once its cuts are fitted: run "
                "`label-relevance fine-tune` and name its output"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise BadInputError(f"{path}: not readable as cuts: {error}") from error
        if not slope.shape == intercept.shape == (len(LABELS),):
            raise BadInputError(f"{path}: 'slope' and 'intercept' must hold {len(LABELS)} numbers")
        encoder = _encoder(config, folder)
        return cls(encoder, slope, intercept, model=f"similarity-{encoder.fingerprint[:13]}")

    def grade(self, pairs: Pairs) -> Iterator[Grades]:
        """Yield the grades of a chunk of pairs after the other, in their order."""
        for first in range(0, len(pairs), self.chunk_pairs):
            position = np.arange(first, min(first + self.chunk_pairs, len(pairs)))
            cosine = cosines(self._encoder, pairs.take(position))
            probability = softmax(cosine[:, None] * self._slope + self._intercept)
            label = probability.argmax(1).astype(np.int8)
            yield Grades(position=position, label=label, probability=probability)


def cosines(encoder: Encoder, pairs: Pairs) -> np.ndarray:
    """Return the cosine of query and title of each pair, [P] float32; each text is read once."""
    query, of_query = np.unique(np.asarray(pairs.queries, object), return_inverse=True)
    title, of_title = np.unique(np.asarray(pairs.titles, object), return_inverse=True)
    queries, titles = encoder.encode_queries(list(query)), encoder.encode_products(list(title))
    return np.einsum("pd,pd->p", queries[of_query], titles[of_title])


def fine_tune(
    config: SimilarityConfig, folder: Path, split: Path, output: Path, *, command: str = ""
) -> dict[str, Any]:
    """Fit the cuts on the fine-tuning part; returns the content of ``metrics.json``.

    Args:
        config: of the encoder.
        folder: what a relative path in ``config`` begins at.
        split: folder of ``label-relevance split``.
        output: the grader's folder.
        command: the command line, for the record.

    Raises:
        BadInputError: an input breaks a rule, a label is missing, or ``output`` holds something
            else.
    """
    from sklearn.linear_model import LogisticRegression

    if (figures := begin(output, config, folder, split, command)) is not None:
        return figures
    training = read_judgements(split, "fine_tuning")
    if len(np.unique(training.given)) < len(LABELS):
        raise BadInputError(f"{split}/fine_tuning.parquet: not every label is in it")
    encoder = _encoder(config, folder)
    began = time.perf_counter()
    cosine = cosines(encoder, training.pairs)
    fitted = LogisticRegression(C=_WEAK, max_iter=1000).fit(
        cosine[training.pair, None], training.given
    )
    seconds = time.perf_counter() - began
    cuts = {"slope": fitted.coef_[:, 0].tolist(), "intercept": fitted.intercept_.tolist()}
    write_text(output / CUTS, json.dumps(cuts, indent=2) + "\n")
    named = replace(config, model=str((folder / config.model).resolve()) if config.model else "")
    grader = SimilarityGrader.open(named, output)
    figures = {
        "command": command,
        "kind": config.kind,
        "training_pairs": len(training),
        "training_pairs_per_second": len(training) / max(seconds, 1e-9),
        "seconds": seconds,
        **validation_figures(grader, read_judgements(split, "validation")),
    }
    return finish(output, named, figures)


def _encoder(config: SimilarityConfig, folder: Path) -> Encoder:
    return open_encoder(folder / config.model if config.model else None)
