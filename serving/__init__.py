"""Putting a trained ranker to use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.exported import ExportedRanker
    from serving.scorer import Scorer

__all__ = ["ExportedRanker", "Scorer"]

_HOME = {"ExportedRanker": "serving.exported", "Scorer": "serving.scorer"}


def __getattr__(name: str) -> Any:
    if name in _HOME:  # loaded at first use: they bring torch
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'serving' has no attribute '{name}'")
