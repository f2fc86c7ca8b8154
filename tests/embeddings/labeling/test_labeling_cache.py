import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.labeling import cache as cache_module
from embeddings.labeling.cache import KEY_BYTES, AnswerCache, answer_keys
from embeddings.labeling.grades import UNGRADED, Pairs
from features.errors import BadInputError

KEYS = [bytes([number]) * KEY_BYTES for number in range(200)]
NAN = np.full(3, np.nan, np.float32)


def add(cache, keys, labels):
    probability = np.full((len(keys), 3), 0.25, np.float32)
    probability[np.arange(len(keys)), labels] = 0.5
    cache.add(keys, np.array(labels, np.int8), probability)


def keys_of(fingerprint, *pairs):
    queries, titles = zip(*pairs, strict=True)
    return answer_keys(fingerprint, Pairs(queries=queries, titles=titles))


def test_a_key_is_of_all_that_decides_an_answer():
    keys = keys_of(
        "g", ("ab", "c"), ("a", "bc"), ("ab", "d"), ("", "abc"), ("1:a", "b"), ("1", ":")
    )
    assert {len(key) for key in keys} == {KEY_BYTES}
    assert len(set(keys)) == len(keys)
    assert keys_of("h", ("ab", "c")) != keys[:1]
    assert keys_of("g", ("ab", "c")) == keys[:1]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=30))
def test_keys_are_equal_where_queries_and_titles_are(pairs):
    keys = keys_of("g", *pairs)
    assert len(set(keys)) == len(set(pairs))
    for pair, key in zip(pairs, keys, strict=True):
        assert key == keys[pairs.index(pair)]


def test_answers_come_back_in_the_order_asked_for(tmp_path):
    with AnswerCache(tmp_path / "made" / "answers.sqlite") as cache:
        assert cache.is_empty()
        add(cache, KEYS[:3], [2, 0, 1])
        cache.add(KEYS[3:4], np.array([1], np.int8), NAN[None])
        assert not cache.is_empty()
        found = cache.look_up([KEYS[2], KEYS[9], KEYS[0], KEYS[2], KEYS[3]])
    assert found.label.tolist() == [1, UNGRADED, 2, 1, 1]
    assert found.position.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(
        found.probability,
        np.array([[0.25, 0.5, 0.25], NAN, [0.25, 0.25, 0.5], [0.25, 0.5, 0.25], NAN], np.float32),
    )
    with AnswerCache(tmp_path / "made" / "answers.sqlite") as again:
        assert again.look_up(KEYS[:3]).label.tolist() == [2, 0, 1]
        assert not len(again.look_up([]).label)


def test_a_later_answer_takes_the_place_of_an_earlier_one(tmp_path):
    with AnswerCache(tmp_path / "answers.sqlite") as cache:
        add(cache, KEYS[:2], [0, 0])
        add(cache, KEYS[1:3], [2, 2])
        assert cache.look_up(KEYS[:3]).label.tolist() == [0, 2, 2]


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 199), st.integers(0, 2)), max_size=40), max_size=6),
    st.lists(st.integers(0, 199), max_size=60),
)
def test_the_cache_answers_as_a_dict_does(tmp_path_factory, writes, asked):
    before, cache_module._KEYS_A_LOOKUP = cache_module._KEYS_A_LOOKUP, 7
    known = {}
    try:
        with AnswerCache(tmp_path_factory.mktemp("cache") / "answers.sqlite") as cache:
            for write in writes:
                answers = dict(write)
                add(cache, [KEYS[key] for key in answers], list(answers.values()))
                known |= answers
            found = cache.look_up([KEYS[key] for key in asked])
    finally:
        cache_module._KEYS_A_LOOKUP = before
    assert found.label.tolist() == [known.get(key, UNGRADED) for key in asked]


def test_two_runs_share_a_file(tmp_path):
    path = tmp_path / "answers.sqlite"
    with AnswerCache(path) as one, AnswerCache(path) as other:
        add(one, KEYS[:1], [2])
        add(other, KEYS[1:2], [1])
        assert one.look_up(KEYS[:2]).label.tolist() == [2, 1]
        assert other.look_up(KEYS[:2]).label.tolist() == [2, 1]


ADD_AND_WAIT = """
import sys, time
from pathlib import Path
import numpy as np
from embeddings.labeling.cache import AnswerCache
cache = AnswerCache(Path(sys.argv[1]), commit_seconds=float(sys.argv[2]))
for number in range(3):
    key = bytes([number]) * 16
    cache.add([key], np.array([1], np.int8), np.full((1, 3), np.nan, np.float32))
print("added", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("wait", "kept"), [(0.0, 3), (1000.0, 0)])
def test_what_a_killed_process_keeps(tmp_path, wait, kept):
    path = tmp_path / "answers.sqlite"
    process = subprocess.Popen(
        [sys.executable, "-c", ADD_AND_WAIT, path, str(wait)], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "added\n"
        process.kill()
    with AnswerCache(path) as cache:
        assert (cache.look_up(KEYS[:3]).label == 1).sum() == kept


def test_answers_wait_no_longer_than_they_may(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    path = tmp_path / "answers.sqlite"

    def kept():
        with sqlite3.connect(path) as file:
            return file.execute("SELECT count(*) FROM answers").fetchone()[0]

    with AnswerCache(path, commit_seconds=5.0) as cache:
        add(cache, KEYS[:1], [1])
        assert kept() == 0
        now = 4.0
        add(cache, KEYS[1:2], [1])
        assert kept() == 0
        now = 5.0
        add(cache, KEYS[2:3], [1])
        assert kept() == 3
        add(cache, KEYS[3:4], [1])
        assert kept() == 3
    assert kept() == 4


def test_another_kind_of_file_is_refused(tmp_path):
    path = tmp_path / "answers.sqlite"
    path.write_bytes(b"no database at all, though it is long enough to look like one" * 20)
    with pytest.raises(BadInputError, match=r"answers\.sqlite: cannot be used as a cache"):
        AnswerCache(path)


def test_a_full_disk_is_told_as_one(tmp_path):
    with AnswerCache(tmp_path / "answers.sqlite") as cache:
        cache._file.execute("PRAGMA max_page_count = 4")
        with pytest.raises(OSError, match="No space left") as failed:
            add(cache, [number.to_bytes(16, "big") for number in range(5000)], [1] * 5000)
        assert failed.value.filename == str(tmp_path / "answers.sqlite")
        cache._file.execute("ROLLBACK") if cache._file.in_transaction else None
