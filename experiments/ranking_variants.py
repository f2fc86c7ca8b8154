"""The rows of the ranking benchmark: the paper's (Table 2), floors, and what goes beyond.

Every variant learns from the same requests and the same features. Features that count what the
purchase history holds (``from_history`` in dataset.toml) are left out, except where a variant's
name says "counters".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from features.errors import BadInputError
from features.schema import DatasetSchema, Feature
from ranking.config import RankerConfig

Learner = Literal["ranker", "lightgbm", "logistic"]
BASELINE = "dcn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One row of the benchmark.

    Attributes:
        name: short name, for the command line and the folders of runs.
        title: what the tables call it.
        learner: what learns.
        baseline: name of the variant that its lift is against.
        counters: whether it reads the features that count what the purchase history holds.
        model: changes of `ranking.config.ModelConfig`.
        training: changes of `ranking.config.TrainingConfig`.
        most_seeds: how many seeds it is given, where they hardly matter to it.
    """

    name: str
    title: str
    learner: Learner = "ranker"
    baseline: str | None = BASELINE
    counters: bool = False
    model: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    most_seeds: int | None = None

    def configure(
        self, base: RankerConfig, schema: DatasetSchema, *, week: int, seed: int
    ) -> RankerConfig:
        """Return the configuration of one run."""
        counters = () if self.counters else tuple(f.name for f in counting_features(schema))
        leave_out = dict.fromkeys((*base.transforms.leave_out, *counters))
        return replace(
            base,
            model=replace(base.model, **self.model),
            training=replace(base.training, **self.training, evaluate_week=week, seed=seed),
            transforms=replace(base.transforms, leave_out=tuple(leave_out)),
        )


_NO_TOWER = {"embedding_tower": False}
_PRODUCT_QUERY = {"embedding_tower": True, "purchase_history": False, "history_counts": False}
_MEAN = {"embedding_tower": True, "purchase_history": True, "history_counts": False}
_SIMILAR = _MEAN | {"history_counts": True}

# The rates of the trained tables were the best of a few on an earlier week (LOG.md).
VARIANTS = (
    Variant(name="logistic", title="hashed logistic regression", learner="logistic", most_seeds=1),
    Variant(name="lightgbm", title="LightGBM", learner="lightgbm", most_seeds=1),
    Variant(name=BASELINE, title="DCN baseline", baseline=None, model=_NO_TOWER),
    Variant(name="product-query", title="+ product + query + similarity", model=_PRODUCT_QUERY),
    Variant(name="history", title="+ purchase history", model=_MEAN),
    Variant(
        name="random",
        title="the same, random initialisation trained along",
        model=_MEAN | {"tables": "random"},
        training={"table_learning_rate": 0.01},
    ),
    Variant(
        name="fine-tuned",
        title="the same, DashCLIP fine-tuned along",
        model=_MEAN | {"tables": "fine-tuned"},
        training={"table_learning_rate": 0.2},
    ),
    Variant(name="similar-history", title="+ similarity-aware history", model=_SIMILAR),
    Variant(
        name="lightgbm-counters",
        title="LightGBM with counters",
        learner="lightgbm",
        counters=True,
        baseline="dcn-counters",
        most_seeds=1,
    ),
    Variant(
        name="dcn-counters",
        title="DCN baseline with counters",
        counters=True,
        model=_NO_TOWER,
    ),
    Variant(
        name="similar-history-counters",
        title="+ similarity-aware history, with counters",
        counters=True,
        model=_SIMILAR,
        baseline="dcn-counters",
    ),
)

# What is tested beside each variant against its baseline: who wins against whom.
COMPARISONS = (
    ("history", "product-query"),
    ("random", "history"),
    ("fine-tuned", "history"),
    ("similar-history", "history"),
    ("similar-history", "random"),
    ("similar-history", "lightgbm"),
    ("dcn-counters", "lightgbm-counters"),
    ("similar-history-counters", "lightgbm-counters"),
)


def comparisons(variants: Sequence[Variant]) -> list[tuple[str, str]]:
    """Return those of `COMPARISONS` whose two variants are there."""
    names = {variant.name for variant in variants}
    return [pair for pair in COMPARISONS if names.issuperset(pair)]


def counting_features(schema: DatasetSchema) -> list[Feature]:
    """Return the features that count what the purchase history holds."""
    return [feature for feature in schema.features if feature.from_history]


def choose(names: Sequence[str], schema: DatasetSchema, *, tables: bool) -> list[Variant]:
    """Return the variants of these names, or all that the dataset allows, in the table's order.

    Args:
        names: as the command line gives them; none for all.
        schema: of the dataset; without counting features there are no rows with counters.
        tables: whether there are embedding tables.

    Raises:
        BadInputError: a name is unknown or given twice, or a variant needs what is not there.
    """
    possible = {v.name: v for v in VARIANTS if not v.counters or counting_features(schema)}
    if not tables:
        possible = {n: v for n, v in possible.items() if not v.model.get("embedding_tower")}
    known = {variant.name for variant in VARIANTS}
    for name in names:
        if name not in known:
            raise BadInputError(f"unknown variant '{name}'; known: {', '.join(possible)}")
        if name not in possible:
            raise BadInputError(
                f"variant '{name}' needs embedding tables, or features that dataset.toml lists as "
                "from_history; this dataset lacks them"
            )
        if list(names).count(name) > 1:
            raise BadInputError(f"variant '{name}' is named twice")
    chosen = [v for v in possible.values() if not names or v.name in names]
    missing = {v.baseline for v in chosen if v.baseline} - {v.name for v in chosen}
    if missing:
        raise BadInputError(
            f"the lift of the variants named is against {', '.join(sorted(missing))}: name it too"
        )
    return chosen
