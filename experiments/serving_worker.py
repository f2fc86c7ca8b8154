"""One process of ``benchmark-serving``: builds one served model and measures its cases.

A process of its own tells the memory that serving takes, and leaves nothing behind for the next
variant. Each case is written as it ends, so that a stopped benchmark goes on from there.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.serving_cases import Case, Plan, Variant
from experiments.serving_fetching import (
    RedisPy,
    ServerUse,
    Thin,
    open_redis,
    remove_tables,
    write_tables,
)
from experiments.serving_models import (
    DenseServer,
    FetchingServer,
    FusedServer,
    build,
    grown_tables,
    open_package,
    open_ranker,
    tables_of,
    without_tables,
)
from experiments.serving_quality import table_quality
from experiments.serving_roofline import Rates, Work, to_json
from experiments.serving_timing import closed_loop, open_loop, resident_mb
from experiments.serving_workload import FeaturePool, RequestSource, grown_ids
from features.console import say
from features.files import write_text
from serving.inputs import InputSpec

LIMITS, QUALITY = "limits", "quality"
"""Names under which `Results` keeps what is of no case."""

_PROBES = 8  # requests whose probabilities are compared between variants
_DENSE_REQUESTS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Measurements kept as files, one a case; those of other settings count as missing.

    Attributes:
        folder: of the files.
        settings: what they depend on.
    """

    folder: Path
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path, settings: Mapping[str, Any]) -> "Results":
        """Return the measurements of some settings, whose tuples become lists as in JSON."""
        return cls(folder=folder, settings=json.loads(json.dumps(settings)))

    def load(self, name: str) -> dict[str, Any] | None:
        """Return what was kept under a name, None where there is nothing of these settings."""
        try:
            document = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(document, dict) or document.get("settings") != dict(self.settings):
            return None
        return document["measured"]

    def save(self, name: str, measured: Mapping[str, Any]) -> None:
        """Keep a measurement."""
        document = {"settings": dict(self.settings), "measured": dict(measured)}
        write_text(self.folder / f"{name}.json", json.dumps(document, indent=2) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a process needs to know.

    Attributes:
        run: folder of the training run.
        plan: how much is measured.
        inputs: of the exported ranker.
        pool: features of real requests.
        results: where measurements go.
        core: processor core to run on; any where None.
    """

    run: Path
    plan: Plan
    inputs: InputSpec
    pool: FeaturePool
    results: Results
    core: int | None


def prepare_process(core: int | None) -> None:
    """Let this process use one thread, on one core."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)


@contextmanager
def serving_state() -> Iterator[None]:
    """Run models as `serving.exported` does."""
    with torch.inference_mode(), torch.jit.optimized_execution(False):
        yield


def measure_variant(
    task: Task, variant: Variant, cases: Sequence[Case], source: Path | str
) -> None:
    """Build a variant and measure those of its cases that are missing.

    Args:
        task: the settings.
        variant: what to build.
        cases: of the whole benchmark; a variant's cases under load come after the others.
        source: URL of the Redis server with the tables, for a fetching variant; for others the
            path of the compiled model.
    """
    with ExitStack() as stack:
        bench = _Bench(task, variant, source, stack)
        stack.enter_context(serving_state())
        if task.results.load(variant.name) is None:
            task.results.save(variant.name, bench.describe())
        for number, case in enumerate(cases, 1):
            if case.variant != variant or task.results.load(case.key) is not None:
                continue
            found = bench.measure(case)
            task.results.save(case.key, found)
            say(
                f"[{number}/{len(cases)}] {case.title}: p50 {found['p50_ms']:.3f} ms, "
                f"p99 {found['p99_ms']:.3f} ms ({found['requests']:,} requests)"
            )


class _Bench:
    """One built variant and the requests to send it."""

    def __init__(self, task: Task, variant: Variant, source: Path | str, stack: ExitStack) -> None:
        self._task, self._variant, self._plan = task, variant, task.plan
        started = time.perf_counter()
        ranker = open_ranker(task.run)
        if variant.runtime == "pt2":
            tables = tables_of(ranker)  # as it was compiled
        else:
            tables = grown_tables(ranker, self._plan.rows, self._plan.seed)
        self._requests = RequestSource(
            task.pool, tables["product"].ids, tables["query"].ids, self._plan.seed
        )
        self._dim = tables["product"].weight.shape[1]
        self._rows = len(tables["product"].ids)
        if variant.mode == "fetched":
            without_tables(ranker)
        elif variant.runtime != "pt2":
            ranker.replace_tables(tables)
        del tables
        if variant.runtime == "pt2":
            self._model = open_package(Path(source))
        else:
            example = self._requests.draw(2, 3, "zipf", 1)[0]
            self._model = build(ranker, variant, example, task.inputs)
        del ranker
        self._seconds = time.perf_counter() - started
        self._memory = resident_mb()
        if variant.mode == "fetched":
            self._connect(str(source), stack)

    def _connect(self, url: str, stack: ExitStack) -> None:
        self._client = (RedisPy if self._variant.client == "redis-py" else Thin)(url, self._dim)
        self._redis = open_redis(url)
        stack.callback(self._redis.close)
        stack.callback(self._client.close)

    def _server(self, requests: Sequence[Any]) -> Any:
        if self._variant.mode == "fused":
            return FusedServer(self._model, requests)
        return FetchingServer(self._model, self._client, requests)

    def describe(self) -> dict[str, Any]:
        """Return memory, and probabilities to compare with those of other variants."""
        found: dict[str, Any] = {
            "rows": self._rows,
            "model_bytes": self._model.bytes,
            "rss_mb": self._memory,
            "seconds_to_build": self._seconds,
            "probabilities": None,  # a compiled model has its own tables, and so other requests
        }
        if self._variant.runtime != "pt2":
            probes = self._requests.draw(*self._plan.headline, "uniform", _PROBES)
            server = self._server(probes)
            found["probabilities"] = [server.probabilities(n) for n in range(_PROBES)]
        if self._variant.mode == "fetched":
            found["redis_rss_mb"] = ServerUse.now(self._redis).rss_mb
        return found

    def measure(self, case: Case) -> dict[str, Any]:
        """Return the measurement of a case."""
        requests = self._requests.draw(case.candidates, case.history, case.popularity)
        server = self._server(requests)
        plan, different = self._plan, len(requests)
        before = self._redis_seconds()
        if case.load is None:
            found = closed_loop(
                server,
                server.stages,
                different=different,
                requests=plan.requests,
                seconds=plan.seconds,
            )
            self._split_stages(found, requests)
        else:
            found = open_loop(
                server,
                different=different,
                rate=case.load * self._capacity(case),
                seconds=plan.load_seconds,
                seed=plan.seed,
            )
        if before is not None:
            used = (self._redis_seconds() or 0) - before
            found["redis_cpu_ms"] = used * 1e3 / (found["requests"] + found["warm_up"])
        found["measured_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return found

    def _capacity(self, case: Case) -> float:
        """Return the requests a second that the variant answers without a pause."""
        alone = Case(
            variant=case.variant,
            candidates=case.candidates,
            history=case.history,
            popularity=case.popularity,
        )
        measured = self._task.results.load(alone.key)
        assert measured is not None, "cases under load come after those without"
        return 1e3 / measured["mean_ms"]

    def _redis_seconds(self) -> float | None:
        if self._variant.mode == "fused":
            return None
        return ServerUse.now(self._redis).cpu_seconds

    def _split_stages(self, found: dict[str, Any], requests: Sequence[Any]) -> None:
        """Tell lookups from the dense part, which a fused model does in one call."""
        if self._variant.mode == "fetched" or self._model.dense is None:
            return
        server = DenseServer(self._model, requests, self._dim)
        alone = closed_loop(
            server,
            server.stages,
            different=len(requests),
            requests=min(_DENSE_REQUESTS, self._plan.requests),
            seconds=self._plan.seconds / 4,
        )["stages_ms"]["dense"]
        whole = found["stages_ms"].pop("score")
        found["stages_ms"] = {
            "lookups": {name: max(whole[name] - alone[name], 0.0) for name in whole},
            "dense": alone,
        }


def measure_ground(task: Task, data: Path) -> None:
    """Measure, where that is missing, what the tables cost in AUC and what this machine reaches.

    Args:
        task: the settings.
        data: dataset of the run.
    """
    plan = task.plan
    if task.results.load(QUALITY) is None:
        say(f"AUC of {plan.quality_requests:,} evaluation requests with each type of tables")
        found = table_quality(task.run, data, plan.quality_requests, plan.seed)
        task.results.save(QUALITY, found)
    if task.results.load(LIMITS) is None:
        say("rates of this machine")
        ranker = open_ranker(task.run)
        tables = grown_tables(ranker, max(plan.candidates), plan.seed)
        source = RequestSource(task.pool, tables["product"].ids, tables["query"].ids, plan.seed)
        history = plan.headline[1]
        requests = [source.draw(count, history, "uniform", 1)[0] for count in plan.candidates]
        work = Work.measure(ranker, requests)
        rates = Rates.measure(plan.rows, work.weight_bytes, plan.seed)
        task.results.save(LIMITS, to_json(work, rates))


def fill_redis(task: Task, url: str) -> None:
    """Put the grown tables into Redis."""
    ranker = open_ranker(task.run)
    write_tables(url, grown_tables(ranker, task.plan.rows, task.plan.seed))


def empty_redis(task: Task, url: str) -> None:
    """Take out of Redis what `fill_redis` put there."""
    tables = tables_of(open_ranker(task.run))
    remove_tables(url, {name: grown_ids(table, task.plan.rows) for name, table in tables.items()})
