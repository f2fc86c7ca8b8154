"""What quantised tables cost: the AUC of each type on the run's own evaluation requests.

The tables here are the run's, not grown: a row that nobody asks for changes no score.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from sklearn.metrics import roc_auc_score

from experiments.serving_models import open_ranker
from experiments.serving_workload import FeaturePool
from features.batch import RequestBatch
from features.console import say
from features.errors import BadInputError
from ranking.explain_sample import Week
from serving.embedding_table import TABLE_DTYPES
from serving.online_ranker import OnlineRanker
from serving.scripted import tensors_of

_POOL = 2_000  # requests whose features are drawn from
_AT_ONCE = 32  # requests scored by one call


def feature_pool(week: Week, seed: int) -> FeaturePool:
    """Return the features of some of a week's requests."""
    return FeaturePool.of(_sample(week, _POOL, seed)[0])


def table_quality(run: Path, data: Path, requests: int, seed: int) -> dict[str, Any]:
    """Score evaluation requests with the trained ranker and with each type of tables.

    Args:
        run: folder that train-ranker wrote.
        data: of the dataset that it was trained on.
        requests: how many to draw.
        seed: of the draw.

    Returns:
        ``requests``, ``candidates``, ``auc`` of the trained ranker, and by type of tables
        ``table_bytes`` of the product and the query table, ``auc``, ``auc_change`` and the
        ``largest_difference`` in probability.
    """
    batches = _sample(Week.open(run, data), requests, seed, at_once=_AT_ONCE)
    clicked = np.concatenate([batch.clicked.numpy() for batch in batches])
    if clicked.min() == clicked.max():
        raise BadInputError(f"{data}: {requests} requests drawn from it are all of one class")
    ranker = open_ranker(run)
    trained = np.concatenate([ranker.score(batch).numpy() for batch in batches])
    auc = float(roc_auc_score(clicked, trained))
    found: dict[str, Any] = {"requests": requests, "candidates": len(clicked), "auc": auc}
    found["tables"] = {}
    for dtype in TABLE_DTYPES:
        online = OnlineRanker(ranker, dtype)
        scores = _scores(online, batches)
        state = online.state_dict()
        found["tables"][dtype] = {
            "table_bytes": sum(
                state[f"pretrained.{n}.weight"].nbytes for n in ("product", "query")
            ),
            "auc": float(roc_auc_score(clicked, scores)),
            "auc_change": float(roc_auc_score(clicked, scores)) - auc,
            "largest_difference": float(np.abs(scores - trained).max()),
        }
        say(f"AUC with {dtype} tables: {found['tables'][dtype]['auc_change']:+.6f}")
    return found


def _scores(online: OnlineRanker, batches: list[RequestBatch]) -> npt.NDArray[np.float32]:
    with torch.inference_mode():
        return np.concatenate([online(*tensors_of(b)).numpy() for b in batches])


def _sample(week: Week, number: int, seed: int, at_once: int | None = None) -> list[RequestBatch]:
    """Return requests of a week drawn at random, so many in a batch."""
    records = week.records()
    drawn = np.random.default_rng([seed, 3]).permutation(len(records))[:number]
    taken = records.take(pa.array(np.sort(drawn)))
    step = at_once or len(taken)
    return [
        RequestBatch.from_records(taken.slice(start, step), week.bundle.schema)
        for start in range(0, len(taken), step)
    ]
