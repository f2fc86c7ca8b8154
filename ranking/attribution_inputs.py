"""A sample's inputs of the ranker's dense layers, looked up once and then moved about.

Legend: ``B`` requests, ``C`` candidates, ``F`` columns of one input.
"""

from collections.abc import Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor

from features.schema import LEVELS
from ranking.attribution_groups import (
    EMBEDDINGS,
    PRODUCT_EMBEDDING,
    PURCHASE_HISTORY,
    QUERY_EMBEDDING,
    feature_levels,
    input_owners,
)
from ranking.encoded import EncodedBatch
from ranking.ranker import Ranker

_ROWS = 4096  # candidates computed at once, which bounds the memory beside the inputs


class SampleInputs:
    """Inputs of `Ranker.dense` for a sample of requests.

    Attributes:
        ranker: the model.
        inputs: [B, F] or [C, F] by name.
        owners: the feature that each column belongs to, by input.
        levels: the features and their levels.
        request_c: [C] int64, the request of each candidate.
    """

    def __init__(self, ranker: Ranker, batch: EncodedBatch) -> None:
        """Look the sample up.

        Args:
            ranker: the model.
            batch: the sample; each request has a candidate.
        """
        self.ranker = ranker
        self.levels = feature_levels(ranker)
        self.request_c = batch.request_of_candidate()
        self._batch = batch
        self.inputs = self._look_up(batch)
        self.owners = input_owners(ranker, self.inputs)

    @property
    def requests(self) -> int:
        """B."""
        return len(self._batch.query)

    @property
    def candidates(self) -> int:
        """C."""
        return self._batch.rows

    def rows(self, level: str) -> int:
        """Return B or C."""
        return self.requests if level == "request" else self.candidates

    @torch.no_grad()
    def logits(self, order: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the logits [C], with some features taken from elsewhere in the sample.

        Args:
            order: by feature, the request ([B] int64) or candidate ([C] int64), after the
                feature's level, that each one takes it from. A purchase history moves whole.
        """
        order = order or {}
        inputs = dict(self.inputs)
        if any(name in EMBEDDINGS for name in order):
            inputs |= self._look_up(self._moved_batch(order))
        for level in LEVELS:
            inputs[level] = self._moved_columns(level, order)
        found = []
        for first, last in self._batch.edges(max(1, round(self.candidates / _ROWS))):
            rows = self._batch.candidates(first, last)
            part = {
                name: tensor[rows] if self.of_candidates(tensor) else tensor[first:last]
                for name, tensor in inputs.items()
            }
            found.append(self.ranker.dense(part, self.request_c[rows] - first))
        return torch.cat(found)

    def spread(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the inputs [R, F] of some candidates ([R] int64), requests' inputs repeated."""
        requests = self.request_c[rows]
        return {
            name: tensor[rows if self.of_candidates(tensor) else requests]
            for name, tensor in self.inputs.items()
        }

    def average(self) -> dict[str, Tensor]:
        """Return the mean [1, F] of each input over all candidates."""
        weight_b = self._batch.candidate_offsets.diff().float() / self.candidates
        return {
            name: tensor.mean(0, keepdim=True)
            if self.of_candidates(tensor)
            else (weight_b @ tensor)[None]
            for name, tensor in self.inputs.items()
        }

    def of_candidates(self, tensor: Tensor) -> bool:
        """Whether an input has a row a candidate; as many requests make no difference then."""
        return len(tensor) == self.candidates

    @torch.no_grad()
    def _look_up(self, batch: EncodedBatch) -> dict[str, Tensor]:
        parts = [
            self.ranker.trained_lookups(part) | self.ranker.frozen_lookups(part)
            for part in batch.split(_ROWS)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _moved_columns(self, level: str, order: Mapping[str, Tensor]) -> Tensor:
        """Return the embeddings and values of one level's features, some from elsewhere."""
        moved = {name: rows for name, rows in order.items() if self.levels[name] == level}
        if not moved:
            return self.inputs[level]
        owners = self.owners[level]
        result = self.inputs[level].clone()
        for name, rows in moved.items():
            places = torch.tensor([i for i, owner in enumerate(owners) if owner == name])
            if len(places):
                result[:, places] = self.inputs[level][rows][:, places]
        return result

    def _moved_batch(self, order: Mapping[str, Tensor]) -> EncodedBatch:
        """Return the sample with products, queries or histories from elsewhere."""
        changes: dict[str, Tensor] = {}
        if PRODUCT_EMBEDDING in order:
            changes["product"] = self._batch.product[order[PRODUCT_EMBEDDING]]
        if QUERY_EMBEDDING in order:
            changes["query"] = self._batch.query[order[QUERY_EMBEDDING]]
        if PURCHASE_HISTORY in order:
            moved = self._batch.reorder(order[PURCHASE_HISTORY])
            history = [f.name for f in fields(moved) if f.name.startswith("history")]
            changes |= {name: getattr(moved, name) for name in history}
        return replace(self._batch, **changes)
