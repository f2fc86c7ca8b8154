"""The gate of an export: every form of the model against the trained ranker, on real requests.

What is compared: the trained ranker itself (``eager``), the online ranker with the chosen tables
(``quantised``), the same as TorchScript in memory (``scripted``) and read back from its file
(``loaded``), and the float model compiled ahead of time (``pt2``).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from features.batch import RequestBatch
from features.console import progress_bar
from features.errors import BadInputError
from features.schema import DatasetSchema
from serving.embedding_table import TableDtype

Floats = npt.NDArray[np.float32]
Score = Callable[[RequestBatch], Tensor]

_BATCH = 16  # requests


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far a form of the model may be from another.

    Attributes:
        probability: the largest difference of any probability.
        auc: the largest change of AUC on the evaluation requests.
    """

    probability: float
    auc: float


BOUNDS: Mapping[TableDtype, Bounds] = {
    "float32": Bounds(1e-3, 1e-4),  # training rounds means of float16 tables to float16
    "float16": Bounds(2e-3, 1e-4),
    "int8": Bounds(0.05, 5e-4),
    "int4": Bounds(0.5, 1e-2),
}
SAME = Bounds(1e-5, 1e-6)  # the same operators, packed in another way


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What the forms are compared on.

    Attributes:
        batches: real evaluation requests, a few a batch.
        clicked: [C] of them.
        edges: cases that real requests do not have, by name.
    """

    batches: list[RequestBatch]
    clicked: npt.NDArray[np.bool_]
    edges: dict[str, RequestBatch]

    @classmethod
    def of(cls, records: pa.Table, schema: DatasetSchema) -> "Sample":
        """Make batches of request records, and the edge cases of the first ones."""
        batches = [
            RequestBatch.from_records(records.slice(start, _BATCH), schema)
            for start in range(0, len(records), _BATCH)
        ]
        clicked = torch.cat([batch.clicked for batch in batches]).numpy() > 0
        return cls(batches=batches, clicked=clicked, edges=edge_cases(records, schema))


def edge_cases(records: pa.Table, schema: DatasetSchema) -> dict[str, RequestBatch]:
    """Return batches at the edges of what may come, made of real requests."""
    few = RequestBatch.from_records(records.slice(0, 8), schema)
    one = RequestBatch.from_records(records.slice(0, 1), schema)
    flat = records.slice(0, 256)
    many = pooled_request(RequestBatch.from_records(flat, schema), 1000, 1000)
    nothing = torch.zeros(0, dtype=torch.int64)
    first = pooled_request(one, 1, len(one.history))
    return {
        "unknown ids": replace(
            few,
            query=few.query * 0 - 7,
            product=few.product * 0 - 7,
            history=few.history * 0 - 7,
            request_sparse=few.request_sparse * 0 - 7,
            candidate_sparse=few.candidate_sparse * 0 - 7,
        ),
        "missing values": replace(
            few,
            request_dense=few.request_dense * torch.nan,
            candidate_dense=few.candidate_dense * torch.nan,
        ),
        "empty histories": replace(
            few,
            history=nothing,
            history_age=nothing.short(),
            history_lengths=few.history_lengths * 0,
        ),
        "no candidates": pooled_request(one, 0, len(one.history)),
        "one candidate": first,
        "1,000 candidates": many,
    }


def pooled_request(batch: RequestBatch, candidates: int, purchases: int) -> RequestBatch:
    """Return one request with candidates and purchases of all of a batch, again and again.

    Args:
        batch: request, query and features are those of its first request.
        candidates: how many candidates it gets.
        purchases: the most purchases that it gets.
    """
    shown = torch.arange(candidates) % max(len(batch.product), 1)
    bought = torch.arange(purchases if len(batch.history) else 0) % max(len(batch.history), 1)
    return RequestBatch(
        lengths=torch.tensor([candidates]),
        query=batch.query[:1],
        history=batch.history[bought],
        history_age=batch.history_age[bought],
        history_lengths=torch.tensor([len(bought)]),
        request_sparse=batch.request_sparse[:, :1].contiguous(),
        request_dense=batch.request_dense[:, :1].contiguous(),
        product=batch.product[shown],
        candidate_sparse=batch.candidate_sparse[:, shown],
        candidate_dense=batch.candidate_dense[:, shown],
        clicked=torch.zeros(0),
        weight=batch.weight[:1],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What one form of the model gives.

    Attributes:
        real: [C] probabilities of the evaluation requests.
        edges: probabilities of each edge case.
    """

    real: Floats
    edges: dict[str, Floats]

    @classmethod
    def of(cls, name: str, score: Score, sample: Sample) -> "Scores":
        """Score the sample with one form."""
        with torch.no_grad(), progress_bar() as progress:
            batches = progress.track(sample.batches, description=f"scoring: {name}")
            found = [score(batch).numpy() for batch in batches]
            edges = {name: score(batch).numpy() for name, batch in sample.edges.items()}
        return cls(real=np.concatenate(found), edges=edges)


def compare(
    name: str,
    found: Scores,
    against: str,
    expected: Scores,
    clicked: npt.NDArray[np.bool_],
    bounds: Bounds,
) -> dict[str, Any]:
    """Return how far two forms are apart, with the bounds and whether they hold.

    Args:
        name: of the form.
        found: its scores.
        against: name of the other.
        expected: the other's scores.
        clicked: [C], for AUC.
        bounds: how far they may be apart.
    """
    differences = {"evaluation requests": _largest(found.real, expected.real)}
    for edge, probabilities in found.edges.items():
        differences[edge] = _largest(probabilities, expected.edges[edge])
    auc, expected_auc = (float(roc_auc_score(clicked, s.real)) for s in (found, expected))
    largest = max(differences.values())
    return {
        "form": name,
        "against": against,
        "auc": auc,
        "auc_change": auc - expected_auc,
        "largest_difference": largest,
        "differences": differences,
        "bounds": {"probability": bounds.probability, "auc": bounds.auc},
        "passed": largest <= bounds.probability and abs(auc - expected_auc) <= bounds.auc,
    }


def _largest(found: Floats, expected: Floats) -> float:
    """Return the largest difference; infinity for another number of them or what is no number."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max(initial=0))


def require_parity(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise for the first form outside its bounds.

    Raises:
        BadInputError: it names the form, what was measured, and the bounds.
    """
    for row in rows:
        if not row["passed"]:
            worst = max(row["differences"], key=row["differences"].get)
            bounds = row["bounds"]
            raise BadInputError(
                f"not exported: the {row['form']} model differs from the {row['against']} one by "
                f"up to {row['largest_difference']:.2g} in probability ({worst}; at most "
                f"{bounds['probability']:g}) and {row['auc_change']:+.2g} in AUC (at most "
                f"{bounds['auc']:g})"
            )
