"""The ranking benchmark from a dataset folder to its table: the paper's Table 2 and beyond."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from embeddings.default_tables import ensure_tables
from experiments.floors import import_lightgbm
from experiments.ranking_results import EvaluationWeek, VariantResult
from experiments.ranking_runs import Plan, Run, execute
from experiments.ranking_table import write_results
from experiments.ranking_variants import Variant, choose, comparisons
from features import columns
from features.config_file import from_toml
from features.console import progress_bar, say
from features.errors import BadInputError
from features.requests import RequestsManifest, build_requests
from features.schema import DatasetSchema
from ranking.bundle import PretrainedTables
from ranking.config import RankerConfig, TrainingConfig
from ranking.run import TrainingData, resolve, versions

KEEP_UNCLICKED = 0.1
_WEEKS = 3


def shared_config(path: Path | None, keep_unclicked: float | None) -> RankerConfig:
    """Return the configuration that all runs share; each trains on one core.

    Args:
        path: TOML file, or None for the default with `KEEP_UNCLICKED`.
        keep_unclicked: what to put in its place.
    """
    config = RankerConfig(training=TrainingConfig(keep_unclicked=KEEP_UNCLICKED))
    if path is not None:
        config = from_toml(path, RankerConfig)
    keep = config.training.keep_unclicked if keep_unclicked is None else keep_unclicked
    training = replace(config.training, keep_unclicked=keep, device="cpu", threads=1)
    return replace(config, training=training)


def benchmark_ranking(
    data: Path,
    output: Path,
    *,
    config: RankerConfig,
    tables: Path | None = None,
    weeks: Sequence[int] = (),
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    names: Sequence[str] = (),
    processes: int = 2,
    command: str = "",
) -> dict[str, Any]:
    """Make the runs that are missing and write the table; returns the content of ranking.json.

    Args:
        data: dataset folder.
        output: the benchmark's folder.
        config: of all runs.
        tables: folder of embedding tables; of a DashCLIP trained on ``data`` where None.
        weeks: evaluation weeks; see `default_weeks`.
        seeds: of training.
        names: of the variants; all that the dataset allows where empty.
        processes: runs side by side.
        command: the command line, for the report.

    Raises:
        BadInputError: an input breaks a rule.
    """
    for what, given in (("week", weeks), ("seed", seeds)):
        for value in given:
            if list(given).count(value) > 1:
                raise BadInputError(f"{what} {value} is named twice")
    if not seeds or processes < 1:
        raise BadInputError("at least one seed and one process are needed")
    schema = DatasetSchema.load(data)
    has_tables = tables is not None or (data / "relevance.parquet").is_file()
    variants = choose(names, schema, tables=has_tables)
    if any(variant.learner == "lightgbm" for variant in variants):
        import_lightgbm()  # tell that it is missing before hours of other runs
    manifest = _requests(data, config)
    config = resolve(config, schema, manifest)
    weeks = sorted(weeks) or default_weeks(schema, manifest)
    if any(v.model.get("embedding_tower") for v in variants) and tables is None:
        tables = ensure_tables(data)
    plan = Plan(
        data=data,
        tables=tables,
        output=output,
        config=config,
        table_fingerprint=PretrainedTables.read(tables).fingerprint if tables else "",
        data_fingerprint=manifest.fingerprint,
    )
    found = [_evaluation_week(plan, schema, manifest, week) for week in weeks]
    runs = {v.name: _runs(plan, v, schema, weeks, seeds) for v in variants}
    # Seeds outermost: stopped early, every variant has the same ones.
    everything = [r for seed in seeds for own in runs.values() for r in own if r.seed == seed]
    execute(everything, processes)
    return write_results(
        output,
        dataset=schema.name,
        caveat=schema.caveat,
        command=command,
        versions=versions(),
        data_fingerprint=manifest.fingerprint,
        weeks=found,
        variants=[_result(variant, runs[variant.name]) for variant in variants],
        comparisons=comparisons(variants),
    )


def default_weeks(schema: DatasetSchema, manifest: RequestsManifest) -> list[int]:
    """Return three weeks evenly spread over those after the dataset's own evaluation week.

    That week was looked at while settings were found. Where fewer than three come after it, the
    last three of all are taken.
    """
    after = [w for w in manifest.weeks if schema.weeks and w > schema.weeks.evaluate]
    after = after if len(after) >= _WEEKS else list(manifest.weeks)[-_WEEKS:]
    step = (len(after) - 1) // max(_WEEKS - 1, 1)
    return after[:: max(step, 1)][:_WEEKS]


def _requests(data: Path, config: RankerConfig) -> RequestsManifest:
    with progress_bar() as bar:
        task = bar.add_task("request records", total=None)
        return build_requests(
            data,
            data / "requests",
            window_days=config.history.window_days,
            history_cap=config.history.cap,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _runs(
    plan: Plan, variant: Variant, schema: DatasetSchema, weeks: Sequence[int], seeds: Sequence[int]
) -> list[Run]:
    chosen = seeds[: variant.most_seeds]
    return [Run.of(plan, variant, schema, week=w, seed=s) for s in chosen for w in weeks]


def _evaluation_week(
    plan: Plan, schema: DatasetSchema, manifest: RequestsManifest, week: int
) -> EvaluationWeek:
    """Return the rows of an evaluation week, in the order of its records; samples what it needs."""
    config = replace(plan.config, training=replace(plan.config.training, evaluate_week=week))
    data = TrainingData.plan(schema, manifest, config)
    say(
        f"week {week}: trained on {data.train_rows():,} rows of weeks {data.train[0]} to "
        f"{data.train[-1]}, {manifest.weeks[week].rows:,} rows to score"
    )
    names = [columns.USER_ID, columns.PURCHASE_HISTORY, columns.PRODUCT_ID, columns.CLICKED]
    records = pq.read_table(manifest.path(week), columns=names)
    products = records[columns.PRODUCT_ID].combine_chunks()
    shown: list[np.ndarray] = []
    for earlier in data.train:
        found = pq.read_table(manifest.path(earlier), columns=[columns.PRODUCT_ID])
        shown.append(found[columns.PRODUCT_ID].combine_chunks().flatten().unique().to_numpy())
    return EvaluationWeek(
        week=week,
        clicked=records[columns.CLICKED].combine_chunks().flatten().to_numpy(zero_copy_only=False),
        lengths=_lengths(products),
        user_id=records[columns.USER_ID].to_numpy().astype(np.int64),
        history_lengths=_lengths(records[columns.PURCHASE_HISTORY].combine_chunks()),
        product_seen=np.isin(products.flatten().to_numpy(), np.unique(np.concatenate(shown))),
    )


def _lengths(lists: Any) -> np.ndarray:
    return lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


def _result(variant: Variant, runs: Sequence[Run]) -> VariantResult:
    """Gather the scores of a variant's runs: for each seed, each week."""
    by_week: dict[int, list[np.ndarray]] = {}
    for run in runs:
        by_week.setdefault(run.week, []).append(run.scores())
    found = [run.facts() for run in runs]
    names = set.intersection(*(set(facts) for facts in found))
    return VariantResult(
        name=variant.name,
        title=variant.title,
        baseline=variant.baseline,
        probability={week: np.stack(scores) for week, scores in by_week.items()},
        seeds=tuple(dict.fromkeys(run.seed for run in runs)),
        facts={name: float(np.mean([facts[name] for facts in found])) for name in sorted(names)},
    )
