"""What the true click probabilities of a generated dataset reach: the best that any ranker can."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from features import columns
from features.dataset import IMPRESSIONS
from features.errors import BadInputError

TRUTH = "truth"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reachable:
    """The metrics of the true probabilities over the rows of one week.

    Attributes:
        rows: number of impressions.
        clicks: number of those that were clicked.
        auc: area under the ROC curve.
        log_loss: nats a row.
    """

    rows: int
    clicks: int
    auc: float
    log_loss: float

    def document(self) -> dict[str, int | float]:
        """Return the figures as ``truth.json`` names them."""
        return {
            "evaluated_rows": self.rows,
            "evaluated_clicks": self.clicks,
            "reachable_auc": self.auc,
            "reachable_log_loss": self.log_loss,
        }


def truth_of_week(folder: Path, week: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """Return whether each impression of a week was clicked, and how probable that was ([C] each).

    The rows come in the order of the files' names and of their rows.

    Raises:
        BadInputError: ``folder`` holds no generated impressions of that week.
    """
    files = sorted((folder / TRUTH).glob(f"week-{week:02d}-group-*.parquet"))
    if not files:
        raise BadInputError(f"{folder / TRUTH}: holds no probabilities of week {week}")
    clicked, probability = [], []
    for file in files:
        column = pq.read_table(folder / IMPRESSIONS / file.name, columns=[columns.CLICKED])
        clicked.append(column[columns.CLICKED].to_numpy(zero_copy_only=False))
        probability.append(pq.read_table(file)["probability"].to_numpy())
    return np.concatenate(clicked), np.concatenate(probability)


def reachable(folder: Path, week: int) -> Reachable:
    """Return what the true probabilities of a week reach against what was clicked."""
    from sklearn.metrics import log_loss, roc_auc_score

    clicked, probability = truth_of_week(folder, week)
    return Reachable(
        rows=len(clicked),
        clicks=int(clicked.sum()),
        auc=float(roc_auc_score(clicked, probability)),
        log_loss=float(log_loss(clicked, probability)),
    )
