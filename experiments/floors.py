"""The floors that a ranker has to beat: hashed logistic regression and boosted trees.

Both are rows of the ranking benchmark and learn from the same features and the same weighted
requests as the ranker, one row per candidate (`experiments.flat_table`). What has to be chosen, the
logistic regression's learning rate and epochs and the number of trees, is chosen by training on all
training weeks but the last and looking at the last; both then train on all of them.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from features.errors import BadInputError

if TYPE_CHECKING:
    from experiments.flat_table import FlatTable, Vocabularies
    from ranking.run import TrainingData

Floats = npt.NDArray[np.floating[Any]]

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """Rows in time: ``train`` before ``validation``, the last training week, before ``test``."""

    train: "FlatTable"
    validation: "FlatTable"
    test: "FlatTable"
    vocabularies: "Vocabularies"
    seed: int
    threads: int


def load_split(data: "TrainingData", *, seed: int = 0, threads: int = 1) -> Split:
    """Read the training, validation and evaluation rows; vocabularies know training weeks only.

    Raises:
        BadInputError: fewer than two training weeks, or one of them holds one class only.
    """
    from experiments.flat_table import FlatTable, Vocabularies

    if len(data.train) < 2:
        raise BadInputError(
            f"floors need 2 or more training weeks (the last one validates), got {len(data.train)}"
        )
    vocabularies = Vocabularies.fit(data.sample, data.train[:-1], data.schema)
    parts = {
        "train": (data.sample, data.train[:-1]),
        "validation": (data.sample, data.train[-1:]),
        "test": (data.manifest, (data.evaluate,)),
    }
    tables = {
        name: FlatTable.read(manifest, weeks, data.schema, vocabularies)
        for name, (manifest, weeks) in parts.items()
    }
    for name, table in tables.items():
        if len(np.unique(table.clicked)) < 2:
            found = "no row is clicked" if not table.clicked.any() else "every row is clicked"
            weeks = parts[name][1]
            raise BadInputError(
                f"{data.manifest.folder}: {found} in weeks {weeks[0]} to {weeks[-1]}"
            )
    return Split(**tables, vocabularies=vocabularies, seed=seed, threads=threads)


def logistic_regression(split: Split) -> tuple[Floats, int]:
    """Return the click probabilities of the evaluation rows, and the bytes of the model."""
    from experiments.hashed_logistic import FeatureHasher, fit_tuned

    hasher = FeatureHasher.fit(split.train)
    model = fit_tuned(hasher, split.train, split.validation, seed=split.seed)
    return model.predict(hasher.transform(split.test)), model.weight.nbytes


def lightgbm_trees(split: Split) -> tuple[Floats, int]:
    """Return the same for LightGBM, 63 leaves, rate 0.05."""
    lightgbm = import_lightgbm()
    sizes = split.vocabularies.sizes
    categorical = [i for i, size in enumerate(sizes) if size <= _CATEGORICAL_UP_TO]
    parameters = TREES | {"num_threads": split.threads, "seed": split.seed}

    def dataset(*tables: "FlatTable", **more: Any) -> Any:
        return lightgbm.Dataset(
            [block for table in tables for block in _blocks(table)],
            label=np.concatenate([table.clicked for table in tables]),
            weight=np.concatenate([table.weight for table in tables]),
            categorical_feature=categorical,
            params=parameters,
            **more,
        ).construct()

    fitting = dataset(split.train)
    found = lightgbm.train(
        parameters,
        fitting,
        num_boost_round=_MOST_TREES,
        valid_sets=[dataset(split.validation, reference=fitting)],
        callbacks=[lightgbm.early_stopping(_PATIENCE, verbose=False)],
    )
    del fitting
    gc.collect()
    trees = lightgbm.train(
        parameters, dataset(split.train, split.validation), num_boost_round=found.best_iteration
    )
    scores = np.concatenate([trees.predict(block) for block in _blocks(split.test)])
    return scores, len(trees.model_to_string())


LEARNERS: dict[str, Callable[[Split], tuple[Floats, int]]] = {
    "logistic": logistic_regression,
    "lightgbm": lightgbm_trees,
}


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


def _blocks(table: "FlatTable", rows: int = 1 << 19) -> list[npt.NDArray[np.float32]]:
    """Return the features of all rows as float32 ``[<= rows, F + D]``; codes are below 2^24."""
    both = (table.codes, table.values)
    return [
        np.concatenate([part[i : i + rows] for part in both], axis=1, dtype=np.float32)
        for i in range(0, len(table), rows)
    ]
