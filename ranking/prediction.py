"""Scores of request records, in their order."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from features.batch import RecordFiles, RequestBatch, prefetch
from features.schema import DatasetSchema
from ranking.encoded import EncodedBatch
from ranking.metrics import Predictions
from ranking.ranker import Ranker

EVALUATION_ROWS = 1 << 14
EVALUATION_GROUPS = 16


def log_loss(predictions: Predictions) -> float:
    """Return the mean log loss of all candidates."""
    p = np.clip(predictions.probability, 1e-7, 1 - 1e-7)
    return float(-np.where(predictions.clicked, np.log(p), np.log1p(-p)).mean())


@torch.no_grad()
def score(ranker: Ranker, batch: EncodedBatch) -> np.ndarray:
    """Return the probability (float32, [C]) of a click, computed where the ranker is."""
    return torch.sigmoid(ranker(batch.to(ranker.device))).cpu().numpy()


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
    for raw, chunk in prefetch(files.chunks(EVALUATION_GROUPS), encode):
        for batch in chunk.split(EVALUATION_ROWS):
            scores.append(score(ranker, batch))
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
