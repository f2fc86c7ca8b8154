"""Configuration of the ranker and of its training: frozen dataclasses, TOML in and out."""

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from features.errors import BadInputError
from features.schema import reject_unknown

TableMode = Literal["frozen", "fine-tuned", "random"]
Config = TypeVar("Config")

# The least value of each number; what is not here is at least 0.
_LEAST = dict.fromkeys(("epochs", "batch_rows", "chunk_groups", "threads", "min_count"), 1)
_LEAST |= dict.fromkeys(("cross_layers", "window_days", "cap"), 1)
_LEAST |= dict.fromkeys(("embedding_dim", "projection", "deep", "tower_deep", "head"), 1)


def _check_values(config: Any) -> None:
    """Raise `BadInputError` for the first value of a configuration that makes no sense."""
    for name in (f.name for f in dataclasses.fields(config)):
        value = getattr(config, name)
        least = _LEAST.get(name, 0)
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(number >= least for number in numbers if isinstance(number, int | float)):
            raise BadInputError(f"'{name}' must be {least} or more, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of the ranker.

    Attributes:
        embedding_tower: with it the two-tower model of the paper's Figure 3, without it the DCN
            baseline.
        purchase_history: whether the embedding tower reads the purchase history.
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
    tables: TableMode = "frozen"
    embedding_dim: int = 16
    cross_layers: int = 2
    cross_rank: int = 64
    deep: tuple[int, ...] = (128, 64)
    projection: int = 64
    tower_deep: tuple[int, ...] = (64,)
    head: tuple[int, ...] = (32,)

    def __post_init__(self) -> None:
        _check_values(self)
        if self.embedding_dim % 4:
            raise BadInputError(
                f"'embedding_dim' must be a multiple of 4, got {self.embedding_dim}"
            )
        for name in ("deep", "tower_deep"):
            if not getattr(self, name):
                raise BadInputError(f"'{name}' must name one layer or more, got none")


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
            ``auto`` is bfloat16 where the processor has instructions for it.
        validation_week: train on the weeks before the last training week, watch that week's log
            loss after each epoch, stop at the first that is no better, keep the best epoch's model.
        evaluate_week: the week to report; 0 for the dataset's own.
        train_weeks: weeks before it to train on; 0 for the dataset's own.
        seed: of the initial weights and of the order.
        threads: cores to train on.
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
    seed: int = 0
    threads: int = 2
    checkpoint_seconds: float = 20.0

    def __post_init__(self) -> None:
        _check_values(self)
        if self.warmup > 1:
            raise BadInputError(f"'warmup' must be 1 or less, got {self.warmup}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformConfig:
    """How transforms are fitted on the training weeks.

    Attributes:
        min_count: a sparse value seen in fewer training records becomes the unknown row 0, which
            is thereby trained too.
        bins: quantile bins of each dense feature, embedded beside its scaled value; 0 for none.
    """

    min_count: int = 5
    bins: int = 40

    def __post_init__(self) -> None:
        _check_values(self)


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
        _check_values(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankerConfig:
    """Everything that decides the outcome of a run, beside its data."""

    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    transforms: TransformConfig = field(default_factory=TransformConfig)
    history: HistoryConfig = field(default_factory=HistoryConfig)


def to_toml(config: Any) -> str:
    """Return a configuration dataclass as TOML text, nested ones as tables."""
    plain, nested = [], []
    for name, value in ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config)):
        if dataclasses.is_dataclass(value):
            nested.append(f"\n[{name}]\n{to_toml(value)}")
        else:
            plain.append(f"{name} = {_toml_value(value)}\n")
    return "".join(plain) + "".join(nested)


def from_toml(path: Path, into: type[Config]) -> Config:
    """Read a configuration; what is not given keeps its default.

    Raises:
        BadInputError: the file is missing or not TOML, or a key or value does not fit.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInputError(f"{path}: no such configuration file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path}: not valid TOML: {error}") from error
    return from_dict(str(path), content, into)


def from_dict(where: str, content: dict[str, Any], into: type[Config]) -> Config:
    """Make the dataclass ``into`` of a nested dict, refusing unknown keys and wrong types."""
    hints = get_type_hints(into)
    reject_unknown(where, content, hints)
    values = {k: _checked(f"{where}: '{k}'", value, hints[k]) for k, value in content.items()}
    try:
        return into(**values)
    except BadInputError as error:
        raise BadInputError(f"{where}: {error}") from None


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _checked(where: str, value: Any, kind: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise BadInputError(f"{where} must be a table, got {value!r}")
        return from_dict(where, value, kind)  # type: ignore[arg-type]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise BadInputError(
                f"{where} must be one of {', '.join(get_args(kind))}, got {value!r}"
            )
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise BadInputError(f"{where} must be a list, got {value!r}")
        return tuple(_checked(where, item, get_args(kind)[0]) for item in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadInputError(f"{where} must be {kind.__name__}, got {value!r}")
    return value
