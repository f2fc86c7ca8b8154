"""Raw ids to rows: the map of tensors against a dict, and the hash of strings against FNV-1a."""

import warnings

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from features.id_map import MISSING_ID, IdMap, hash_strings

LOWEST, HIGHEST = -(1 << 63), (1 << 63) - 1
any_id = st.one_of(
    st.sampled_from([LOWEST, LOWEST + 1, -1, 0, 1, HIGHEST - 1, HIGHEST]),
    st.integers(-20, 20),
    st.integers(LOWEST, HIGHEST),
)


def fnv_1a(text):
    """The published byte-by-byte loop; 64 bits, read as a signed number."""
    value = 0xCBF29CE484222325
    for byte in text.encode("utf-8"):
        value = (value ^ byte) * 0x100000001B3 % (1 << 64)
    return value - (1 << 64) if value >> 63 else value


def int64(ids):
    return np.array(ids, dtype=np.int64)


@settings(deadline=None, max_examples=200)
@given(known=st.lists(any_id, unique=True, max_size=60), asked=st.lists(any_id, max_size=60))
def test_map_is_the_same_as_a_dict(known, asked):
    rows = {raw: row for row, raw in enumerate(known, start=1)}
    id_map = IdMap(int64(known))
    assert len(id_map) == len(known)
    found = id_map(torch.from_numpy(int64(known + asked)))
    assert found.dtype == torch.int64
    assert found.tolist() == [rows.get(raw, 0) for raw in known + asked]


@pytest.mark.parametrize("stride", [1, 7, 1 << 20, -(1 << 44) + 1])
def test_a_large_map_of_regular_ids_finds_each(stride):
    known = np.arange(50_000, dtype=np.int64) * stride
    id_map = IdMap(known)
    torch.testing.assert_close(id_map(torch.from_numpy(known)), torch.arange(1, 50_001))
    assert id_map(torch.from_numpy(known + 50_000 * stride)).count_nonzero() == 0


def test_an_empty_map_knows_nothing():
    id_map = IdMap(int64([]))
    assert len(id_map) == 0
    assert id_map(torch.tensor([0, 5, LOWEST, HIGHEST])).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("shape", [(), (0,), (6,), (2, 3), (2, 0), (1, 2, 3)])
def test_the_shape_is_kept(shape):
    asked = torch.full(shape, 17)
    found = IdMap(int64([4, 17]))(asked)
    assert found.shape == shape
    assert found.eq(2).all()


def test_ids_that_are_not_contiguous_in_memory():
    asked = torch.tensor([[4, 0], [17, 4]]).t()
    assert IdMap(int64([4, 17]))(asked).tolist() == [[1, 2], [0, 1]]


def test_an_id_given_twice_is_refused_by_name():
    with pytest.raises(ValueError, match="given once, got -9 twice"):
        IdMap(int64([4, -9, 17, -9]))


def test_scripted_map_gives_the_same():
    known = np.random.default_rng(0).integers(LOWEST, HIGHEST, 500)
    asked = torch.from_numpy(np.concatenate([known, known + 1, int64([LOWEST, 0, HIGHEST])]))
    id_map = IdMap(known)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`?torch\.jit", DeprecationWarning)
        scripted = torch.jit.script(id_map)
    torch.testing.assert_close(scripted(asked), id_map(asked))
    assert scripted(asked.reshape(-1, 1)).shape == (len(asked), 1)


def test_the_map_moves_with_the_module_and_has_no_parameters():
    id_map = IdMap(int64([3, 5]))
    assert not list(id_map.parameters())
    assert set(id_map.state_dict()) == {"ids", "slots"}


@pytest.mark.parametrize(
    ("text", "value"),
    # From the reference vectors of the FNV authors.
    [("", 0xCBF29CE484222325), ("a", 0xAF63DC4C8601EC8C), ("foobar", 0x85944171F73967E8)],
)
def test_published_hashes(text, value):
    assert hash_strings(pa.array([text])).view(np.uint64).tolist() == [value]


@settings(deadline=None)
@given(texts=st.lists(st.one_of(st.none(), st.text(max_size=30)), max_size=20))
def test_hashes_are_fnv_1a_of_the_utf8_bytes(texts):
    expected = [MISSING_ID if text is None else fnv_1a(text) for text in texts]
    for kind in (pa.string(), pa.large_string()):
        hashes = hash_strings(pa.array(texts, kind))
        assert hashes.dtype == np.int64
        assert hashes.tolist() == expected


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_a_slice_of_an_array_is_hashed_alone(kind):
    texts = ["milk", None, "crème brûlée", "", "牛乳", "tea", None]
    array = pa.array(texts, kind)
    for start, length in ((0, 3), (1, 4), (3, 2), (4, 0), (5, 2)):
        expected = [
            MISSING_ID if text is None else fnv_1a(text) for text in texts[start : start + length]
        ]
        assert hash_strings(array.slice(start, length)).tolist() == expected


@pytest.mark.parametrize("array", [pa.array([], pa.string()), pa.nulls(0, pa.large_string())])
def test_no_strings_at_all(array):
    assert hash_strings(array).shape == (0,)


def test_nulls_only():
    assert hash_strings(pa.nulls(2, pa.string())).tolist() == [MISSING_ID, MISSING_ID]
