"""Raw requests made batches: the same as request records, and one sentence for what is wrong."""

import copy
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from features.batch import RequestBatch
from features.errors import BadInputError
from features.id_map import MISSING_ID, hash_strings, hash_text
from features.schema import DatasetSchema
from serving.golden import raw_request
from serving.inputs import Input, InputSpec
from serving.raw_requests import to_batch

INPUTS = InputSpec(
    request=(
        Input(name="kind", kind="sparse", type="string"),
        Input(name="spend", kind="dense", type="float32"),
        Input(name="store", kind="sparse", type="int64"),
    ),
    candidate=(
        Input(name="brand", kind="sparse", type="string"),
        Input(name="price", kind="dense", type="float32"),
    ),
)
GOOD = {
    "query": "milk",
    "history": [31, 17],
    "history_age_days": [0, 12],
    "features": {"kind": "dairy", "store": 4, "spend": 1.5},
    "candidates": {
        "product_id": [17, 20],
        "features": {"brand": ["National", None], "price": [1, None]},
    },
}


def test_every_field_by_hand():
    batch = to_batch([GOOD], INPUTS)
    milk, dairy, national = hash_strings(pa.array(["milk", "dairy", "National"])).tolist()
    assert batch.lengths.tolist() == [2]
    assert batch.query.tolist() == [milk]
    assert batch.history.tolist() == [31, 17]
    assert batch.history_age.tolist() == [0, 12]
    assert batch.history_age.dtype == torch.int16
    assert batch.history_lengths.tolist() == [2]
    assert batch.request_sparse.tolist() == [[dairy], [4]]
    assert batch.request_dense.tolist() == [[1.5]]
    assert batch.product.tolist() == [17, 20]
    assert batch.candidate_sparse.tolist() == [[national, MISSING_ID]]
    assert batch.candidate_dense[0, 0] == 1
    assert batch.candidate_dense[0, 1].isnan()


def test_several_requests_end_to_end():
    bare = {"query": "tea", "candidates": {"product_id": [5]}}
    none = {"query": "", "candidates": {"product_id": []}}
    batch = to_batch([GOOD, none, bare], INPUTS)
    assert batch.lengths.tolist() == [2, 0, 1]
    assert batch.product.tolist() == [17, 20, 5]
    assert batch.history_lengths.tolist() == [2, 0, 0]
    assert batch.request_sparse[:, 2].tolist() == [MISSING_ID, MISSING_ID]
    assert batch.candidate_dense.shape == (1, 3)
    assert batch.candidate_dense[0, 2].isnan()


def test_real_records_there_and_back(tiny_dataset, tiny_requests):
    """A record sent as a raw request is the batch that training reads."""
    schema = DatasetSchema.load(tiny_dataset)
    records = pq.read_table(sorted(tiny_requests.glob("week-*.parquet"))[0]).slice(0, 20)
    inputs = InputSpec.of(schema, records.schema)
    raw = [raw_request(record, inputs) for record in records.to_pylist()]
    found, expected = to_batch(raw, inputs), RequestBatch.from_records(records, schema)
    for name in RequestBatch.__dataclass_fields__:
        if name not in ("clicked", "weight"):
            one, other = getattr(found, name), getattr(expected, name)
            assert one.dtype == other.dtype, name
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=name)


def changed(path, value):
    raw = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    place = raw
    for parent in parents:
        place = place[parent]
    place[last] = value
    return raw


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("query", None, "query: must be a text, got None"),
        ("query", 5, "query: must be a text, got 5"),
        ("query", "\ud800", "query: a text cannot be encoded"),
        ("history", "x", "history: must be a list, got 'x'"),
        ("history", [1, None], "history: place 2 is null"),
        ("history", [1, 2.5], "history: place 2 must be a whole number of 64 bits, got 2.5"),
        ("history", [1, True], "history: place 2 must be a whole number"),
        ("history_age_days", [1], "history_age_days: has 1 values, 'history' 2"),
        ("history_age_days", [1, -1], "history_age_days: must be 0 to 32767, got -1"),
        ("history_age_days", [1, 40000], "history_age_days: must be 0 to 32767, got 40000"),
        ("features", [], r"features: must be an object, got \[\]"),
        ("features.size", 1, "features: no feature 'size'; known: kind, spend, store"),
        ("features.kind", 1, r"features\.kind: must be a text, got 1"),
        ("features.store", "4", r"features\.store: must be a whole number"),
        ("features.store", 1 << 63, r"features\.store: must be a whole number"),
        ("features.store", 10**400, "got a huge number"),
        ("features.spend", "1", r"features\.spend: must be a finite number"),
        ("features.spend", math.inf, r"features\.spend: must be a finite number"),
        ("features.spend", math.nan, r"features\.spend: must be a finite number"),
        ("features.spend", 1e39, r"features\.spend: must be a finite number"),
        ("features.spend", 10**400, r"features\.spend: must be a finite number"),
        ("candidates", None, None),
        ("candidates", 3, "candidates: must be an object, got 3"),
        ("candidates.product_id", [1, 1 << 64], r"candidates\.product_id: place 2 must be"),
        ("candidates.features.price", [1], r"price: has 1 values for 2 candidates"),
        ("candidates.features.price", 1, r"price: must be a list, got 1"),
        ("candidates.features.price", [1, False], r"price: place 2 must be a finite number"),
        ("candidates.features.brand", ["a", ["b"]], r"brand: place 2 must be a text, got \['b'\]"),
        ("candidates.features.brand", ["a", "\udfff"], r"brand: a text cannot be encoded"),
    ],
)
def test_what_is_wrong_is_named(path, value, message):
    raw = changed(path, value)
    if message is None:  # no candidates at all are fine
        assert to_batch([raw], INPUTS).lengths.tolist() == [0]
        return
    with pytest.raises(BadInputError, match=message):
        to_batch([raw], INPUTS)


def test_the_place_of_a_wrong_request_is_named():
    with pytest.raises(BadInputError, match="request 2: query"):
        to_batch([GOOD, changed("query", 1)], INPUTS)


@given(st.text())
def test_one_text_hashes_as_many_do(text):
    try:
        expected = hash_strings(pa.array([text], pa.string()))[0]
    except UnicodeEncodeError:
        with pytest.raises(UnicodeEncodeError):
            hash_text(text)
        return
    assert hash_text(text) == expected


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=10,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "query": st.text(max_size=5) | values,
            "history": values,
            "history_age_days": values,
            "features": st.dictionaries(st.sampled_from(["kind", "store", "spend"]), values),
            "candidates": st.fixed_dictionaries(
                {"product_id": st.lists(st.integers(), max_size=3) | values},
                optional={"features": st.dictionaries(st.sampled_from(["brand", "price"]), values)},
            ),
        },
    )
)
def test_anything_gives_a_batch_or_one_sentence(raw):
    try:
        batch = to_batch([raw], INPUTS)
    except BadInputError as error:
        sentence = str(error)
    else:
        sentence = ""
    assert "\n" not in sentence
    assert len(sentence) < 400
    if sentence:
        return
    assert np.isfinite(batch.request_dense.nan_to_num(0.0).numpy()).all()
    assert batch.candidate_sparse.shape == (1, int(batch.lengths[0]))
