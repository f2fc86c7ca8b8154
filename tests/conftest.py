"""What the tests of all packages share."""

from pathlib import Path

import pytest
from tiny_dataset import write_tiny_dataset

from features.requests import build_requests


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset folder; read only."""
    return write_tiny_dataset(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def tiny_requests(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The request records of `tiny_dataset`; read only."""
    output = tmp_path_factory.mktemp("tiny") / "requests"
    build_requests(tiny_dataset, output)
    return output
