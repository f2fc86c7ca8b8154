"""Putting a trained ranker to use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.scorer import Scorer

__all__ = ["Scorer"]


def __getattr__(name: str) -> Any:
    if name == "Scorer":  # loaded at first use: it brings torch
        return import_module("serving.scorer").Scorer
    raise AttributeError(f"module 'serving' has no attribute '{name}'")
