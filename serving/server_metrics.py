"""What the service counts, for Prometheus, summed over its worker processes.

prometheus-client's multiprocess mode: each process writes files of its own in one folder, and the
worker that is asked adds them up. So a scrape may meet any worker.
"""

import os

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

# prometheus-client reads it when it is imported; the parent process sets it.
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05),
    *(0.075, 0.1, 0.25, 0.5, 1.0, 2.5),
)
_SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


class Metrics:
    """The counters of one process.

    Attributes:
        requests: answers by endpoint and status; refusals too.
        seconds: from a request's headers to its answer, of those that were accepted.
        stages: seconds of ``queue`` (waiting for the model), ``features`` (raw values to tensors,
            a batch) and ``model`` (a batch).
        batch_requests: requests scored together.
        batch_candidates: candidates scored together.
        ranked: requests ranked, by slot.
        pending: requests that are accepted and not answered.
        store_seconds: of looking up a history.
        store_failures: lookups that failed.
        swaps: exported rankers taken up while serving, by slot.
        failed_loads: exported rankers that were refused while serving, by slot.
        exposures_dropped: exposures that could not be written.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"ranker_{name}", text, labels, registry=self._registry)

        def histogram(
            name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS
        ) -> Histogram:
            return Histogram(
                f"ranker_{name}", text, labels, registry=self._registry, buckets=buckets
            )

        self.requests = counter("requests", "Answers by endpoint and status", "endpoint", "status")
        self.seconds = histogram("request_seconds", "Time to answer an accepted request")
        self.stages = histogram("stage_seconds", "Time in a stage", "stage")
        self.batch_requests = histogram("batch_requests", "Requests of a batch", buckets=_SIZES)
        self.batch_candidates = histogram(
            "batch_candidates", "Candidates of a batch", buckets=_SIZES
        )
        self.ranked = counter("ranked", "Requests ranked", "slot")
        self.pending = Gauge(
            "ranker_pending_requests",
            "Requests accepted and not answered",
            registry=self._registry,
            multiprocess_mode="livesum",
        )
        self.store_seconds = histogram("store_seconds", "Time to look up a purchase history")
        self.store_failures = counter("store_failures", "Lookups of a history that failed")
        self.swaps = counter("swaps", "Exported rankers taken up while serving", "slot")
        self.failed_loads = counter(
            "failed_loads", "Exported rankers refused while serving", "slot"
        )
        self.exposures_dropped = counter("exposures_dropped", "Exposures not written")

    def text(self) -> bytes:
        """Return all processes' metrics in Prometheus's text format."""
        if FOLDER_VARIABLE not in os.environ:
            return generate_latest(self._registry)
        of_all = CollectorRegistry()
        MultiProcessCollector(of_all)
        return generate_latest(of_all)
