"""What models of different labels reach on the held-out queries, and how sure a difference is.

Retrieval is the paper's Section 4.1, relevance prediction its Section 5.2; both against the labels
of the dataset.

Legend: ``S`` seeds, ``Q`` held-out queries.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embeddings.encoder import Encoder
from embeddings.open_encoder import open_encoder
from embeddings.relevance import IRRELEVANT, MODERATE
from embeddings.retrieval import METRICS, score_ranking
from experiments.paired_test import Estimate, compare
from experiments.product_task_data import read_pairs
from experiments.product_task_probes import (
    RELEVANCE_PROBE,
    concatenated,
    cosines,
    probe,
    relevance_split,
    summary,
    with_product_and_cosine,
)
from experiments.retrieval_task import RetrievalTask
from features.console import say
from features.errors import BadInputError
from features.files import write_text

K = 10
F1, F1_WITH_COSINE, AUC = "relevance_f1", "relevance_f1_with_cosine", "relevance_auc"
MEASURES = (*METRICS, F1, F1_WITH_COSINE, AUC)

_SPLITS = 5
_KEPT = "evaluation.json"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scores:
    """What one model reached.

    Attributes:
        retrieval: [Q] of each of `embeddings.retrieval.METRICS`.
        relevance: macro F1 of a linear classifier on query and product, the same with their product
            and cosine, both the mean over the splits of the held-out queries; and the AUC of the
            cosine, relevant pairs against irrelevant ones.
    """

    retrieval: dict[str, np.ndarray]
    relevance: dict[str, float]


class HeldOut:
    """The held-out queries of a dataset: the pool of their products, and their graded pairs.

    Args:
        data: dataset folder.
        model: folder of a model; what it was not trained on is held out.

    Raises:
        BadInputError: there is too little to measure.
    """

    def __init__(self, data: Path, model: Path) -> None:
        self.task = RetrievalTask.read(data, model=model)
        found = read_pairs(data, self.task.catalog, model=model)
        if found is None:
            raise BadInputError(f"{data}: the held-out queries are too few to measure relevance on")
        self.pairs = found
        self._splits = [relevance_split(found.query, found.label, s) for s in range(_SPLITS)]

    def scores(self, model: Path) -> Scores:
        """Return what a model reaches; measured once and kept in its folder."""
        kept = model / _KEPT
        if not kept.exists():
            say(f"{model}: evaluating")
            write_text(kept, json.dumps(self._measure(open_encoder(model))) + "\n")
        content = json.loads(kept.read_text(encoding="utf-8"))
        retrieval = {name: np.array(values) for name, values in content["retrieval"].items()}
        return Scores(retrieval=retrieval, relevance=content["relevance"])

    def _measure(self, encoder: Encoder) -> dict[str, Any]:
        task, pairs = self.task, self.pairs
        products = task.encode_products(encoder)
        ranking = task.rank(task.encode_queries(encoder.encode_queries), products, K, "exact")
        found = score_ranking(ranking, task.relevance, K)
        vectors = np.zeros((len(task.pool), products.vectors.shape[1]), np.float32)
        vectors[products.places] = products.vectors
        product = vectors[np.searchsorted(task.pool, pairs.product)]
        query = encoder.encode_queries(pairs.queries)[pairs.query]
        return {
            "retrieval": {metric: found[metric].tolist() for metric in METRICS},
            "relevance": self._relevance(query, product),
        }

    def _relevance(self, query: np.ndarray, product: np.ndarray) -> dict[str, float]:
        from sklearn.metrics import roc_auc_score

        label = self.pairs.label
        f1 = {}
        for name, build in ((F1, concatenated), (F1_WITH_COSINE, with_product_and_cosine)):
            features = build(query, product)
            runs = probe(features, label, self._splits, classes=3, config=RELEVANCE_PROBE)
            f1[name] = float(runs.macro_f1.mean())
        relevant = label >= MODERATE
        assert IRRELEVANT < MODERATE
        auc = roc_auc_score(relevant, cosines(query, product)) if 0 < relevant.mean() < 1 else 0.5
        return {**f1, AUC: float(auc)}


def figures(runs: Mapping[int, Scores]) -> dict[str, Any]:
    """Return mean, standard deviation and values over the seeds of each of `MEASURES`."""
    estimates = _estimates(runs)
    return {name: summary(estimates[name].values) for name in MEASURES}


def differences(runs: Mapping[int, Scores], base: Mapping[int, Scores]) -> dict[str, Any]:
    """Return how far an arm is from another, for each of `MEASURES`.

    Seeds are paired. Of retrieval, queries are paired too, and the interval covers which queries
    were asked and which seeds were trained (`experiments.paired_test`); of relevance prediction it
    covers the seeds alone, over the same splits.

    Args:
        runs: of the arm, by seed.
        base: of the other, of the same seeds.
    """
    ours, theirs = _estimates(runs), _estimates(base)
    return {name: asdict(compare(ours[name], theirs[name])) for name in MEASURES}


def _estimates(runs: Mapping[int, Scores]) -> dict[str, Estimate]:
    seeds = tuple(sorted(runs))
    found = {}
    for metric in METRICS:
        values = np.stack([runs[seed].retrieval[metric] for seed in seeds])
        found[metric] = _estimate(seeds, values.mean(axis=1), values.mean(axis=0))
    for name in (F1, F1_WITH_COSINE, AUC):
        reached = np.array([runs[seed].relevance[name] for seed in seeds])
        # Two equal clusters have no sampling error; a single one leaves the interval open.
        found[name] = _estimate(seeds, reached, np.full(min(len(seeds), 2), reached.mean()))
    return found


def _estimate(seeds: Sequence[int], values: np.ndarray, by_query: np.ndarray) -> Estimate:
    parts = (by_query - by_query.mean()) / len(by_query)
    return Estimate(
        seeds=tuple(seeds),
        values=values,
        parts=parts[None],
        members=np.ones((1, len(by_query)), np.bool_),
    )
