"""The online ranker against the trained one, eager and as TorchScript."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_ranker import model_config, pretrained_tables, tiny_batch, tiny_ranker

from features.id_map import IdMap
from features.transforms import fit
from ranking.ranker import Ranker
from serving.embedding_table import EmbeddingTable
from serving.inputs import InputSpec
from serving.online_ranker import IdMaps, OnlineRanker
from serving.raw_requests import tensors_of
from serving.scripted import scripted

NO_INPUTS = InputSpec(request=(), candidate=())
SHAPES = {
    "two-tower": {},
    "dcn": {"embedding_tower": False},
    "no history": {"purchase_history": False},
    "history counts": {"history_counts": True},
    "fine-tuned": {"tables": "fine-tuned"},
    "full rank": {"cross_rank": 0},
}
BATCHES = {
    "one": ([3], [4]),
    "several": ([2, 0, 5, 1], [3, 0, 0, 6]),
    "no candidate": ([0], [2]),
    "no history": ([4], [0]),
    "nothing": ([0, 0], [0, 0]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_the_trained_rankers(shape):
    ranker = tiny_ranker(**SHAPES[shape])
    online = OnlineRanker(ranker, "float32")
    module = scripted(online, tiny_batch([2, 3], [1, 2]), NO_INPUTS)
    for lengths, history_lengths in BATCHES.values():
        batch = tiny_batch(lengths, history_lengths, seed=3)
        expected = ranker.score(batch)
        with torch.inference_mode():
            torch.testing.assert_close(online(*tensors_of(batch)), expected, atol=2e-5, rtol=0)
            torch.testing.assert_close(
                module.score(*tensors_of(batch)), expected, atol=2e-5, rtol=0
            )


@pytest.mark.parametrize(("sparse", "dense", "bins"), [(2, 0, 4), (0, 2, 4), (2, 2, 0), (0, 1, 0)])
def test_features_of_one_kind(sparse, dense, bins):
    """No sparse features, no dense ones, no bins."""
    random = np.random.default_rng(0)
    part = random.integers(0, 6, (2, 300)), random.normal(size=(2, 300)).astype(np.float32)
    names = ["a", "b"][:sparse], ["x", "y"][:dense]
    levels = [
        fit(*names, [(part[0][:sparse], part[1][:dense])], min_count=5, bins=bins) for _ in range(2)
    ]
    ranker = Ranker(model_config(), *levels, pretrained_tables())
    batch = tiny_batch([2, 0, 3], [1, 0, 2])
    few = {
        f"{level}_{kind}": getattr(batch, f"{level}_{kind}")[:number]
        for level in ("request", "candidate")
        for kind, number in (("sparse", sparse), ("dense", dense))
    }
    batch = type(batch)(**{n: getattr(batch, n) for n in type(batch).__dataclass_fields__} | few)
    with torch.inference_mode():
        found = OnlineRanker(ranker, "float32")(*tensors_of(batch))
    torch.testing.assert_close(found, ranker.score(batch), atol=2e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "most"), [("float16", 1e-3), ("int8", 0.02), ("int4", 0.3)])
def test_quantised_tables_are_near(dtype, most):
    ranker = tiny_ranker()
    batch = tiny_batch([20, 30], [10, 20])
    with torch.inference_mode():
        found = OnlineRanker(ranker, dtype)(*tensors_of(batch))
    difference = (found - ranker.score(batch)).abs().max()
    assert 0 < difference < most


def test_training_is_left_alone():
    """The dense layers are shared, so that an export must not change what trains."""
    ranker = tiny_ranker()
    before = [p.requires_grad for p in ranker.dense_parameters()]
    OnlineRanker(ranker, "int8")
    assert [p.requires_grad for p in ranker.dense_parameters()] == before


@given(
    st.lists(
        st.lists(st.integers(-(1 << 63), (1 << 63) - 1), unique=True, max_size=40),
        min_size=1,
        max_size=4,
    ),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_id_maps_are_their_maps_one_by_one(vocabularies, data):
    maps = [IdMap(np.array(ids, np.int64)) for ids in vocabularies]
    anything = st.integers(-(1 << 63), (1 << 63) - 1)
    known = [i for ids in vocabularies for i in ids]
    asked = st.one_of(anything, st.sampled_from(known)) if known else anything
    rows = [data.draw(st.lists(asked, min_size=5, max_size=5)) for _ in maps]
    ids = torch.tensor(rows, dtype=torch.int64)
    firsts = np.cumsum([0, *[len(m) + 1 for m in maps]])
    expected = torch.stack([m(ids[i]) + int(firsts[i]) for i, m in enumerate(maps)])
    assert torch.equal(IdMaps(maps)(ids).long(), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int4"])
def test_table_pools_means(dtype):
    """Rows of 0 and 1 are exact in every type but for the rounding of the scale."""
    weight = torch.zeros(5, 8)
    weight[1:] = torch.eye(8)[:4]
    table = EmbeddingTable(weight, dtype)
    assert table.number_of_rows() == 5
    rows = torch.tensor([1, 2, 0, 3, 4, 4, 4], dtype=torch.int32)
    offsets = torch.tensor([0, 2, 3, 3, 7], dtype=torch.int32)
    expected = torch.zeros(4, 8)
    expected[0, :2] = 0.5
    expected[3, 2], expected[3, 3] = 0.25, 0.75
    torch.testing.assert_close(table(rows, offsets), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(table.each(rows), weight[rows.long()], atol=1e-3, rtol=0)
    assert table.each(rows[:0]).shape == (0, 8)


@pytest.mark.parametrize(
    ("dtype", "row_bytes"), [("float32", 1024), ("float16", 512), ("int8", 260), ("int4", 132)]
)
def test_bytes_of_a_row(dtype, row_bytes):
    assert EmbeddingTable(torch.randn(10, 256), dtype).weight.nbytes == 10 * row_bytes


def test_int4_needs_an_even_dimension():
    with pytest.raises(ValueError, match="even, got 7"):
        EmbeddingTable(torch.randn(3, 7), "int4")
