"""Exact evaluation metrics, by slice, and the curves that the report draws.

Everything is computed once over all evaluation rows: no metric is averaged over batches.

Dimensions: ``B`` requests, ``C`` candidates (rows) of all requests together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score, roc_curve

from features.errors import BadInputError

Floats = npt.NDArray[np.float64]
SliceMetrics = dict[str, int | float | None]

SLICES = ("all", "with_history", "without_history")
TRAINING_FACTS = ("rows", "seconds", "rows_per_second", "peak_rss_mb")
_CONTRACT = ("auc", "log_loss", "normalized_log_loss", "rows", "positives")
_Z_95 = 1.959963984540054


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Predictions:
    """Labels and predicted probabilities of a set of requests.

    ::

        lengths       [2,          3]
        with_history  [True,       False]
        clicked       [1,    0,    0,    0,    1]
        probability   [0.80, 0.10, 0.30, 0.20, 0.30]
                       request 0   request 1

    Attributes:
        clicked: bool ``[C]``.
        probability: float32 or float64 ``[C]``, each in [0, 1].
        lengths: int64 ``[B]``, candidates of each request; they sum to ``C``.
        with_history: bool ``[B]``, whether the request's purchase history has any product.

    Raises:
        ValueError: shapes do not agree, or a probability is NaN or outside [0, 1]; the message
            names the row and the request.
    """

    clicked: npt.NDArray[np.bool_]
    probability: npt.NDArray[np.floating[Any]]
    lengths: npt.NDArray[np.int64]
    with_history: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        rows, requests = self.clicked.shape, self.lengths.shape
        if len(rows) != 1 or self.probability.shape != rows:
            raise ValueError(
                "clicked and probability must have one value per candidate, "
                f"got shapes {rows} and {self.probability.shape}"
            )
        if len(requests) != 1 or self.with_history.shape != requests:
            raise ValueError(
                "lengths and with_history must have one value per request, "
                f"got shapes {requests} and {self.with_history.shape}"
            )
        if (self.lengths < 0).any() or self.lengths.sum() != rows[0]:
            raise ValueError(
                "lengths must be 0 or more and sum to the number of candidates "
                f"({rows[0]}), got a sum of {self.lengths.sum()}"
            )
        if self.clicked.dtype != np.bool_ or self.with_history.dtype != np.bool_:
            raise ValueError(
                "clicked and with_history must be bool, "
                f"got {self.clicked.dtype} and {self.with_history.dtype}"
            )
        # Written so that NaN counts as wrong: every comparison with NaN is false.
        wrong = ~((self.probability >= 0) & (self.probability <= 1))
        if wrong.any():
            row = int(wrong.argmax())
            request = int(np.searchsorted(self.lengths.cumsum(), row, side="right"))
            raise ValueError(
                f"row {row} (request {request}): the probability must be in [0, 1], "
                f"got {self.probability[row]}"
            )

    def select(self, requests: npt.NDArray[np.bool_]) -> "Predictions":
        """Return the predictions of the chosen requests.

        Args:
            requests: bool ``[B]``.
        """
        rows = np.repeat(requests, self.lengths)
        return Predictions(
            clicked=self.clicked[rows],
            probability=self.probability[rows],
            lengths=self.lengths[requests],
            with_history=self.with_history[requests],
        )

    def slices(self) -> dict[str, "Predictions"]:
        """Return the predictions of each slice of `SLICES`."""
        return {
            "all": self,
            "with_history": self.select(self.with_history),
            "without_history": self.select(~self.with_history),
        }

    @property
    def one_class(self) -> bool:
        """Whether clicks or non-clicks are missing, so that no metric is defined."""
        return bool(self.clicked.all() or not self.clicked.any())


def slice_metrics(predictions: Predictions) -> dict[str, SliceMetrics]:
    """Return the metrics of every slice of `SLICES`.

    Per slice: ``auc``, ``log_loss`` (nats per row), ``normalized_log_loss`` (log loss / entropy
    of the slice's own base rate), ``rows``, ``positives``, ``requests``, ``average_precision``,
    ``calibration`` (mean predicted / observed rate), ``within_request_auc`` (see
    `within_request_auc`) and ``mixed_requests`` (how many requests that one counts). A slice
    without clicks or without non-clicks keeps its counts; its metrics are ``None``.

    Raises:
        BadInputError: the evaluation rows as a whole are empty or of one class.
    """
    if predictions.one_class:
        rows = len(predictions.clicked)
        found = "none of them is" if not predictions.clicked.any() else "all of them are"
        raise BadInputError(
            f"evaluation needs clicked and unclicked rows, but of {rows:,} rows {found} clicked"
        )
    return {name: _metrics(part) for name, part in predictions.slices().items()}


def _metrics(part: Predictions) -> SliceMetrics:
    auc = loss = normalized = precision = calibration = None
    if not part.one_class:
        clicked, probability = part.clicked, part.probability.astype(np.float64)
        auc = float(roc_auc_score(clicked, probability))
        loss = float(log_loss(clicked, probability))
        normalized = loss / base_rate_entropy(float(clicked.mean()))
        precision = float(average_precision_score(clicked, probability))
        calibration = float(probability.mean() / clicked.mean())
    within, mixed = within_request_auc(part)
    return {
        "auc": auc,
        "log_loss": loss,
        "normalized_log_loss": normalized,
        "rows": len(part.clicked),
        "positives": int(part.clicked.sum()),
        "requests": len(part.lengths),
        "average_precision": precision,
        "calibration": calibration,
        "within_request_auc": within,
        "mixed_requests": mixed,
    }


def base_rate_entropy(rate: float) -> float:
    """Return the entropy in nats of a click with probability ``rate``, in (0, 1).

    It is the log loss of predicting ``rate`` for every row: the divisor of the normalised log
    loss, which is therefore 1 for a model that knows the base rate and nothing else.
    """
    return float(-(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))


def within_request_auc(predictions: Predictions) -> tuple[float | None, int]:
    """Return the mean AUC inside requests, and the number of requests that it counts.

    A request counts, with weight 1 whatever its size, when it has a click and a non-click. Its
    AUC is the Mann-Whitney statistic over its candidates, ties counting one half::

        AUC = (sum of the clicked candidates' ranks - P (P + 1) / 2) / (P N)

    with ``P`` clicks, ``N`` non-clicks, and equal scores sharing their mean rank. The mean is
    ``None`` when no request counts.
    """
    lengths, clicked = predictions.lengths, predictions.clicked
    request_C = np.repeat(np.arange(len(lengths)), lengths)  # noqa: N806
    order = np.lexsort((predictions.probability, request_C))
    score, request, click = predictions.probability[order], request_C[order], clicked[order]

    # Runs of equal score in one request share the mean of the places that they span.
    opens = np.ones(len(score), dtype=bool)
    opens[1:] = (score[1:] != score[:-1]) | (request[1:] != request[:-1])
    first = np.flatnonzero(opens)
    last = np.append(first[1:], len(score)) - 1
    place = ((first + last) / 2)[opens.cumsum() - 1]
    rank = place - (lengths.cumsum() - lengths)[request] + 1

    positives = np.bincount(request[click], minlength=len(lengths))
    negatives = lengths - positives
    rank_sum = np.bincount(request[click], weights=rank[click], minlength=len(lengths))
    mixed = (positives > 0) & (negatives > 0)
    if not mixed.any():
        return None, 0
    wins = rank_sum - positives * (positives + 1) / 2
    auc = wins[mixed] / (positives[mixed] * negatives[mixed])
    return float(auc.mean()), int(mixed.sum())


def roc_points(predictions: Predictions, limit: int = 300) -> tuple[Floats, Floats]:
    """Return false and true positive rates, each ``[≤ limit]``, from (0, 0) to (1, 1).

    Points are thinned evenly along the curve. The predictions must have both classes.
    """
    false_rate, true_rate, _ = roc_curve(predictions.clicked, predictions.probability)
    along = false_rate + true_rate  # rises from 0 to 2
    kept = np.unique(np.searchsorted(along, np.linspace(0, along[-1], limit)))
    return false_rate[kept], true_rate[kept]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReliabilityBins:
    """Predicted against observed click rate; every array is ``[bins]``, lowest scores first.

    Attributes:
        predicted: mean probability of the bin.
        observed: its share of clicked rows.
        low: lower end of the 95 % Wilson interval of ``observed``.
        high: its upper end.
        rows: rows of the bin.
        positives: its clicked rows.
    """

    predicted: Floats
    observed: Floats
    low: Floats
    high: Floats
    rows: npt.NDArray[np.int64]
    positives: npt.NDArray[np.int64]


def reliability_bins(predictions: Predictions, bins: int = 18) -> ReliabilityBins:
    """Group the rows by predicted probability and compare the means with what happened.

    Each bin holds the same mass, where half of the mass lies evenly on the rows and half on the
    expected clicks: clicks are rare and crowd into the highest scores, and quantiles of the rows
    alone would put most of them into one bin. Equal scores never part, so bins may be fewer.
    """
    probability = np.sort(predictions.probability.astype(np.float64))
    clicks = probability.sum() or 1.0
    mass = (1 / len(probability) + probability / clicks).cumsum()
    cuts = np.arange(1, bins) / bins * mass[-1]
    edges = np.unique(probability[np.searchsorted(mass, cuts)])

    number = np.searchsorted(edges, predictions.probability, side="right")
    number = np.unique(number, return_inverse=True)[1]  # without the empty ones
    rows = np.bincount(number)
    positives = np.bincount(number[predictions.clicked], minlength=len(rows))
    low, high = wilson_interval(positives, rows)
    return ReliabilityBins(
        predicted=np.bincount(number, weights=predictions.probability) / rows,
        observed=positives / rows,
        low=low,
        high=high,
        rows=rows,
        positives=positives,
    )


def wilson_interval(
    positives: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
) -> tuple[Floats, Floats]:
    """Return the 95 % Wilson score interval of ``positives / rows``, element by element."""
    rate, spread = positives / rows, _Z_95**2 / rows
    middle = (rate + spread / 2) / (1 + spread)
    half = np.sqrt(rate * (1 - rate) * spread + spread**2 / 4) / (1 + spread)
    # Rounding may leave the ends just outside of what is exactly 0 or 1.
    return np.clip(middle - half, 0, rate), np.clip(middle + half, rate, 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoreHistogram:
    """How the scores of each label spread.

    Attributes:
        log_odds: ``[bins + 1]``, the evenly spaced edges of the bins.
        clicked: ``[bins]``, share of the clicked rows in each bin; sums to 1.
        unclicked: ``[bins]``, share of the other rows; sums to 1.
    """

    log_odds: Floats
    clicked: Floats
    unclicked: Floats


def score_histogram(predictions: Predictions, bins: int = 50) -> ScoreHistogram:
    """Return the histogram of scores by label; the predictions must have both classes.

    The outermost 0.1 % of each label's scores at either end fall into the end bins.
    """
    probability = np.clip(predictions.probability.astype(np.float64), 1e-9, 1 - 1e-9)
    log_odds = np.log(probability) - np.log1p(-probability)
    labels = (predictions.clicked, ~predictions.clicked)
    low = min(np.quantile(log_odds[label], 0.001) for label in labels)
    high = max(np.quantile(log_odds[label], 0.999) for label in labels)
    edges = np.linspace(low, max(high, low + 0.1), bins + 1)
    number = np.clip(np.searchsorted(edges, log_odds, side="right") - 1, 0, bins - 1)
    clicked, unclicked = (np.bincount(number[label], minlength=bins) for label in labels)
    return ScoreHistogram(
        log_odds=edges, clicked=clicked / clicked.sum(), unclicked=unclicked / unclicked.sum()
    )


def metrics_document(
    *,
    dataset: str,
    model: str,
    seed: int,
    slices: Mapping[str, SliceMetrics],
    training: Mapping[str, int | float],
) -> dict[str, Any]:
    """Return the content of ``metrics.json``.

    Args:
        dataset: name of the dataset.
        model: name of the recipe that was trained.
        seed: seed of the run.
        slices: as `slice_metrics` returns them.
        training: ``rows`` seen, ``seconds``, ``rows_per_second`` and ``peak_rss_mb``.

    Raises:
        ValueError: a slice, a metric or a training fact of the contract is missing.
    """
    _require("slices", slices, SLICES)
    for name in SLICES:
        _require(f"slice '{name}'", slices[name], _CONTRACT)
    _require("training", training, TRAINING_FACTS)
    return {
        "dataset": dataset,
        "model": model,
        "seed": seed,
        "slices": {name: dict(slices[name]) for name in SLICES},
        "training": dict(training),
    }


def _require(what: str, given: Mapping[str, Any], keys: Sequence[str]) -> None:
    missing = [key for key in keys if key not in given]
    if missing:
        raise ValueError(f"{what}: missing {', '.join(missing)}; got {', '.join(given)}")
