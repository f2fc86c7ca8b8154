"""What the tests of the ranker share."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny_ranker import write_tiny_tables

from features.requests import build_requests


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small tensors only: more threads cost more than they give."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranker_data(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny dataset with its request records, where a run expects them; read only."""
    folder = tmp_path_factory.mktemp("ranker") / "data"
    shutil.copytree(tiny_dataset, folder)
    build_requests(folder, folder / "requests")
    return folder


@pytest.fixture(scope="session")
def random_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random embedding tables of the tiny dataset's products and queries; read only."""
    return write_tiny_tables(tmp_path_factory.mktemp("ranker") / "tables")
