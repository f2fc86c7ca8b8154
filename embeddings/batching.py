"""Batches of texts of like length, and all cores at work on them.

Legend: ``N`` texts.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

# Tokens of a batch, padding included. Matrix products are no faster with more of them, and small
# batches keep all threads busy to the end.
TOKEN_BUDGET = 1024
_MOST_PADDING = 4 / 3
_FEWEST_ROWS = 32


def token_batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Yield the rows of each batch: texts of like length, at most ``budget`` tokens with padding.

    Args:
        lengths: [N] tokens of each text.
        budget: tokens of a batch; a text longer than that is a batch of its own.
    """
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        widths = lengths[order[start : start + budget]]
        padded = widths * np.arange(1, len(widths) + 1)
        size = max(1, int(np.searchsorted(padded, budget, side="right")))
        yield order[start : start + size]
        start += size


def length_buckets(lengths: np.ndarray) -> list[np.ndarray]:
    """Return the rows of each part of a batch whose texts are of like length.

    Padding is arithmetic for nothing: a part ends where its texts would be padded by a third, if
    it has some rows by then.

    Args:
        lengths: [N] tokens of each text.
    """
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order]
    parts, start = [], 0
    while start < len(order):
        end = int(np.searchsorted(ordered, ordered[start] * _MOST_PADDING, side="right"))
        end = max(end, min(start + _FEWEST_ROWS, len(order)))
        if len(order) - end < _FEWEST_ROWS // 2:
            end = len(order)
        parts.append(order[start:end])
        start = end
    return parts


def for_each(work: Callable[[np.ndarray], None], batches: Sequence[np.ndarray]) -> None:
    """Do ``work`` on each batch, as many at a time as torch has threads, each on one thread.

    Against several threads within a batch this has no barrier after each matrix product, at which
    threads wait for the slowest, and the result does not depend on the number of threads.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(work, batches):
                pass
    finally:
        torch.set_num_threads(threads)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Compute on ``count`` cores, inside the block only."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from drawing bars and reporting unused weights, inside the block only."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return token ids [N, T], filled up with ``pad``, and the mask [N, T] of what is a token."""
    import torch

    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
    return ids, torch.arange(longest) < lengths[:, None]
