"""The reason per feature group for one request: what each candidate's score loses without it.

The request is scored once as it is, and once more for each group with that group made unknown for
the whole request: an id or an embedding's id that no table knows, a number that is missing, an
empty purchase history. A group's contribution to a candidate is the log odds with it less the log
odds without it. Above 0 it speaks for a click.

``contributions`` are those differences themselves; in ``over_mean`` their mean over the request's
candidates is taken off, which leaves what moves a candidate up or down among the others: what
belongs to the user or the query shifts all candidates, and changes their order only as far as it
suits one better than another.

What it is not: the contributions do not add up to the log odds, since groups work together and
stand in for each other. Two features that tell the same both show little; counters that a caller
computed from the purchase history are features of their own and stay when the history goes. And a
model asked about a request with an unknown query answers from what it learned of such requests,
of which there were few. Integrated Gradients, which add up, are told offline by
``explain-ranker`` (`ranking.explain_request`); they need gradients, which a served ranker has not.
What is the same in both: the groups, one for each feature, an embedding or the history as a whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from features import columns
from features.batch import RequestBatch
from features.id_map import MISSING_ID
from features.schema import Kind, Level
from serving.raw_requests import to_batch

if TYPE_CHECKING:
    from serving.exported import ExportedRanker
    from serving.manifest import InputSpec

# As `ranking.attribution_groups` has them, which a service does not import: it brings training.
QUERY_EMBEDDING = "query embedding"
PRODUCT_EMBEDDING = "product embedding"
PURCHASE_HISTORY = "purchase history"

_NO_EMBEDDINGS = "dcn"

CONTRIBUTIONS_ARE = "log odds with the group less log odds without it"
_SURE = (1e-12, 1 - 1e-7)  # beyond these bounds a float32 probability is rounding


@dataclass(frozen=True, slots=True)
class Group:
    """What is made unknown together.

    Attributes:
        name: of the feature, or of an embedding or the purchase history.
        kind: of a feature; ``None`` for the others.
        level: whether the request or each candidate has it.
        row: of a feature among those of its kind and level.
    """

    name: str
    kind: Kind | None
    level: Level
    row: int = 0


def groups_of(inputs: "InputSpec", *, embeddings: bool) -> tuple[Group, ...]:
    """Return the groups of a ranker: embeddings and history, then each feature by itself.

    Args:
        inputs: the features that it reads.
        embeddings: whether it reads embeddings of query, product and purchase history.
    """
    made = []
    if embeddings:
        made.append(Group(QUERY_EMBEDDING, None, "request"))
        made.append(Group(PRODUCT_EMBEDDING, None, "candidate"))
        made.append(Group(PURCHASE_HISTORY, None, "request"))
    levels: tuple[tuple[Level, Any], ...]
    levels = (("request", inputs.request), ("candidate", inputs.candidate))
    for level, of_level in levels:
        rows = {"sparse": 0, "dense": 0}
        for feature in of_level:
            made.append(Group(feature.name, feature.kind, level, rows[feature.kind]))
            rows[feature.kind] += 1
    return tuple(made)


def explain(ranker: "ExportedRanker", request: Mapping[str, Any]) -> dict[str, Any]:
    """Return why the candidates of a raw request score as they do, as JSON.

    Args:
        ranker: the one that answers the request.
        request: as it is scored, with the purchase history that was looked up for it.

    Returns:
        ``model``, the ranker's fingerprint; ``groups`` [G] names; for C candidates in the
        request's order ``probabilities`` [C], ``contributions`` and ``over_mean`` [C][G] in log
        odds, ``values`` [C][G] as given (of the history the number of purchases); ``history``
        with ``product_ids`` and ``age_days``, null where the request has no ages; and what
        ``contributions_are``.

    Raises:
        BadInputError: the request breaks a rule.
    """
    manifest = ranker.manifest
    groups = groups_of(manifest.inputs, embeddings=manifest.model != _NO_EMBEDDINGS)
    batch = to_batch([request], manifest.inputs)
    probabilities = ranker.score(occluded(batch, groups)).reshape(1 + len(groups), -1)
    log_odds = _log_odds(probabilities)
    contributions = (log_odds[0] - log_odds[1:]).T
    # A request without candidates has no mean.
    over_mean = contributions - contributions.sum(axis=0) / max(len(contributions), 1)
    return {
        "model": manifest.fingerprint,
        "groups": [group.name for group in groups],
        "probabilities": probabilities[0].tolist(),
        "contributions": contributions.round(6).tolist(),
        "over_mean": over_mean.round(6).tolist(),
        "values": _values(request, groups),
        "history": {
            "product_ids": list(request.get("history") or ()),
            "age_days": request.get("history_age_days"),
        },
        "contributions_are": CONTRIBUTIONS_ARE,
    }


def occluded(batch: RequestBatch, groups: Sequence[Group]) -> RequestBatch:
    """Return one request 1 + G times: as it is, then without each group.

    Args:
        batch: of one request.
        groups: [G].
    """
    copies = 1 + len(groups)
    tensors = {
        name: torch.stack([getattr(batch, name)] * copies, dim=-2)
        for name in ("request_sparse", "request_dense", "candidate_sparse", "candidate_dense")
    }  # [S or D, 1 + G, 1 or C]
    query = batch.query.repeat(copies)
    product = batch.product.repeat(copies, 1)
    has_history = torch.ones(copies, dtype=torch.int64)
    for copy, group in enumerate(groups, start=1):
        if group.kind is not None:
            unknown = MISSING_ID if group.kind == "sparse" else float("nan")
            tensors[f"{group.level}_{group.kind}"][group.row, copy] = unknown
        elif group.name == QUERY_EMBEDDING:
            query[copy] = MISSING_ID
        elif group.name == PRODUCT_EMBEDDING:
            product[copy] = MISSING_ID
        else:
            has_history[copy] = 0
    with_history = int(has_history.sum())
    return RequestBatch(
        lengths=batch.lengths.repeat(copies),
        query=query,
        history=batch.history.repeat(with_history),
        history_age=batch.history_age.repeat(with_history),
        history_lengths=batch.history_lengths * has_history,
        product=product.flatten(),
        clicked=torch.zeros(0),
        weight=batch.weight.repeat(copies),
        **{name: _side_by_side(tensor) for name, tensor in tensors.items()},
    )


def _side_by_side(tensor: Tensor) -> Tensor:
    """Return [F, copies, N] as [F, copies * N]."""
    return tensor.reshape(tensor.shape[0], tensor.shape[1] * tensor.shape[2])


def _log_odds(probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    sure = probabilities.astype(np.float64).clip(*_SURE)
    return np.log(sure) - np.log1p(-sure)


def _values(request: Mapping[str, Any], groups: Sequence[Group]) -> list[list[Any]]:
    """Return the value of each group for each candidate, as the request gives it."""
    candidates = request["candidates"]
    number = len(candidates[columns.PRODUCT_ID])
    given = {
        "request": request.get("features") or {},
        "candidate": candidates.get("features") or {},
    }
    by_group: list[Sequence[Any]] = []
    for group in groups:
        value = given[group.level].get(group.name)
        if group.kind is None:
            by_group.append(_own(request, group, number))
        elif group.level == "request":
            by_group.append([value] * number)
        else:
            by_group.append([None] * number if value is None else value)
    return [list(row) for row in zip(*by_group, strict=True)]


def _own(request: Mapping[str, Any], group: Group, number: int) -> Sequence[Any]:
    if group.name == QUERY_EMBEDDING:
        return [request[columns.QUERY]] * number
    if group.name == PURCHASE_HISTORY:
        return [len(request.get("history") or ())] * number
    return request["candidates"][columns.PRODUCT_ID]
