"""Whether the probabilities that a grader gives come true.

Legend: ``P`` pairs, ``3`` labels, ``B`` bins.
"""

from typing import Any

import numpy as np

from embeddings.labeling.grades import UNGRADED

BINS = 10
_LEAST = 1e-7  # a probability of 0 would cost infinitely much


def calibration(
    human: np.ndarray, label: np.ndarray, probability: np.ndarray
) -> dict[str, Any] | None:
    """Return how well probabilities fit what people say, ``None`` where the grader tells none.

    Pairs without a grade or without probabilities are left out.

    Args:
        human: [P] int8.
        label: [P] int8, the grader's; `UNGRADED` where it gave none.
        probability: [P, 3] of each label; NaN where it does not tell.

    Returns:
        ``pairs``; ``log_loss`` in nats; ``expected_calibration_error``, the mean distance of
        confidence (the probability of the grader's label) and accuracy over `BINS` bins of equal
        width, each weighed by its pairs (Guo and others 2017); ``reliability``, for each bin that
        is not empty its bounds, its pairs, their mean confidence and their accuracy.
    """
    told = (label != UNGRADED) & ~np.isnan(probability).any(1)
    if not told.any():
        return None
    human, label, probability = human[told], label[told], probability[told].astype(np.float64)
    rows = np.arange(len(human))
    log_loss = -np.log(np.clip(probability[rows, human], _LEAST, 1)).mean()
    bins = _reliability(probability[rows, label], human == label)
    error = sum(b["pairs"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / len(human)
    return {
        "pairs": len(human),
        "log_loss": float(log_loss),
        "expected_calibration_error": float(error),
        "reliability": bins,
    }


def _reliability(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    number = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    return [
        {
            "from": position / BINS,
            "to": (position + 1) / BINS,
            "pairs": int((number == position).sum()),
            "confidence": float(confidence[number == position].mean()),
            "accuracy": float(right[number == position].mean()),
        }
        for position in np.unique(number).tolist()
    ]
