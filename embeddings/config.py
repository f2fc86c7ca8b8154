"""Configuration of DashCLIP's training."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from embeddings.relevance import Chosen
from embeddings.sampling import SamplingConfig
from features.config_file import check_least
from features.errors import BadInputError

_LEAST = dict.fromkeys(("batch", "accumulate", "image_layers", "max_tokens"), 1)
_LEAST |= dict.fromkeys(("queue", "patience", "threads", "mining_depth"), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartConfig:
    """What training starts from.

    Attributes:
        checkpoint: folder, file or hub name (`embeddings.starts`); empty for the packaged MiniLM.
        image_trunk: pretrained trunk of an image encoder that the checkpoint does not bring.
        image_size: side of its images in pixels, a multiple of 32.
        image_layers: transformer layers over its feature map.
        max_tokens: longer titles and queries are cut; of starts from a text encoder.
    """

    checkpoint: str = ""
    image_trunk: Literal["efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"] = (
        "efficientnet-lite0"
    )
    image_size: int = 160
    image_layers: int = 2
    max_tokens: int = 64

    def __post_init__(self) -> None:
        check_least(self, _LEAST)
        if self.image_size < 32 or self.image_size % 32:
            raise BadInputError(f"'image_size' must be a multiple of 32, got {self.image_size}")

    def at(self, folder: Path) -> "StartConfig":
        """Return the same with another checkpoint."""
        return replace(self, checkpoint=str(folder))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig:
    """How a stage steps.

    Attributes:
        epochs: passes over the stage's examples; 0 leaves the stage out.
        limit: the most examples of an epoch; 0 for all.
        batch: examples a step, over all processes.
        accumulate: parts that a step's batch is computed in, to save memory.
        learning_rate: peak of AdamW; warmed up, then a cosine to 0.
        warmup: share of the steps that warm up.
        weight_decay: of the matrices.
        frozen_layers: share of the layers that stay as they are, counted from the input.
        clip: largest norm of the gradient.
    """

    epochs: int = 1
    limit: int = 0
    batch: int = 256
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup: float = 0.05
    weight_decay: float = 0.05
    frozen_layers: float = 2 / 3
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_least(self, _LEAST)
        _check_shares(self, ("warmup", "frozen_layers"))
        if self.batch % self.accumulate:
            raise BadInputError(
                f"'batch' must be a multiple of 'accumulate', got {self.batch} and "
                f"{self.accumulate}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainingConfig(StageConfig):
    """Stage 1: image-text contrast and matching on the catalog (paper, Section 3.2.1).

    Attributes:
        momentum: of the encoders that give soft labels and queues (ALBEF; 0.995 in BLIP). 0 leaves
            them out: one-hot labels, negatives of the batch only.
        queue: embeddings of earlier batches that serve as negatives (57,600 in BLIP).
        alpha: weight of the soft labels, reached after ``alpha_epochs``.
        alpha_epochs: epochs over which it rises from 0.
        matching: whether the matching loss is trained.
        patience: evaluations (one an epoch) without a lower matching loss before the stage ends;
            without ``matching`` it runs all its epochs.
        held_out: share of the titles kept for evaluation.
    """

    epochs: int = 10
    batch: int = 128
    learning_rate: float = 2e-4
    momentum: float = 0.995
    queue: int = 57_600
    alpha: float = 0.4
    alpha_epochs: float = 2.0
    matching: bool = True
    patience: int = 2
    held_out: float = 0.1

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        _check_shares(self, ("momentum", "alpha", "held_out"))


@dataclass(frozen=True, slots=True, kw_only=True)
class CroppingConfig(StageConfig):
    """Stage 1 of a catalog without images: crops of titles as queries (`embeddings.cropping`).

    Attributes:
        temperature: of the contrast.
        keep: share of this stage's weights in the final ones, the rest being those of stage 2:
            averaged weights forget less of the catalog (Wortsman and others 2022, WiSE-FT).
    """

    epochs: int = 2
    batch: int = 256
    learning_rate: float = 1e-4
    temperature: float = 0.05
    keep: float = 0.5

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        _check_temperature(self.temperature)
        _check_shares(self, ("keep",))


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignmentConfig(StageConfig):
    """Stage 2: product-query contrast (paper, Section 3.2.2 and equation 1).

    NOTE[DIFF]: the defaults are what retrieved best where it was tried: the batch's other queries
    stand in for the paper's proxies, each query is contrasted with the batch's products too. The
    paper's own choices are in ``recipes/paper.toml``.

    Attributes:
        temperature: of the contrast; 0.05 in SimCSE, which the loss follows.
        shared_negatives: whether every query of the batch that is not relevant to a product is a
            negative for it, beside its own ten.
        symmetric: whether products of the batch are also contrasted for each positive query.
        mined_products: products a tuple that rank high for its query without being known as
            relevant (`embeddings.mining`), beside those of the batch; needs ``symmetric``.
        mining_depth: how many of the highest-ranked they are drawn from, at each epoch anew.
        labels: whose labels are trained on: all, those of people, or those of a language model.
        sampling: positives and negatives of a product.
    """

    epochs: int = 2
    batch: int = 128
    learning_rate: float = 1e-4
    temperature: float = 0.05
    shared_negatives: bool = True
    symmetric: bool = True
    mined_products: int = 2
    mining_depth: int = 50
    labels: Chosen = "all"
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(proxies=False))

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)
        _check_temperature(self.temperature)
        if self.mined_products and not self.symmetric:
            raise BadInputError("'mined_products' are contrasted with 'symmetric' only")


@dataclass(frozen=True, slots=True, kw_only=True)
class DashClipTraining:
    """Everything that decides the outcome of ``train-dashclip``, beside its data.

    Attributes:
        start: the checkpoint.
        pretraining: stage 1.
        cropping: what takes its place where there are no images.
        alignment: stage 2.
        held_out_queries: share of the queries that training never sees.
        precision: of the matrix products; ``auto`` is bfloat16 where the processor has it.
        gradient_checkpointing: compute activations again in the backward pass, to save memory.
        cache_gib: memory for what frozen layers say of each text and image; what does not fit is
            computed each time.
        max_broken_images: share of the images that may be unreadable.
        threads: cores to train on.
        seed: of new weights, samples and orders.
        checkpoint_seconds: time between two checkpoints.
    """

    start: StartConfig = field(default_factory=StartConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    cropping: CroppingConfig = field(default_factory=CroppingConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    held_out_queries: float = 0.2
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    cache_gib: float = 4.0
    max_broken_images: float = 0.1
    threads: int = 2
    seed: int = 0
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        check_least(self, _LEAST)
        _check_shares(self, ("held_out_queries", "max_broken_images"))


def _check_temperature(value: float) -> None:
    if not value > 0:
        raise BadInputError(f"'temperature' must be above 0, got {value}")


def _check_shares(config: Any, names: Iterable[str]) -> None:
    for name in names:
        if getattr(config, name) > 1:
            raise BadInputError(f"'{name}' must be 1 or less, got {getattr(config, name)}")
