"""A run: from a dataset folder to metrics, report, checkpoint and bundle in one folder.

::

    OUTPUT/
      config.toml     resolved configuration      run.json      what the run was made of
      metrics.json    figures by slice            report.html   the same, for people
      checkpoint/     state of the training       tensorboard/  scalars
      bundle/         what serving loads
"""

import json
import platform
import resource
import shlex
import sys
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from embeddings.default_tables import TABLES, ensure_tables
from features.checkpoint import copy_into
from features.config_file import from_toml, to_toml
from features.console import print_table, progress_bar, say
from features.errors import BadInputError
from features.files import write_text
from features.monitor import Monitor
from features.requests import RequestsManifest, build_requests
from features.schema import DatasetSchema
from features.transforms import LevelTransforms
from ranking.bundle import Bundle, PretrainedTables
from ranking.config import RankerConfig
from ranking.device import training_device, training_precision
from ranking.distributed import from_first, is_first, process_group, world
from ranking.metrics import Predictions, SliceMetrics, metrics_document, slice_metrics
from ranking.ranker import Ranker
from ranking.report import RunReport, format_slice_rows, write_report
from ranking.training import Progress, Trainer, seeded
from ranking.training_data import TrainingData, span
from ranking.versions import CHECKED, installed_versions

_PACKAGES = ("dashclip-ranker", *CHECKED)
METRICS = "metrics.json"


def train_ranker(
    data: Path,
    output: Path,
    *,
    tables: Path | None = None,
    config: RankerConfig | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Train and evaluate a ranker on a dataset folder; returns the content of ``metrics.json``.

    A run that was stopped carries on; one that is complete is not repeated. Where torchrun started
    several processes, all of them call it; the first prints and writes, and all return the same.

    Args:
        data: dataset folder; its request records are built into ``data/requests`` if need be.
        output: the run's folder.
        tables: folder of embedding tables; of DashCLIP trained on ``data`` where None.
        config: of model, transforms and training.
        command: the command line, for the report.

    Raises:
        BadInputError: an input breaks a rule, or ``output`` holds another run.
    """
    with process_group():
        config, split = from_first(partial(_plan, data, config or RankerConfig()))
        pretrained = None
        if config.model.embedding_tower:
            pretrained = PretrainedTables.read(tables or _own_tables(data))
        return _Run(split, pretrained, config, output, command).execute()


def _plan(data: Path, config: RankerConfig) -> tuple[RankerConfig, TrainingData]:
    """Build the request records where need be; returns what to train on, and how."""
    training_device(config.training.device)  # a GPU that is asked for and not there ends it here
    schema = DatasetSchema.load(data)
    with progress_bar() as bar:
        task = bar.add_task("request records", total=None)
        manifest = build_requests(
            data,
            data / "requests",
            window_days=config.history.window_days,
            history_cap=config.history.cap,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    config = resolve(config, schema, manifest)
    schema = schema.leaving_out(config.transforms.leave_out)
    return config, TrainingData.plan(schema, manifest, config)


def _own_tables(data: Path) -> Path:
    """Return the folder of the dataset's own embedding tables, made where need be."""
    if world() == 1:
        return ensure_tables(data)
    if not (data / TABLES).is_dir():
        raise BadInputError(
            f"{data}: has no embedding tables; several processes do not make them: name some with "
            "--tables, or run build-tables first"
        )
    return data / TABLES


class _Run:
    """One run and its folder."""

    def __init__(
        self,
        data: TrainingData,
        tables: PretrainedTables | None,
        config: RankerConfig,
        output: Path,
        command: str,
    ) -> None:
        self.data = data
        self.tables = tables
        self.config = config
        self.output = output
        self.command = command or f"train_ranker into {output.name}"

    def execute(self) -> dict[str, Any]:
        finished = from_first(self._finished)
        if finished is not None:
            return finished
        say(f"fitting transforms on weeks {span(self.data.train)}")
        transforms = from_first(lambda: self.data.fit_transforms(self.config))
        trainer = self._trainer(new_ranker(self.config, transforms, self._held_tables()))
        progress = self._train(trainer)
        say(f"evaluating week {self.data.evaluate}")
        predictions = trainer.predict(self.data.files(self.data.evaluate))
        state = trainer.whole_state()

        def write() -> dict[str, Any]:
            assert predictions is not None, "the first process has them"
            ranker = trainer.ranker
            if world() > 1 or ranker.device.type != "cpu":
                ranker = new_ranker(self.config, transforms, self.tables)
                copy_into(ranker.trained_state(), state or {}, "the trained model")
            return self._write(ranker, progress, predictions)

        return from_first(write)

    def _held_tables(self) -> PretrainedTables | None:
        """Return the tables with the rows that this process is to hold while it trains."""
        if world() == 1 or self.tables is None or self.config.model.tables != "frozen":
            return self.tables
        from ranking.distributed_frozen import own_rows

        content = own_rows(self.tables.content, self.config.training.whole_table_mb)
        return replace(self.tables, content=content)

    def _finished(self) -> dict[str, Any] | None:
        """Claim the folder; returns the figures of the run if it is complete."""
        self._claim()
        finished = self.output / METRICS
        if not finished.exists():
            return None
        say(f"{self.output}: this run is complete; its figures:")
        metrics: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
        self._show(metrics["slices"])
        return metrics

    def _claim(self) -> None:
        """Make the folder this run's, or find that it is already.

        Raises:
            BadInputError: it holds something else.
        """
        identity = {
            "dataset": self.data.schema.name,
            "data_fingerprint": self.data.manifest.fingerprint,
            "table_fingerprint": self.tables.fingerprint if self.tables else "",
        }
        config = to_toml(self.config)
        record, resolved = self.output / "run.json", self.output / "config.toml"
        if record.exists() and resolved.exists():
            found = {k: v for k, v in json.loads(record.read_text()).items() if k in identity}
            if found != identity or not self._goes_on(resolved):
                reason = "configuration" if found == identity else "data or tables"
                raise BadInputError(
                    f"{self.output}: holds another run (its {reason} differs); "
                    "choose another --output or remove it"
                )
            return
        if self.output.exists() and not (self.output.is_dir() and self._unclaimed()):
            raise BadInputError(
                f"{self.output}: exists and is not a run; choose another --output or remove it"
            )
        self.output.mkdir(parents=True, exist_ok=True)
        write_text(
            record,
            json.dumps(identity | {"command": self.command, "versions": versions()}, indent=2),
        )
        write_text(resolved, config)

    def _goes_on(self, resolved: Path) -> bool:
        """Whether a run's configuration is this one's, on whatever device."""
        found = from_toml(resolved, RankerConfig)
        training = replace(found.training, device=self.config.training.device)
        return replace(found, training=training) == self.config

    def _unclaimed(self) -> bool:
        """Whether the folder is empty, or holds only what a kill within `_claim` can leave."""
        names = {path.name for path in self.output.iterdir()}
        left = (".run.json.partial-", ".config.toml.partial-")
        return all(name == "run.json" or name.startswith(left) for name in names)

    def _trainer(self, ranker: Ranker) -> Trainer:
        data = self.data
        kind = Trainer
        device = training_device(self.config.training.device)
        if device.type == "cuda":
            say(f"training on {torch.cuda.get_device_name(device)}")
        if world() > 1:
            from ranking.distributed_training import DistributedTrainer

            kind = DistributedTrainer
        elif device.type == "cuda":
            from ranking.device_training import DeviceTrainer

            kind = DeviceTrainer
        validation = data.files(data.validation) if data.validation is not None else None
        files, rows = data.train_files(), data.train_rows()
        return kind(ranker, data.schema, files, rows, self.config.training, validation)

    def _train(self, trainer: Trainer) -> Progress:
        state = self.output / "checkpoint" / "state.safetensors"
        if not is_first():
            return trainer.run(state)
        rows = trainer.total_rows
        board = self.output / "tensorboard"
        with closing(Monitor("training", rows, "rows", board)) as monitor:

            def note(progress: Progress, loss: float) -> None:
                figures = {"loss": loss}
                monitor.step(done=progress.rows, seconds=progress.seconds, figures=figures)

            progress = trainer.run(state, note)
            for epoch, found in enumerate(progress.validation, 1):
                monitor.evaluated(epoch, {"log_loss": found})
        return progress

    def _write(
        self, ranker: Ranker, progress: Progress, predictions: Predictions
    ) -> dict[str, Any]:
        slices = slice_metrics(predictions)
        metrics = metrics_document(
            dataset=self.data.schema.name,
            model="two-tower" if self.config.model.embedding_tower else "dcn",
            seed=self.config.training.seed,
            slices=slices,
            training={
                "rows": progress.rows,
                "seconds": progress.seconds,
                "rows_per_second": progress.rows / max(progress.seconds, 1e-9),
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            },
        )
        fingerprint = self.tables.fingerprint if self.tables else ""
        Bundle(
            ranker=ranker,
            schema=self.data.schema,
            config=self.config,
            window_days=self.data.manifest.window_days,
            history_cap=self.data.manifest.history_cap,
            table_fingerprint=fingerprint,
            provenance={"versions": versions(), "data_fingerprint": self.data.manifest.fingerprint},
        ).save(self.output / "bundle")
        report = RunReport(
            metrics=metrics,
            predictions=predictions,
            loss_curve=progress.losses,
            caveat=self.data.schema.caveat,
            evaluated_on=f"week {self.data.evaluate}",
            config=to_toml(self.config),
            command=self.command,
            versions=versions(),
            data_fingerprint=self.data.manifest.fingerprint,
            table_fingerprint=fingerprint,
        )
        write_report(self.output / "report.html", report)
        text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
        write_text(self.output / METRICS, text)
        self._show(slices)
        return metrics

    def _show(self, slices: dict[str, SliceMetrics]) -> None:
        header, rows = format_slice_rows(slices)
        turned = [list(column) for column in zip(header, *rows, strict=True)]
        title = f"{self.data.schema.name}, week {self.data.evaluate}"
        print_table(title, turned[0], turned[1:])
        if self.data.schema.caveat:
            say(f"Caveat: {self.data.schema.caveat}")
        say(f"Report: {self.output / 'report.html'}")


def new_ranker(
    config: RankerConfig,
    transforms: tuple[LevelTransforms, LevelTransforms],
    tables: PretrainedTables | None,
) -> Ranker:
    """Return a ranker with the initial weights of the configuration's seed."""
    training = config.training
    with seeded(training.seed):
        return Ranker(
            config.model,
            *transforms,
            tables.content if tables else None,
            sparse_learning_rate=training.sparse_learning_rate,
            table_learning_rate=training.table_learning_rate,
        )


def versions() -> dict[str, str]:
    """Return the versions that a figure depends on."""
    return {"python": platform.python_version()} | installed_versions(_PACKAGES)


def resolve(
    config: RankerConfig, schema: DatasetSchema, manifest: RequestsManifest
) -> RankerConfig:
    """Fill in what the configuration leaves to the dataset and the machine.

    Raises:
        BadInputError: it asks for a GPU that cannot be used.
    """
    last = max(manifest.weeks)
    weeks = schema.weeks
    training = config.training
    return replace(
        config,
        training=replace(
            training,
            evaluate_week=training.evaluate_week or (weeks.evaluate if weeks else last),
            train_weeks=training.train_weeks or (weeks.train if weeks else 30),
            precision=training_precision(training.precision, training_device(training.device)),
        ),
    )


def command_line(prog: str) -> str:
    """Return the process's command line with the command's plain name, or ``python -m module``."""
    return f"{prog} {shlex.join(sys.argv[1:])}".rstrip()
