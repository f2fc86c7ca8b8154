import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.label_throughput import _distinct_pairs
from features.errors import BadInputError


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.data())
def test_pairs_are_distinct(queries, products, data):
    size = data.draw(st.integers(1, queries * products))
    ids = 10 + 3 * np.arange(products)
    table = _distinct_pairs([f"query {i}" for i in range(queries)], ids, (1, size))
    pairs = set(zip(*table.to_pydict().values(), strict=True))
    assert len(pairs) == table.num_rows == size
    assert {product for _, product in pairs} <= set(ids.tolist())


def test_too_few_queries_and_titles_are_named():
    with pytest.raises(BadInputError, match="2 queries and 3 titles make fewer than 7 pairs"):
        _distinct_pairs(["a", "b"], np.arange(3), (1, 7))
