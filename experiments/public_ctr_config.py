"""Settings of the public CTR datasets, and the figures that BARS reports for them.

BARS (https://github.com/reczoo/BARS, folder ``ranking/ctr/DCNv2``) publishes fixed splits of
Frappe, MovielensLatest, Criteo and Avazu, and for each the settings and the five runs of FuxiCTR's
parallel DCNv2. Its leaderboard prints the best run; what a mean is compared with here is the mean.
"""

import dataclasses
import re
from dataclasses import dataclass
from statistics import mean, stdev

from features.config_file import check_least
from features.errors import BadInputError

_LEAST = dict.fromkeys(("embedding_dim", "cross_layers", "deep", "min_count", "patience"), 1)
_LEAST |= dict.fromkeys(("epochs", "threads"), 1)
_LEAST |= {"batch_size": 2}  # batch normalisation needs two rows


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicConfig:
    """A parallel DCNv2 + DNN and its training; the defaults are BARS's for Frappe_x1.

    Attributes:
        embedding_dim: dimension of each field's embedding.
        cross_layers: layers of the full-rank cross network.
        deep: widths of the deep network.
        dropout: share of the deep network's activations that training sets to 0.
        batch_norm: whether the deep network normalises before each ReLU.
        embedding_l2: weight of half the squared norm of all embeddings in the loss.
        min_count: a categorical value seen in fewer training rows counts as unknown.
        numeric: names of the numeric columns of CSV or Parquet files, all others are categorical;
            in libsvm files they are found (`experiments.public_ctr_libsvm`).
        batch_size: rows a step.
        learning_rate: of Adam at the start; divided by 10 after each epoch without a better
            validation AUC.
        patience: such epochs in a row that end the training.
        epochs: the most passes over the training rows.
        seeds: of initial weights, order and dropout; one run each.
        threads: cores to train on.
    """

    embedding_dim: int = 10
    cross_layers: int = 4
    deep: tuple[int, ...] = (400, 400, 400)
    dropout: float = 0.4
    batch_norm: bool = True
    embedding_l2: float = 0.05
    min_count: int = 1
    numeric: tuple[str, ...] = ()
    batch_size: int = 4096
    learning_rate: float = 1e-3
    patience: int = 2
    epochs: int = 100
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    threads: int = 2

    def __post_init__(self) -> None:
        check_least(self, _LEAST)
        if self.dropout >= 1:
            raise BadInputError(f"'dropout' must be below 1, got {self.dropout}")
        for name in ("deep", "seeds"):
            if not getattr(self, name):
                raise BadInputError(f"'{name}' must name one or more, got none")
        for name in ("seeds", "numeric"):
            given = getattr(self, name)
            for value in given:
                if given.count(value) > 1:
                    raise BadInputError(f"'{name}' names {value!r} twice")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What BARS reports for DCNv2 on one of its datasets.

    Attributes:
        name: of the dataset.
        config: BARS's settings.
        rows: training, validation and test rows of its split.
        auc: test AUC of each run.
        log_loss: test log loss of each run.
    """

    name: str
    config: PublicConfig
    rows: tuple[int, int, int]
    auc: tuple[float, ...]
    log_loss: tuple[float, ...]

    @property
    def source(self) -> str:
        """Where the figures are published."""
        return f"BARS, ranking/ctr/DCNv2/DCNv2_{self.name.lower()}"


_FRAPPE = PublicConfig()
# Numeric columns of Criteo_x1 are normalised in its files already; BARS scales them no further.
_CRITEO = PublicConfig(
    cross_layers=3,
    deep=(500, 500, 500),
    dropout=0.1,
    batch_norm=False,
    embedding_l2=1e-5,
    numeric=tuple(f"I{number}" for number in range(1, 14)),
)

REFERENCES = (
    Reference(
        name="Frappe_x1",
        config=_FRAPPE,
        rows=(202_027, 57_722, 28_860),
        auc=(0.984478, 0.984184, 0.983331, 0.983632, 0.983495),
        log_loss=(0.149149, 0.154896, 0.153688, 0.150610, 0.151837),
    ),
    Reference(
        name="MovielensLatest_x1",
        config=dataclasses.replace(_FRAPPE, cross_layers=5, dropout=0.2, embedding_l2=0.01),
        rows=(1_404_801, 401_372, 200_686),
        auc=(0.969098, 0.968205, 0.968267, 0.968876, 0.968838),
        log_loss=(0.214736, 0.217647, 0.216530, 0.214814, 0.216954),
    ),
    Reference(
        name="Criteo_x1",
        config=_CRITEO,
        rows=(33_003_326, 8_250_124, 4_587_167),
        auc=(0.814195, 0.813970, 0.813831, 0.814079, 0.813620),
        log_loss=(0.437788, 0.438088, 0.438203, 0.437967, 0.438391),
    ),
    Reference(
        name="Avazu_x1",
        config=dataclasses.replace(_FRAPPE, cross_layers=5, dropout=0.2),
        rows=(28_300_276, 4_042_897, 8_085_794),
        auc=(0.765607, 0.762966, 0.761490, 0.765619, 0.762515),
        log_loss=(0.366447, 0.367892, 0.368414, 0.366361, 0.367514),
    ),
)


def reference_for(name: str) -> Reference | None:
    """Return BARS's figures for a dataset of this name, whatever its case and punctuation."""
    wanted = _plain(name)
    return next((one for one in REFERENCES if _plain(one.name) == wanted), None)


def settings_for(name: str) -> PublicConfig:
    """Return BARS's settings for a dataset of theirs, those for Frappe_x1 for any other."""
    reference = reference_for(name)
    return reference.config if reference else PublicConfig()


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def spread(values: tuple[float, ...] | list[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation, which one value alone has not."""
    return mean(values), stdev(values) if len(values) > 1 else None
