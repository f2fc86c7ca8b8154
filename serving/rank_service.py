"""What happens to a request that was let in: history, bucket, score, answer, exposure."""

import asyncio
import hashlib
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.ab_routing import CONTROL, Bucket, Routing
from serving.batch_scoring import BatchScoring, Job, Ranked, fitted
from serving.batching import Batcher, BatcherClosedError
from serving.exported import ExportedRanker
from serving.exposure_log import ExposureLog, now
from serving.feature_store import FeatureStore, StoreUnavailableError
from serving.protocol import Limits, RefusedError, answer, best_first, read_request, too_late
from serving.server_config import ServerConfig
from serving.server_metrics import Metrics
from serving.slots import Slot

_STORE_THREADS = 8
_WARM_UP_S = 600
_log = logging.getLogger("serving.ranking")


class RankService:
    """Ranks requests with the exported rankers of its slots; lives in one event loop.

    Attributes:
        slots: by name; ``control`` is always there.
        metrics: what it counts.
        limits: of one request.
        stopping: whether the process has been told to stop.
    """

    def __init__(
        self,
        config: ServerConfig,
        slots: Mapping[Bucket, Slot],
        *,
        metrics: Metrics,
        store: FeatureStore | None = None,
        exposures: ExposureLog | None = None,
    ) -> None:
        """Start the scoring thread; to be called where an event loop runs."""
        self.slots = slots
        self.metrics = metrics
        self.stopping = False
        self.limits = Limits(candidates=config.max_candidates, history=config.max_history)
        self._routing = None
        if len(slots) > 1:
            self._routing = Routing(salt=config.salt, treatment_share=config.treatment_share)
        self._store = store
        self._store_threads = ThreadPoolExecutor(_STORE_THREADS, "store")
        self._exposures = exposures
        self._dropped = 0  # exposures that are counted as lost
        scoring = BatchScoring(slots, metrics)
        self._batcher: Batcher[Job, Ranked] = Batcher(
            scoring,
            most=lambda: 1 if self._one_a_batch else config.batch_candidates,
            wait_s=config.batch_wait_ms / 1000,
            prepare=scoring.prepare,
            waited=metrics.stages.labels("queue").observe,
        )

    @property
    def healthy(self) -> bool:
        """Whether the scoring thread works."""
        return self._batcher.alive

    @property
    def _one_a_batch(self) -> bool:
        """Whether the rankers are faster one request at a time."""
        return all(slot.current.manifest.one_request_a_batch for slot in self.slots.values())

    async def rank(self, body: bytes, request_id: str, deadline: float) -> bytes:
        """Return the body of the answer.

        Args:
            body: of the request.
            request_id: of the answer and of the exposure log.
            deadline: of `time.monotonic`.

        Raises:
            RefusedError: 400 or 422 for the body, 503 where the store cannot answer, 504 where the
                deadline passed.
        """
        raw = read_request(body, self.limits)
        raw, bucket = await self._prepared(raw, deadline)
        job = Job(slot=bucket or CONTROL, raw=raw)
        try:
            ranked = await self._batcher.submit(job, max(job.candidates, 1), deadline)
        except TimeoutError:
            raise too_late() from None
        except BatcherClosedError:
            raise RefusedError(503, "stopping", "The service is stopping.") from None
        self.metrics.ranked.labels(job.slot).inc()
        order = best_first(ranked.probabilities)
        if self._exposures is not None:
            self._expose(request_id, raw, bucket, ranked, order)
        return answer(
            request_id=request_id,
            model=ranked.model,
            bucket=bucket,
            probabilities=ranked.probabilities,
            order=order,
        )

    async def prepared(self, body: bytes, deadline: float) -> tuple[dict[str, Any], ExportedRanker]:
        """Return a request with its history, and the ranker that its user meets.

        Raises:
            RefusedError: as for `rank`.
        """
        raw, bucket = await self._prepared(read_request(body, self.limits), deadline)
        slot = bucket or CONTROL
        ranker = self.slots[slot].current
        return dict(fitted(raw, slot, ranker, self.slots)), ranker

    async def warm_up(self) -> None:
        """Score the golden requests: the first runs of a process are slow."""
        until = time.monotonic() + _WARM_UP_S
        for name, slot in self.slots.items():
            jobs = [Job(slot=name, raw=golden.request) for golden in slot.current.golden]
            for job in jobs:
                await self._batcher.submit(job, max(job.candidates, 1), until)

    async def close(self) -> None:
        """Answer what was accepted, and let go of threads, store and log."""
        await self._batcher.close()
        self._store_threads.shutdown(cancel_futures=True)
        if self._store is not None:
            self._store.close()
        if self._exposures is not None:
            await asyncio.to_thread(self._exposures.close)
            self.count_dropped()

    def count_dropped(self) -> None:
        """Count the exposures that were lost since the last call, and say why."""
        if self._exposures is None:
            return
        lost = self._exposures.dropped - self._dropped
        if lost:
            self._dropped += lost
            self.metrics.exposures_dropped.inc(lost)
            _log.error("%d exposures were lost: %s", lost, self._exposures.last_error or "too many")

    async def _prepared(
        self, raw: dict[str, Any], deadline: float
    ) -> tuple[dict[str, Any], Bucket | None]:
        user_id = raw.pop("user_id", None)
        if user_id is None:
            return raw, None
        bucket = self._routing.bucket(user_id) if self._routing is not None else None
        if self._store is not None and "history" not in raw:
            raw |= await self._history(user_id, deadline)
        return raw | {"user_id": user_id}, bucket

    async def _history(self, user_id: int, deadline: float) -> dict[str, Any]:
        """Look up a user's purchases; in a thread, since a store may wait for its server."""
        assert self._store is not None
        started = time.monotonic()
        looking = asyncio.get_running_loop().run_in_executor(
            self._store_threads, self._store.history, user_id
        )
        try:
            async with asyncio.timeout(deadline - started):
                found = await looking
        except TimeoutError:
            self.metrics.store_failures.inc()
            raise too_late() from None
        except StoreUnavailableError as error:
            self.metrics.store_failures.inc()
            _log.warning("the feature store cannot answer: %s", error)
            raise RefusedError(503, "store_unavailable", f"{error}") from None
        self.metrics.store_seconds.observe(time.monotonic() - started)
        return {
            "history": found.product_ids.tolist(),
            "history_age_days": found.age_days.tolist(),
        }

    def _expose(
        self,
        request_id: str,
        raw: dict[str, Any],
        bucket: Bucket | None,
        ranked: Ranked,
        order: npt.NDArray[np.int64],
    ) -> None:
        assert self._exposures is not None
        query = hashlib.blake2b(raw["query"].encode(), digest_size=8).hexdigest()
        self._exposures.write(
            {
                "request_id": request_id,
                "time": now(),
                "user_id": raw.get("user_id"),
                "bucket": bucket,
                "model": ranked.model,
                "query_hash": query,
                "candidates": np.array(raw["candidates"]["product_id"], np.int64)[order],
                "probabilities": ranked.probabilities[order],
            }
        )
