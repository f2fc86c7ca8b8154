from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embeddings import vector_store
from embeddings.vector_store import VectorStore, content_key
from features.errors import BadInputError

ENCODER = SimpleNamespace(fingerprint="numbers-1", dim=2, normalized=False)
CONTENTS = st.tuples(
    st.sampled_from(["product", "query"]), st.text(max_size=3), st.none() | st.binary(max_size=3)
)


def key(number):
    return content_key("query", str(number))


def add(store, *numbers):
    vectors = np.array([[number, -number] for number in numbers], np.float32)
    store.add([key(number) for number in numbers], vectors, [str(number) for number in numbers])


@given(one=CONTENTS, other=CONTENTS)
def test_only_equal_contents_share_a_key(one, other):
    assert (content_key(*one) == content_key(*other)) == (one == other)
    assert len(content_key(*one)) == 16


def test_keys_stay_what_they_are():
    assert content_key("product", "milk").hex() == "cca85f60a0241c46570edc116285f8dd"
    assert content_key("product", "milk", b"\x89PNG").hex() == "bb87fc54f91d48818822349e958b68c3"


def test_vectors_come_back_in_any_order(tmp_path):
    store = VectorStore(tmp_path / "parts", ENCODER)
    add(store, 3, 5)
    add(store, 4)
    assert store.take([key(4), key(3), key(4)]).tolist() == [[4, -4], [3, -3], [4, -4]]
    assert store.take([]).shape == (0, 2)
    assert (len(store), store.added) == (3, 3)
    assert key(5) in store
    assert key(6) not in store
    assert not (tmp_path / "parts").exists()


def test_a_part_holds_what_was_not_saved(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(vector_store.time, "monotonic", lambda: now[0])
    store = VectorStore(tmp_path / "parts", ENCODER)
    for seconds, number in ((19, 1), (20, 2), (30, 3), (41, 4), (42, 5)):
        now[0] = seconds
        add(store, number)
    saved = sorted((tmp_path / "parts").iterdir())
    assert {path.name for path in saved} == {f"{key(n).hex()}.parquet" for n in (1, 3)}
    read = VectorStore(tmp_path / "parts", ENCODER)
    for path in saved:
        read.read(path)
    assert (len(read), read.added) == (4, 0)
    assert read.take([key(n) for n in (1, 2, 3, 4)])[:, 0].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("value", [np.nan, np.inf, 70_000.0])
def test_a_vector_that_float16_cannot_hold(tmp_path, value):
    store = VectorStore(tmp_path / "parts", ENCODER)
    with pytest.raises(BadInputError, match="encoder numbers-1: its vector of 'two' holds a value"):
        store.add([key(1), key(2)], np.array([[1, 2], [3, value]], np.float32), ["one", "two"])
    assert len(store) == 0


@pytest.mark.parametrize("change", [{"fingerprint": "numbers-2"}, {"dim": 3}])
def test_vectors_of_another_encoder_are_not_read(tmp_path, monkeypatch, change):
    monkeypatch.setattr(vector_store, "_SECONDS_A_PART", 0.0)
    add(VectorStore(tmp_path / "parts", ENCODER), 1)
    other = VectorStore(tmp_path / "parts", SimpleNamespace(**vars(ENCODER) | change))
    for path in (*(tmp_path / "parts").iterdir(), tmp_path / "absent"):
        other.read(path)
    assert len(other) == 0
