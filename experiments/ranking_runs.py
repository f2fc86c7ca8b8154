"""The runs of the ranking benchmark: each variant, evaluation week and seed, cached on disk.

::

    OUTPUT/runs/VARIANT/week-45-seed-0-1a2b3c4d5e6f/
      run.json            what it was made of, and what it cost
      probability.npy     float32 [C], of all candidates of the week, in the records' order

The last part of the name is a digest of everything that decides the scores: a run of another
configuration or of other data has another name, so that it can neither be taken for this one nor
be overwritten by it. A run appears whole or not at all; one that was stopped carries on from its
checkpoint.
"""

import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.ranking_results import Floats
from experiments.ranking_variants import Variant
from features.config_file import to_toml
from features.console import progress_bar, say
from features.errors import BadInputError
from features.files import atomic_folder
from features.requests import RequestsManifest
from features.schema import DatasetSchema
from features.transforms import LevelTransforms
from ranking.bundle import PretrainedTables
from ranking.config import RankerConfig
from ranking.run import TrainingData, new_ranker
from ranking.training import Trainer, predict

_RUN, _SCORES = "run.json", "probability.npy"
_FORMAT = 1
_FACTS = ("rows_per_second", "parameters", "model_bytes")
_DIGITS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is the same for all runs of a benchmark.

    Attributes:
        data: dataset folder, with its request records in ``requests/``.
        tables: folder of embedding tables, or None.
        output: the benchmark's folder.
        config: of every run, but for what a variant changes.
        table_fingerprint: of the tables' encoder.
        data_fingerprint: of the dataset.
    """

    data: Path
    tables: Path | None
    output: Path
    config: RankerConfig
    table_fingerprint: str
    data_fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run: a variant, trained with a seed on the weeks before the one that it scores."""

    plan: Plan
    variant: Variant
    week: int
    seed: int
    config: RankerConfig

    @classmethod
    def of(
        cls, plan: Plan, variant: Variant, schema: DatasetSchema, *, week: int, seed: int
    ) -> "Run":
        """Return the run of a variant."""
        config = variant.configure(plan.config, schema, week=week, seed=seed)
        return cls(plan=plan, variant=variant, week=week, seed=seed, config=config)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the scores."""
        reads_tables = self.variant.learner == "ranker" and self.config.model.embedding_tower
        return {
            "format": _FORMAT,
            "learner": self.variant.learner,
            "data_fingerprint": self.plan.data_fingerprint,
            "table_fingerprint": self.plan.table_fingerprint if reads_tables else "",
            "config": to_toml(self.config),
        }

    @property
    def folder(self) -> Path:
        """Where it lies, or will."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        name = f"week-{self.week}-seed-{self.seed}-{digest[:_DIGITS]}"
        return self.plan.output / "runs" / self.variant.name / name

    @property
    def done(self) -> bool:
        """Whether it is there, whole."""
        return (self.folder / _RUN).is_file()

    def scores(self) -> Floats:
        """Return its probabilities, float32 [C].

        Raises:
            BadInputError: the run is damaged, or is not what its name says.
        """
        path = self.folder / _RUN
        try:
            identity = json.loads(path.read_text(encoding="utf-8"))["identity"]
            scores: Floats = np.load(self.folder / _SCORES, allow_pickle=False)
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise BadInputError(
                f"{self.folder}: not a whole run ({error}); remove it and give the command again"
            ) from error
        if identity != self.identity:
            raise BadInputError(f"{path}: is of another run; remove {self.folder}")
        return scores

    def facts(self) -> dict[str, float]:
        """Return what the run cost: `_FACTS`, those that are known."""
        content = json.loads((self.folder / _RUN).read_text(encoding="utf-8"))
        return {name: content[name] for name in _FACTS if content.get(name) is not None}

    def execute(self) -> None:
        """Train, score and write the run's folder."""
        scores, facts = (train_ranker if self.variant.learner == "ranker" else train_floor)(self)
        facts["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        with atomic_folder(self.folder) as scratch:
            np.save(scratch / _SCORES, scores.astype(np.float32))
            content = {"identity": self.identity} | facts
            (scratch / _RUN).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(self.checkpoint.parent, ignore_errors=True)

    @property
    def checkpoint(self) -> Path:
        """Where the training's state is kept while it runs."""
        return self.folder.with_name(f".{self.folder.name}.training") / "state.safetensors"


def execute(runs: Sequence[Run], processes: int) -> None:
    """Make the runs that are not there yet, several side by side.

    Raises:
        BadInputError: a run met bad input; those that are done stay.
    """
    missing = [run for run in runs if not run.done]
    say(f"{len(runs) - len(missing)} of {len(runs)} runs are there, {len(missing)} to make")
    if not missing:
        return
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker) as pool,
        progress_bar() as bar,
    ):
        task = bar.add_task("runs", total=len(missing))
        began = time.monotonic()
        futures = {pool.submit(run.execute): run for run in missing}
        try:
            for number, future in enumerate(_finished(list(futures)), 1):
                future.result()
                run = futures[future]
                bar.update(task, completed=number)
                left = (time.monotonic() - began) / number * (len(missing) - number)
                say(
                    f"{number}/{len(missing)} {run.variant.name}, week {run.week}, seed "
                    f"{run.seed}; about {left / 60:.0f} min left"
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _finished(futures: list[Any]) -> Iterator[Any]:
    left = set(futures)
    while left:
        done, left = wait(left, return_when=FIRST_EXCEPTION, timeout=1.0)
        yield from sorted(done, key=futures.index)


def _start_worker() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when ``parent`` has gone: a killed command leaves no worker behind."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def train_ranker(run: Run) -> tuple[Floats, dict[str, Any]]:
    """Return the scores of the run's week by the ranker, and what training cost."""
    plan, config = run.plan, run.config
    data = _training_data(plan, config)
    transforms = _transforms(plan, config)
    tables = None
    if config.model.embedding_tower:
        assert plan.tables is not None
        tables = _tables(plan.tables)
    ranker = new_ranker(config, transforms, tables)
    rows = data.train_rows()
    trainer = Trainer(ranker, data.schema, data.train_files(), rows, config.training)
    progress = trainer.run(run.checkpoint)
    predictions = predict(ranker, data.schema, data.files(run.week))
    return predictions.probability, {
        "rows": progress.rows,
        "seconds": progress.seconds,
        "rows_per_second": progress.rows / max(progress.seconds, 1e-9),
        "parameters": ranker.number_of_parameters(),
        "model_bytes": ranker.number_of_bytes(),
    }


def train_floor(run: Run) -> tuple[Floats, dict[str, Any]]:
    """Return the scores of the run's week by a floor, and what training cost."""
    from experiments.floors import LEARNERS, load_split

    data = _training_data(run.plan, run.config)
    began = time.monotonic()
    split = load_split(data, seed=run.seed, threads=1)
    probability, size = LEARNERS[run.variant.learner](split)
    seconds = time.monotonic() - began
    return probability, {
        "rows": data.train_rows(),
        "seconds": seconds,
        "rows_per_second": data.train_rows() / seconds,
        "model_bytes": size,
    }


def _training_data(plan: Plan, config: RankerConfig) -> TrainingData:
    manifest = RequestsManifest.load(plan.data / "requests")
    schema = DatasetSchema.load(plan.data).leaving_out(config.transforms.leave_out)
    return TrainingData.plan(schema, manifest, config)


@lru_cache(maxsize=1)
def _tables(folder: Path) -> PretrainedTables:
    return PretrainedTables.read(folder)


_fitted: dict[tuple[Any, ...], tuple[LevelTransforms, LevelTransforms]] = {}


def _transforms(plan: Plan, config: RankerConfig) -> tuple[LevelTransforms, LevelTransforms]:
    """Return the transforms of a week's training records, fitted once a process."""
    training = config.training
    key = (plan.data, training.evaluate_week, training.keep_unclicked, config.transforms)
    if key not in _fitted:
        _fitted[key] = _training_data(plan, config).fit_transforms(config)
    return _fitted[key]
