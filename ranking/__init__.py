"""The click-through-rate ranker: fused embedding tables, two towers, training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ranking.config import (
    HistoryConfig,
    ModelConfig,
    RankerConfig,
    TrainingConfig,
    TransformConfig,
)

if TYPE_CHECKING:
    from ranking.bundle import Bundle
    from ranking.pretrained_embeddings import PretrainedEmbeddingBagCollection
    from ranking.run import train_ranker

__all__ = [
    "Bundle",
    "HistoryConfig",
    "ModelConfig",
    "PretrainedEmbeddingBagCollection",
    "RankerConfig",
    "TrainingConfig",
    "TransformConfig",
    "train_ranker",
]

# Loaded at first use, so that importing a configuration stays instant.
_LAZY = {
    "Bundle": "ranking.bundle",
    "PretrainedEmbeddingBagCollection": "ranking.pretrained_embeddings",
    "train_ranker": "ranking.run",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ranking' has no attribute '{name}'")
