"""What the tests of all packages share."""

import shutil
import signal
from pathlib import Path

import pytest
from tiny_dataset import write_tiny_dataset
from tiny_export import export_tiny
from tiny_ranker import write_tiny_tables

from features.requests import build_requests

# A shell has what it starts in the background ignore Ctrl-C, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session")
def tiny_exported(
    ranker_data: Path, random_tables: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A ranker of the tiny dataset, trained and exported with int8 tables; read only."""
    return export_tiny(ranker_data, random_tables, tmp_path_factory.mktemp("exported"))
