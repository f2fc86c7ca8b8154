"""What the tests of the ranker share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small tensors only: more threads cost more than they give."""
    torch.set_num_threads(1)
