import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.batching import for_each, length_buckets, padded


def test_padding_by_hand():
    ids, mask = padded([[5, 6, 7], [8], []], 1)
    assert ids.tolist() == [[5, 6, 7], [8, 1, 1], [1, 1, 1]]
    assert mask.tolist() == [[True] * 3, [True, False, False], [False] * 3]


def test_buckets_by_hand():
    """40 texts of 3 tokens, 40 of 4 (a third more), 40 of 12."""
    lengths = np.array([12, 3, 4] * 40)
    first, second = length_buckets(lengths)
    assert sorted(lengths[first]) == [3] * 40 + [4] * 40
    assert lengths[second].tolist() == [12] * 40


def test_few_texts_are_one_part():
    lengths = np.array([2, 30, 5])
    assert [part.tolist() for part in length_buckets(lengths)] == [[0, 2, 1]]
    assert length_buckets(np.array([], np.int64)) == []


@settings(deadline=None)
@given(st.lists(st.integers(2, 64), max_size=300))
def test_buckets_hold_each_text_once_and_are_no_smaller_than_need_be(lengths):
    lengths = np.array(lengths, np.int64)
    parts = length_buckets(lengths)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    for part, following in pairwise(parts):
        assert lengths[part].max() <= lengths[following].min()
        assert len(part) >= 32
    if len(parts) > 1:
        assert len(parts[-1]) >= 16


def test_work_is_done_on_every_batch_and_the_threads_are_restored():
    before, done = torch.get_num_threads(), []
    lock = threading.Lock()

    def work(batch):
        with lock:
            done.append((int(batch[0]), torch.get_num_threads()))

    for_each(work, [np.array([n]) for n in range(20)])
    assert sorted(done) == [(n, 1) for n in range(20)]
    assert torch.get_num_threads() == before


def test_what_goes_wrong_in_a_batch_is_raised():
    before = torch.get_num_threads()

    def work(batch):
        if batch[0] == 3:
            raise ValueError("batch 3")

    with pytest.raises(ValueError, match="batch 3"):
        for_each(work, [np.array([n]) for n in range(6)])
    assert torch.get_num_threads() == before
