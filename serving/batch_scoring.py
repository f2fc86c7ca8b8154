"""A batch of requests through the model: what the scoring thread does.

A request that breaks a rule is refused by itself and spoils no other of its batch.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from features.errors import BadInputError
from serving.ab_routing import Bucket
from serving.exported import ExportedRanker
from serving.inputs import InputSpec
from serving.protocol import RefusedError, invalid
from serving.raw_requests import to_batch
from serving.server_log import describe
from serving.server_metrics import Metrics
from serving.slots import Slot

_SCORING_NICENESS = 5  # a third of the event loop's share where both want a core

_log = logging.getLogger("serving.scoring")

Raw = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request on its way to the model.

    Attributes:
        slot: name of the slot that scores it.
        raw: the request, with its history.
    """

    slot: Bucket
    raw: Raw

    @property
    def candidates(self) -> int:
        """How many candidates it has."""
        return len(self.raw["candidates"]["product_id"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """What the model says of one request.

    Attributes:
        model: fingerprint of the exported ranker.
        probabilities: [C] float32, all finite.
    """

    model: str
    probabilities: npt.NDArray[np.float32]


class BatchScoring:
    """Scores batches with the exported rankers that are in the slots at that moment.

    Args:
        slots: by name.
        metrics: counts sizes and times.
    """

    def __init__(self, slots: Mapping[Bucket, Slot], metrics: Metrics) -> None:
        self._slots = slots
        self._metrics = metrics

    @staticmethod
    def prepare() -> None:
        """Make this thread's torch use one core, and let the event loop go first.

        The service has a process for each core. Refusing in time matters when all cores are busy:
        the scheduler prefers the thread that refuses.
        """
        torch.set_num_threads(1)
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _SCORING_NICENESS)

    def __call__(self, jobs: Sequence[Job]) -> list[Ranked | Exception]:
        """Return for each job what the model says, or why it is refused."""
        self._metrics.batch_requests.observe(len(jobs))
        self._metrics.batch_candidates.observe(sum(job.candidates for job in jobs))
        outcomes: dict[int, Ranked | Exception] = {}
        for name in self._slots:
            places = [place for place, job in enumerate(jobs) if job.slot == name]
            if places:
                ranker = self._slots[name].current  # once: a swap may come at any time
                raws = [fitted(jobs[p].raw, name, ranker, self._slots) for p in places]
                outcomes |= zip(places, self._of_slot(raws, ranker), strict=True)
        return [outcomes[place] for place in range(len(jobs))]

    def _of_slot(self, raws: Sequence[Raw], ranker: ExportedRanker) -> list[Ranked | Exception]:
        try:
            return self._together(raws, ranker)
        except BadInputError as error:
            if len(raws) == 1:
                return [invalid(str(error))]
            return self._one_by_one(raws, ranker)
        except Exception as error:
            if len(raws) == 1:
                _log.error("a request could not be scored: %s", describe(error))
                return [error]
            return self._one_by_one(raws, ranker)

    def _one_by_one(self, raws: Sequence[Raw], ranker: ExportedRanker) -> list[Ranked | Exception]:
        """Score requests of which one spoils what they would be together."""
        return [outcome for raw in raws for outcome in self._of_slot([raw], ranker)]

    def _together(self, raws: Sequence[Raw], ranker: ExportedRanker) -> list[Ranked | Exception]:
        started = time.monotonic()
        batch = to_batch(raws, ranker.manifest.inputs)
        made = time.monotonic()
        probabilities = ranker.score(batch)
        self._metrics.stages.labels("features").observe(made - started)
        self._metrics.stages.labels("model").observe(time.monotonic() - made)
        ends = batch.lengths.cumsum(0).tolist()[:-1]
        return [
            _checked(part, ranker.manifest.fingerprint) for part in np.split(probabilities, ends)
        ]


def _checked(probabilities: npt.NDArray[np.float32], fingerprint: str) -> Ranked | RefusedError:
    if not np.isfinite(probabilities).all():
        return invalid("features: the model gives no finite probability for these values")
    return Ranked(model=fingerprint, probabilities=probabilities)


def fitted(raw: Raw, slot: Bucket, ranker: ExportedRanker, slots: Mapping[Bucket, Slot]) -> Raw:
    """Return a request without the features that only the other slot's ranker reads.

    In an A/B test of a feature, callers send what either ranker reads. What neither reads stays,
    and is refused.
    """
    others = [other.current for name, other in slots.items() if name != slot]
    if all(other.manifest.inputs == ranker.manifest.inputs for other in others):
        return raw
    request, candidate = _only_elsewhere(
        ranker.manifest.inputs, [other.manifest.inputs for other in others]
    )
    candidates = dict(raw["candidates"])
    candidates["features"] = _without(candidates.get("features"), candidate)
    return {
        **raw,
        "features": _without(raw.get("features"), request),
        "candidates": candidates,
    }


def _only_elsewhere(own: InputSpec, others: Sequence[InputSpec]) -> tuple[set[str], set[str]]:
    request = {i.name for other in others for i in other.request} - {i.name for i in own.request}
    candidate = {i.name for other in others for i in other.candidate}
    return request, candidate - {i.name for i in own.candidate}


def _without(features: Mapping[str, Any] | None, names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in (features or {}).items() if name not in names}
