"""Configuration of the ranker and of its training."""

from dataclasses import dataclass, field
from typing import Literal

from features.config_file import check_least
from features.errors import BadInputError

TableMode = Literal["frozen", "fine-tuned", "random"]

# The least value of each number; what is not here is at least 0.
_LEAST = dict.fromkeys(("epochs", "batch_rows", "chunk_groups", "threads", "min_count"), 1)
_LEAST |= dict.fromkeys(("cross_layers", "window_days", "cap"), 1)
_LEAST |= dict.fromkeys(("embedding_dim", "projection", "deep", "tower_deep", "head"), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of the ranker.

    Attributes:
        embedding_tower: with it the two-tower model of the paper's Figure 3, without it the DCN
            baseline.
        purchase_history: whether the embedding tower reads the purchase history.
        history_counts: whether the DCN tower reads how often what is like the candidate was bought
            (`ranking.history`); needs the purchase history and frozen tables.
        count_sharpness: what counts as alike, the greater the closer, for `history_counts`.
        count_windows: days before the request to count in, for `history_counts`.
        tables: how the product and query tables take part: ``frozen``, ``fine-tuned`` from the
            pretrained values, or ``random`` values trained along.
        embedding_dim: dimension of each sparse feature's embedding, a multiple of 4.
        cross_layers: layers of the DCN tower's cross network.
        cross_rank: rank of its matrices (DCN-V2, equation 2); 0 for full ones.
        deep: widths of the deep network beside the cross network.
        projection: dimension to which product, query and history embeddings are projected.
        tower_deep: widths of the deep network of the embedding tower.
        head: widths of the fully connected layers over both towers.
    """

    embedding_tower: bool = True
    purchase_history: bool = True
    history_counts: bool = False
    count_sharpness: tuple[float, ...] = (2.0, 8.0, 32.0, 128.0)
    count_windows: tuple[int, ...] = (7, 28, 84)
    tables: TableMode = "frozen"
    embedding_dim: int = 16
    cross_layers: int = 2
    cross_rank: int = 64
    deep: tuple[int, ...] = (128, 64)
    projection: int = 64
    tower_deep: tuple[int, ...] = (64,)
    head: tuple[int, ...] = (32,)

    def __post_init__(self) -> None:
        check_least(self, _LEAST)
        if self.embedding_dim % 4:
            raise BadInputError(
                f"'embedding_dim' must be a multiple of 4, got {self.embedding_dim}"
            )
        for name in ("deep", "tower_deep"):
            if not getattr(self, name):
                raise BadInputError(f"'{name}' must name one layer or more, got none")
        if self.counts_history:
            if self.tables != "frozen" or not self.purchase_history:
                raise BadInputError(
                    "'history_counts' needs 'purchase_history' and frozen tables, got "
                    f"purchase_history = {str(self.purchase_history).lower()} and "
                    f"{self.tables} tables"
                )
            for name in ("count_sharpness", "count_windows"):
                if not all(value > 0 for value in getattr(self, name) or (0,)):
                    raise BadInputError(f"'{name}' must name one or more numbers above 0")

    @property
    def counts_history(self) -> bool:
        """Whether the model counts in the history; without the embedding tower it has no tables."""
        return self.history_counts and self.embedding_tower


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How the ranker is trained.

    Attributes:
        epochs: passes over the training weeks.
        batch_rows: candidates in a batch, of whole requests.
        chunk_groups: row groups (of 1,024 requests) that are shuffled together.
        learning_rate: peak rate of Adam for the dense layers; warmed up, then a cosine to 0.
        sparse_learning_rate: peak rate of row-wise Adagrad for the trainable tables.
        table_learning_rate: the same for fine-tuned or random product and query tables.
        warmup: share of the steps that warm up.
        weight_decay: of the dense layers' matrices (AdamW).
        precision: of the matrix products; weights, sums and everything else stay float32.
            ``auto`` is bfloat16 on a GPU and where the processor has instructions for it.
        validation_week: train on the weeks before the last training week, watch that week's log
            loss after each epoch, stop at the first that is no better, keep the best epoch's model.
        evaluate_week: the week to report; 0 for the dataset's own.
        train_weeks: weeks before it to train on; 0 for the dataset's own.
        keep_unclicked: share of the requests without a click that are trained on, each counting
            for those left out; see `features.sampling`.
        seed: of the initial weights and of the order.
        device: where to train: ``cuda``, a GPU for each process, or ``cpu``; ``auto`` is the GPU
            where torch and fbgemm can use one. A run may go on with another one.
        threads: cores of a machine to train on, shared by its processes.
        whole_table_mb: with several processes, each holds a copy of a frozen table of up to this
            many MiB, and a range of the rows of a larger one.
        checkpoint_seconds: time between two checkpoints.
    """

    epochs: int = 1
    batch_rows: int = 4096
    chunk_groups: int = 32
    learning_rate: float = 6e-3
    sparse_learning_rate: float = 0.2
    table_learning_rate: float = 0.01
    warmup: float = 0.05
    weight_decay: float = 0.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    validation_week: bool = False
    evaluate_week: int = 0
    train_weeks: int = 0
    keep_unclicked: float = 1.0
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    threads: int = 2
    whole_table_mb: float = 4096.0
    checkpoint_seconds: float = 20.0

    def __post_init__(self) -> None:
        check_least(self, _LEAST)
        if self.warmup > 1:
            raise BadInputError(f"'warmup' must be 1 or less, got {self.warmup}")
        if not 0 < self.keep_unclicked <= 1:
            raise BadInputError(
                f"'keep_unclicked' must be above 0 and at most 1, got {self.keep_unclicked}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformConfig:
    """How transforms are fitted on the training weeks.

    Attributes:
        min_count: a sparse value seen in fewer training records becomes the unknown row 0, which
            is thereby trained too.
        bins: quantile bins of each dense feature, embedded beside its scaled value; 0 for none.
        leave_out: features of the dataset that the model does not read.
    """

    min_count: int = 5
    bins: int = 40
    leave_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_least(self, _LEAST)


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryConfig:
    """The purchase history that request records carry.

    Attributes:
        window_days: how many days before the request it reaches back.
        cap: the most products in one, the most recent ones.
    """

    window_days: int = 84
    cap: int = 1000

    def __post_init__(self) -> None:
        check_least(self, _LEAST)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankerConfig:
    """Everything that decides the outcome of a run, beside its data."""

    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    transforms: TransformConfig = field(default_factory=TransformConfig)
    history: HistoryConfig = field(default_factory=HistoryConfig)
