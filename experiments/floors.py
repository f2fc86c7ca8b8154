"""The floors that a ranker has to beat: hashed logistic regression and boosted trees.

Both learn from the same features as the ranker, one row per candidate (`experiments.flat_table`)::

    python -m experiments.floors --data data/complete-journey --output runs/floors

With evaluation week ``e`` and ``n`` training weeks, the settings of the logistic regression are
chosen by training on weeks ``e - n`` to ``e - 2`` and looking at week ``e - 1``; it is then trained
on all ``n`` weeks. The trees train on weeks ``e - n`` to ``e - 2`` and stop early on week
``e - 1``. Week ``e`` is scored once, at the end.
"""

import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from features.console import print_table, run_command, say
from features.errors import BadInputError
from features.files import write_text
from features.schema import DatasetSchema

if TYPE_CHECKING:
    from experiments.flat_table import FlatTable, Vocabularies
    from features.requests import RequestsManifest

Floats = npt.NDArray[np.floating[Any]]
Variant = Callable[["Split"], Floats]

# The last three were the best of a few on week 43; LightGBM's own defaults overfit much earlier.
TREES: dict[str, Any] = {
    "objective": "binary",
    "metric": "binary_logloss",
    "num_leaves": 63,
    "learning_rate": 0.05,
    "deterministic": True,
    "force_col_wise": True,
    "verbosity": -1,
    "min_data_in_leaf": 200,
    "feature_fraction": 0.6,
    "lambda_l2": 10.0,
}

# Trees split features of few values by subsets of these, others by the frequency rank of a value.
_CATEGORICAL_UP_TO = 32
_MOST_TREES = 3000
_PATIENCE = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Train hashed logistic regression and LightGBM, and score them on the evaluation week."""

    data: Path
    """Dataset folder, with its request records in `requests/`."""
    output: Path
    """Folder that receives floors.json."""
    eval_week: int | None = None
    """Week to score; the dataset's own where not given."""
    weeks: int | None = None
    """Number of training weeks before it; the dataset's own where not given."""
    seed: int = 0
    """Seed of shuffles and of LightGBM."""
    threads: int = 2
    """Threads of LightGBM."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """Rows in time: ``train`` before ``validation``, the last training week, before ``test``."""

    train: "FlatTable"
    validation: "FlatTable"
    test: "FlatTable"
    vocabularies: "Vocabularies"
    seed: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FloorRow:
    """What one floor reached on the evaluation week.

    Attributes:
        variant: name of the learner.
        auc: area under the ROC curve over all rows.
        normalized_log_loss: log loss / entropy of the rows' base rate.
        seconds: wall time of choosing settings, training and scoring.
        rows: number of rows scored.
    """

    variant: str
    auc: float
    normalized_log_loss: float
    seconds: float
    rows: int


def load_split(
    manifest: "RequestsManifest",
    schema: DatasetSchema,
    *,
    eval_week: int,
    weeks: int,
    seed: int = 0,
    threads: int = 2,
) -> Split:
    """Read the training, validation and evaluation rows; vocabularies know training weeks only.

    Raises:
        BadInputError: fewer than two training weeks, a week or column is missing, or one of the
            three parts holds one class only.
    """
    from experiments.flat_table import FlatTable, Vocabularies

    if weeks < 2:
        raise BadInputError(f"weeks must be 2 or more (one of them validates), got {weeks}")
    fitting = range(eval_week - weeks, eval_week - 1)
    parts = {
        "train": fitting,
        "validation": range(eval_week - 1, eval_week),
        "test": range(eval_week, eval_week + 1),
    }
    vocabularies = Vocabularies.fit(manifest, fitting, schema)
    tables = {
        name: FlatTable.read(manifest, part, schema, vocabularies) for name, part in parts.items()
    }
    for name, table in tables.items():
        if len(np.unique(table.clicked)) < 2:
            found = "no row is clicked" if not table.clicked.any() else "every row is clicked"
            raise BadInputError(
                f"{manifest.folder}: {found} in weeks {parts[name][0]} to {parts[name][-1]}"
            )
    return Split(**tables, vocabularies=vocabularies, seed=seed, threads=threads)


def logistic_regression(split: Split) -> Floats:
    """Return the click probabilities of the evaluation rows by hashed logistic regression."""
    from experiments.hashed_logistic import FeatureHasher, fit_tuned

    hasher = FeatureHasher.fit(split.train)
    model = fit_tuned(
        hasher,
        split.train,
        split.validation,
        seed=split.seed,
        report=say,
    )
    return model.predict(hasher.transform(split.test))


def lightgbm_trees(split: Split) -> Floats:
    """Return the click probabilities of the evaluation rows by LightGBM, 63 leaves, rate 0.05."""
    lightgbm = import_lightgbm()
    sizes = split.vocabularies.sizes
    categorical = [i for i, size in enumerate(sizes) if size <= _CATEGORICAL_UP_TO]
    parameters = TREES | {"num_threads": split.threads, "seed": split.seed}
    fitting = lightgbm.Dataset(
        _blocks(split.train),
        label=split.train.clicked,
        categorical_feature=categorical,
        params=parameters,
    ).construct()
    stopping = lightgbm.Dataset(
        _blocks(split.validation),
        label=split.validation.clicked,
        categorical_feature=categorical,
        reference=fitting,
    ).construct()
    gc.collect()
    trees = lightgbm.train(
        parameters,
        fitting,
        num_boost_round=_MOST_TREES,
        valid_sets=[stopping],
        callbacks=[lightgbm.early_stopping(_PATIENCE, verbose=False), _progress],
    )
    say(f"LightGBM: {trees.best_iteration} trees")
    return np.concatenate([trees.predict(block) for block in _blocks(split.test)])


def import_lightgbm() -> Any:
    """Return the module ``lightgbm``.

    Raises:
        BadInputError: it is not installed; the message names the command that installs it.
    """
    try:
        import lightgbm
    except ImportError as error:
        raise BadInputError(
            "LightGBM is not installed; install it with: pip install 'dashclip-ranker[floors]'"
        ) from error
    return lightgbm


def score(variant: str, clicked: npt.NDArray[np.bool_], probability: Floats) -> FloorRow:
    """Return the metrics of one learner; ``seconds`` is 0."""
    from sklearn.metrics import log_loss, roc_auc_score

    from ranking.metrics import base_rate_entropy

    entropy = base_rate_entropy(float(clicked.mean()))
    return FloorRow(
        variant=variant,
        auc=float(roc_auc_score(clicked, probability)),
        normalized_log_loss=float(log_loss(clicked, probability.astype(np.float64))) / entropy,
        seconds=0.0,
        rows=len(clicked),
    )


def run(options: Options) -> None:
    """Train and score both floors, print them and write ``floors.json``."""
    from features.requests import RequestsManifest

    import_lightgbm()
    schema = DatasetSchema.load(options.data)
    weeks = schema.weeks
    if weeks is None and None in (options.eval_week, options.weeks):
        raise BadInputError(
            f"{options.data / 'dataset.toml'}: has no [weeks]; give --eval-week and --weeks"
        )
    eval_week = options.eval_week or (weeks.evaluate if weeks else 0)
    count = options.weeks or (weeks.train if weeks else 0)
    manifest = RequestsManifest.load(options.data / "requests")
    split = load_split(
        manifest,
        schema,
        eval_week=eval_week,
        weeks=count,
        seed=options.seed,
        threads=options.threads,
    )
    say(f"{len(split.train) + len(split.validation):,} training rows, {len(split.test):,} to score")
    variants: dict[str, Variant] = {
        "hashed logistic regression": logistic_regression,
        "LightGBM": lightgbm_trees,
    }
    rows = [_timed(name, variant, split) for name, variant in variants.items()]
    print_table(
        f"{schema.name}, week {eval_week}",
        ("floor", "AUC", "normalised log loss", "seconds"),
        [
            (r.variant, f"{r.auc:.4f}", f"{r.normalized_log_loss:.4f}", f"{r.seconds:.0f}")
            for r in rows
        ],
    )
    document = {
        "dataset": schema.name,
        "eval_week": eval_week,
        "train_weeks": list(range(eval_week - count, eval_week)),
        "rows": [asdict(row) for row in rows],
    }
    write_text(options.output / "floors.json", json.dumps(document, indent=2) + "\n")


def _timed(name: str, variant: Variant, split: Split) -> FloorRow:
    start = time.perf_counter()
    row = score(name, split.test.clicked, variant(split))
    row = FloorRow(**{**asdict(row), "seconds": round(time.perf_counter() - start, 1)})
    say(f"{name}: AUC {row.auc:.4f}, normalised log loss {row.normalized_log_loss:.4f}")
    return row


def _blocks(table: "FlatTable", rows: int = 1 << 19) -> list[npt.NDArray[np.float32]]:
    """Return the features of all rows as float32 ``[<= rows, F + D]``; codes are below 2^24."""
    both = (table.codes, table.values)
    return [
        np.concatenate([part[i : i + rows] for part in both], axis=1, dtype=np.float32)
        for i in range(0, len(table), rows)
    ]


def _progress(state: Any) -> None:
    if (state.iteration + 1) % 100 == 0:
        _, _, loss, _ = state.evaluation_result_list[0]
        say(f"LightGBM: {state.iteration + 1} trees, log loss of the validation week {loss:.6f}")


def main() -> int:
    """Run the command line."""
    return run_command(Options, run, prog="python -m experiments.floors")


if __name__ == "__main__":
    sys.exit(main())
