from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chat_server import ChatServer, missing, transformers_server
from tests.tiny_causal import save_trained_causal


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model that labels pairs by the rule of `tests.tiny_causal`."""
    return save_trained_causal(tmp_path_factory.mktemp("endpoint") / "model")


@pytest.fixture(scope="session")
def chat_server(chat_model: Path) -> Iterator[ChatServer]:
    """Transformers' OpenAI-compatible server, with the model of `chat_model`."""
    if reason := missing():
        pytest.skip(reason)
    with transformers_server(chat_model) as server:
        yield server
