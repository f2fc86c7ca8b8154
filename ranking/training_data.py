"""The request records of a run: which weeks are trained on, watched and reported."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from features import columns
from features.batch import RecordFiles, level_features
from features.errors import BadInputError
from features.requests import RequestsManifest
from features.sampling import sample_requests
from features.schema import LEVELS, DatasetSchema, Level
from features.transforms import LevelTransforms, fit
from ranking.config import RankerConfig

_FIT_GROUPS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """Request records, and which of their weeks serve what.

    Attributes:
        schema: of the features that the model reads.
        manifest: of the request records.
        sample: of those that are trained on; the same where none is left out.
        train: weeks to train on.
        validation: the week to watch, or None.
        evaluate: the week to report.
    """

    schema: DatasetSchema
    manifest: RequestsManifest
    sample: RequestsManifest
    train: tuple[int, ...]
    validation: int | None
    evaluate: int

    @classmethod
    def plan(
        cls, schema: DatasetSchema, manifest: RequestsManifest, config: RankerConfig
    ) -> "TrainingData":
        """Split the weeks as configuration and dataset say.

        Raises:
            BadInputError: no feature is declared, a week is missing, or a part has clicks only or
                none.
        """
        if not schema.features:
            raise BadInputError(f"dataset '{schema.name}': dataset.toml declares no feature")
        evaluate = config.training.evaluate_week
        train = [
            w for w in manifest.weeks if evaluate - config.training.train_weeks <= w < evaluate
        ]
        validation = train.pop() if config.training.validation_week and train else None
        manifest.path(evaluate)
        parts = [("training", train), ("evaluation", [evaluate])]
        if validation is not None:
            parts.append(("validation", [validation]))
        for what, weeks in parts:
            rows = sum(manifest.weeks[w].rows for w in weeks)
            clicks = sum(manifest.weeks[w].positives for w in weeks)
            if not 0 < clicks < rows:
                raise BadInputError(
                    f"{manifest.folder}: the {what} weeks {span(weeks)} have {rows} impressions "
                    f"and {clicks} clicks; both clicks and non-clicks are needed"
                )
        sample = manifest
        if config.training.keep_unclicked < 1:
            keep = config.training.keep_unclicked
            folder = manifest.folder.with_name(f"{manifest.folder.name}-keep-{keep:g}")
            sample = sample_requests(manifest, folder, keep=keep, weeks=train)
        return cls(
            schema=schema,
            manifest=manifest,
            sample=sample,
            train=tuple(train),
            validation=validation,
            evaluate=evaluate,
        )

    def files(self, week: int) -> RecordFiles:
        """Return the record files of all requests of a week."""
        return RecordFiles.open([self.manifest.path(week)])

    def train_files(self) -> RecordFiles:
        """Return the record files to train on."""
        return RecordFiles.open([self.sample.path(week) for week in self.train])

    def train_rows(self) -> int:
        """Return the number of candidates to train on."""
        return sum(self.sample.weeks[week].rows for week in self.train)

    def fit_transforms(self, config: RankerConfig) -> tuple[LevelTransforms, LevelTransforms]:
        """Fit the transforms of requests and of candidates on the training weeks."""
        request, candidate = (
            fit(
                self.schema.names("sparse", level),
                self.schema.names("dense", level),
                self._level_features(level),
                min_count=config.transforms.min_count,
                bins=config.transforms.bins,
            )
            for level in LEVELS
        )
        return request, candidate

    def _level_features(self, level: Level) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        others = {f.name for f in self.schema.features if f.level != level}
        leave_out = others | {columns.PURCHASE_HISTORY, columns.CLICKED}
        for records in self.train_files().chunks(_FIT_GROUPS, leave_out=leave_out):
            yield level_features(records, self.schema, level)


def span(weeks: Sequence[int]) -> str:
    """Return the first and the last of some weeks, in words."""
    return f"{min(weeks)} to {max(weeks)}" if weeks else "(none)"
