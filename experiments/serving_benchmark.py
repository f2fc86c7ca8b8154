"""The paper's comparison of fused tables with feature fetching, in one run on one machine.

(The paper's Section 4.3.2.) Each way to serve has a process of its own, one after the other, on one
core; Redis has another core where there is one.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from experiments.dashclip_speed import describe_machine
from experiments.serving_cases import FETCHED, FUSED, THIN, Case, Plan, Variant
from experiments.serving_document import make_document
from experiments.serving_fetching import open_redis, running_redis
from experiments.serving_models import check_servable
from experiments.serving_quality import feature_pool
from experiments.serving_table import write_results
from experiments.serving_timing import own_cores
from experiments.serving_worker import (
    Results,
    Task,
    empty_redis,
    fill_redis,
    measure_ground,
    measure_variant,
    prepare_process,
)
from features.console import say
from features.errors import BadInputError
from ranking.explain_sample import Week
from ranking.run import versions
from ranking.versions import installed_versions
from serving.exported import ExportedRanker
from serving.manifest import PT2

_CASES = "cases"
_CLIENT = ("numpy", "redis", "hiredis")

VARIANTS = (
    FUSED,
    FETCHED,
    THIN,
    Variant(mode="fused", runtime="torchscript", table_dtype="float32"),
    Variant(mode="fused", runtime="torchscript", table_dtype="float16"),
    Variant(mode="fused", runtime="torchscript", table_dtype="int4"),
    Variant(mode="fused", runtime="eager", table_dtype="float32"),
    Variant(mode="fused", runtime="eager", table_dtype="int8"),
    Variant(mode="fused", runtime="pt2", table_dtype="float32"),
)


def benchmark_serving(
    bundle: Path,
    run: Path,
    data: Path,
    output: Path,
    plan: Plan,
    *,
    redis: str | None = None,
    variants: Sequence[Variant] = VARIANTS,
    command: str = "",
) -> dict[str, Any]:
    """Measure what is missing, print the figures and write them; returns ``serving.json``.

    Args:
        bundle: folder that export-ranker wrote.
        run: the training run that it was made of.
        data: dataset of that run.
        output: folder to write.
        plan: how much is measured.
        redis: URL of a Redis server to put the tables in; one is started where None.
        variants: ways to serve, `FUSED`, `FETCHED` and `THIN` among them.
        command: the command line, for the record.

    Raises:
        BadInputError: the bundle, the run and the data do not belong together, or there is no
            Redis.
    """
    exported = ExportedRanker.open(bundle)
    exported.check_golden()
    week = Week.open(run, data)
    if week.bundle.provenance != exported.manifest.provenance:
        raise BadInputError(
            f"{bundle}: was not exported from {run}; name its training run with --run"
        )
    check_servable(week.bundle.ranker, str(run))
    machine = describe_machine()
    core, redis_core = own_cores()
    machine |= {"threads": 1, "model_core": core, "redis_core": redis_core, "redis": redis}
    settings = {"cpu": machine["cpu"], "redis": redis, "plan": asdict(plan)}
    settings |= {"model": exported.manifest.fingerprint}
    task = Task(
        run=run,
        plan=plan,
        inputs=exported.manifest.inputs,
        pool=feature_pool(week, plan.seed),
        results=Results.of(output / _CASES, settings),
        core=core,
    )
    package = bundle / PT2
    variants = [v for v in variants if v.runtime != "pt2" or package.is_file()]
    cases = plan.cases(variants)
    _in_a_process(task, measure_ground, data)
    missing = [v for v in variants if not _complete(task, v, cases)]
    for mode, some in groupby(missing, lambda variant: variant.mode):
        with ExitStack() as stack:
            source: Path | str = package
            if mode == "fetched":
                source = stack.enter_context(filled_redis(task, redis, redis_core))
            for variant in some:
                say(f"building {variant.name}")
                _in_a_process(task, measure_variant, variant, cases, source)
    document = {
        "dataset": exported.manifest.dataset,
        "caveat": week.bundle.schema.caveat,
        "model": exported.manifest.fingerprint,
        "machine": machine,
        **make_document(task.results, plan, cases),
        "command": command,
        "versions": versions() | installed_versions(_CLIENT),
    }
    write_results(output, document)
    return document


def _complete(task: Task, variant: Variant, cases: Sequence[Case]) -> bool:
    """Tell whether all of a variant is measured."""
    names = [variant.name, *(case.key for case in cases if case.variant == variant)]
    return all(task.results.load(name) is not None for name in names)


@contextmanager
def filled_redis(task: Task, redis: str | None, core: int | None) -> Iterator[str]:
    """Yield the URL of a Redis server with the grown tables in it.

    Args:
        task: the settings.
        redis: URL of a server, which is left without them in the end; one is run where None.
        core: for the one that is run.
    """
    with ExitStack() as stack:
        url = redis or stack.enter_context(running_redis(core))
        open_redis(url).close()
        say(f"filling Redis with {2 * task.plan.rows:,} rows")
        if redis is not None:
            stack.callback(empty_redis, task, url)
        fill_redis(task, url)
        yield url


def _in_a_process(task: Task, action: Callable[..., None], *arguments: Any) -> None:
    """Run an action on the task in a new process, whose memory is its own.

    Raises:
        BadInputError: the process was killed, or raised it.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(
            1, mp_context=context, initializer=prepare_process, initargs=(task.core,)
        ) as pool:
            pool.submit(action, task, *arguments).result()
    except BrokenProcessPool as error:
        raise BadInputError(
            "a process of the benchmark was killed, as happens where memory runs out; take fewer "
            "--rows, or give the same command again to go on"
        ) from error
