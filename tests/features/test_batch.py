"""Request records as tensors, their order, and their reading ahead."""

import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from features.batch import (
    RecordFiles,
    RequestBatch,
    dense_values,
    prefetch,
    request_order,
    sparse_ids,
)
from features.errors import BadInputError
from features.id_map import MISSING_ID, hash_strings
from features.schema import DatasetSchema, Feature

NAN = float("nan")
SCHEMA = DatasetSchema(
    name="by-hand",
    features=(
        Feature(name="store", kind="sparse", level="request"),
        Feature(name="query_type", kind="sparse", level="request"),
        Feature(name="baskets", kind="dense", level="request"),
        Feature(name="brand", kind="sparse", level="candidate"),
        Feature(name="price", kind="dense", level="candidate"),
        Feature(name="stock", kind="dense", level="candidate"),
    ),
)
RECORDS = pa.table(
    {
        "request_id": pa.array([1, 2, 3]),
        "query": pa.array(["soup", None, "soup"]),
        "purchase_history": pa.array([[31, 17, 31], [], [5]], pa.list_(pa.int64())),
        "purchase_age_days": pa.array([[0, 3, 40], [], [84]], pa.list_(pa.int16())),
        "store": pa.array([4, None, -2]),
        "query_type": pa.array(["tin", "", None]),
        "baskets": pa.array([1.5, None, 3.0]),
        "product_id": pa.array([[17, 20], [], [31]], pa.list_(pa.int64())),
        "clicked": pa.array([[True, False], [], [True]], pa.list_(pa.bool_())),
        "brand": pa.array([["Elm", None], [], ["Øl"]], pa.list_(pa.string())),
        "price": pa.array([[2.5, None], [], [0.0]], pa.list_(pa.float64())),
        "stock": pa.array([[3, 4], [], [None]], pa.list_(pa.int64())),
    }
)


def hashed(*texts):
    return hash_strings(pa.array(texts, pa.string())).tolist()


def with_histories(histories, ages):
    others = RECORDS.drop_columns(["purchase_history", "purchase_age_days"])
    histories = others.append_column("purchase_history", histories)
    return histories.append_column("purchase_age_days", ages)


def check_records(batch):
    assert batch.lengths.tolist() == [2, 0, 1]
    assert batch.query.tolist() == hashed("soup", None, "soup")
    assert batch.history.tolist() == [31, 17, 31, 5]
    assert batch.history_age.tolist() == [0, 3, 40, 84]
    assert batch.history_age.dtype == torch.int16
    assert batch.history_lengths.tolist() == [3, 0, 1]
    assert batch.request_sparse.tolist() == [[4, MISSING_ID, -2], hashed("tin", "", None)]
    assert batch.product.tolist() == [17, 20, 31]
    assert batch.candidate_sparse.tolist() == [hashed("Elm", None, "Øl")]
    assert batch.clicked.tolist() == [1, 0, 1]
    equal = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(batch.request_dense, torch.tensor([[1.5, NAN, 3]]), **equal)
    torch.testing.assert_close(
        batch.candidate_dense, torch.tensor([[2.5, NAN, 0], [3, 4, NAN]]), **equal
    )
    for name in ("lengths", "query", "history", "history_lengths", "request_sparse", "product"):
        assert getattr(batch, name).dtype == torch.int64, name


def test_records_by_hand():
    check_records(RequestBatch.from_records(RECORDS, SCHEMA))


def test_records_in_pieces_slices_and_another_order():
    check_records(RequestBatch.from_records(pa.concat_tables([RECORDS[:1], RECORDS[1:]]), SCHEMA))
    padded = pa.concat_tables([RECORDS[2:], RECORDS, RECORDS[:1]])
    check_records(RequestBatch.from_records(padded[1:4], SCHEMA))
    turned = RequestBatch.from_records(RECORDS.take(pa.array([2, 1, 0])), SCHEMA)
    assert turned.lengths.tolist() == [1, 0, 2]
    assert turned.product.tolist() == [31, 17, 20]
    assert turned.history.tolist() == [5, 31, 17, 31]
    assert turned.history_age.tolist() == [84, 0, 3, 40]


def test_records_without_clicks_are_for_scoring():
    batch = RequestBatch.from_records(RECORDS.drop_columns(["clicked"]), SCHEMA)
    assert batch.clicked.shape == (0,)
    assert batch.product.tolist() == [17, 20, 31]


def test_no_records_at_all():
    batch = RequestBatch.from_records(RECORDS[:0], SCHEMA)
    assert batch.lengths.shape == (0,)
    assert batch.request_sparse.shape == (2, 0)
    assert batch.candidate_dense.shape == (2, 0)


def test_a_history_that_is_null_is_empty():
    histories = pa.array([[31], None, [5]], pa.list_(pa.int64()))
    ages = pa.array([[7], None, [9]], pa.list_(pa.int16()))
    batch = RequestBatch.from_records(with_histories(histories, ages), SCHEMA)
    assert batch.history_lengths.tolist() == [1, 0, 1]
    assert batch.history_lengths.dtype == torch.int64
    assert batch.history.tolist() == [31, 5]
    assert batch.history_age.tolist() == [7, 9]


def test_ages_must_be_as_many_as_the_purchases():
    histories = pa.array([[31], [17, 31], []], pa.list_(pa.int64()))
    ages = pa.array([[7], [9], [1]], pa.list_(pa.int16()))
    with pytest.raises(BadInputError) as caught:
        RequestBatch.from_records(with_histories(histories, ages), SCHEMA)
    assert str(caught.value) == (
        "request records: row 2 has 1 values in column 'purchase_age_days' and 2 in "
        "'purchase_history'"
    )


def test_schema_without_features():
    batch = RequestBatch.from_records(RECORDS, DatasetSchema(name="bare"))
    assert batch.request_sparse.shape == (0, 3)
    assert batch.candidate_dense.shape == (0, 3)


def test_a_batch_may_be_changed_without_changing_its_records():
    batch = RequestBatch.from_records(RECORDS, SCHEMA)
    batch.product.fill_(0)
    batch.lengths.fill_(0)
    batch.candidate_dense.fill_(0)
    check_records(RequestBatch.from_records(RECORDS, SCHEMA))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_strings_hash_alike_in_every_encoding(kind):
    texts = ["tea", None, "mjölk", "tea", ""]
    expected = hashed(*texts)
    assert sparse_ids(pa.array(texts, kind)).tolist() == expected
    assert sparse_ids(pa.array(texts, kind).dictionary_encode()).tolist() == expected
    assert sparse_ids(pa.array(texts, kind).dictionary_encode("encode")).tolist() == expected
    assert sparse_ids(pa.chunked_array([texts[:2], texts[2:]], kind)).tolist() == expected


def test_small_integers_and_truth_values():
    assert sparse_ids(pa.array([1, None, -3], pa.int8())).tolist() == [1, MISSING_ID, -3]
    np.testing.assert_array_equal(
        dense_values(pa.array([True, None, False])), np.array([1, NAN, 0], np.float32)
    )


# Order of reading.


@pytest.fixture(scope="module")
def record_files(tmp_path_factory):
    """Two files of 5 and 4 row groups; group ``g`` holds the requests 10 g … 10 g + 9."""
    folder = tmp_path_factory.mktemp("records")
    for name, first, last in (("a", 0, 50), ("b", 50, 88)):
        table = pa.table({"request_id": pa.array(range(first, last))})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=10)
    return RecordFiles.open([folder / "a.parquet", folder / "b.parquet"])


def read(files, **options):
    return [table["request_id"].to_pylist() for table in files.chunks(2, **options)]


def test_without_a_seed_the_order_is_that_of_the_files(record_files):
    chunks = read(record_files)
    assert [request for chunk in chunks for request in chunk] == list(range(88))
    assert [len(chunk) for chunk in chunks] == [20, 20, 20, 20, 8]


@pytest.mark.parametrize("groups", [1, 2, 4, 9, 32])
def test_every_request_comes_once_an_epoch(record_files, groups):
    chunks = list(record_files.chunks(groups, seed=3, epoch=1))
    assert len(chunks) == -(-9 // groups)
    requests = pa.concat_tables(chunks)["request_id"].to_pylist()
    assert sorted(requests) == list(range(88))


def test_seed_and_epoch_fix_the_order(record_files):
    assert read(record_files, seed=5, epoch=2) == read(record_files, seed=5, epoch=2)
    orders = [read(record_files, seed=seed, epoch=epoch) for seed in (5, 6) for epoch in (0, 1)]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))


def test_other_groups_come_together_in_another_epoch(record_files):
    chunks = [[set(chunk) for chunk in read(record_files, seed=5, epoch=epoch)] for epoch in (0, 1)]
    assert chunks[0] != chunks[1]


def test_the_order_of_requests_depends_on_seed_epoch_and_chunk():
    first = request_order(50, seed=1, epoch=0, chunk=0)
    assert sorted(first) == list(range(50))
    assert (first == request_order(50, seed=1, epoch=0, chunk=0)).all()
    for other in ((2, 0, 0), (1, 1, 0), (1, 0, 1)):
        seed, epoch, chunk = other
        assert (first != request_order(50, seed=seed, epoch=epoch, chunk=chunk)).any()


def test_without_a_history_column_histories_are_empty():
    batch = RequestBatch.from_records(RECORDS.drop_columns(["purchase_history"]), SCHEMA)
    assert batch.history_lengths.tolist() == [0] * len(RECORDS)
    assert batch.history.tolist() == []
    assert batch.history_age.tolist() == []
    assert batch.history_age.dtype == torch.int16


def test_without_ages_every_age_is_0():
    batch = RequestBatch.from_records(RECORDS.drop_columns(["purchase_age_days"]), SCHEMA)
    assert batch.history.tolist() == [31, 17, 31, 5]
    assert batch.history_age.tolist() == [0, 0, 0, 0]
    assert batch.history_age.dtype == torch.int16


def test_ages_are_left_out_with_their_histories(tmp_path):
    pq.write_table(RECORDS, tmp_path / "week.parquet")
    (table,) = RecordFiles.open([tmp_path / "week.parquet"]).chunks(
        1, leave_out=["purchase_history", "store"]
    )
    left = {"purchase_history", "purchase_age_days", "store"}
    assert table.column_names == [name for name in RECORDS.column_names if name not in left]


def test_text_is_read_as_dictionaries_and_gives_the_same_batch(tmp_path):
    path = tmp_path / "week.parquet"
    pq.write_table(RECORDS, path)
    (table,) = RecordFiles.open([path]).chunks(9)
    assert pa.types.is_dictionary(table["query"].type)
    check_records(RequestBatch.from_records(table, SCHEMA))


def test_columns_can_be_left_out(record_files):
    table = next(iter(record_files.chunks(1, leave_out=["request_id"])))
    assert table.column_names == []


@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize("skip", [0, 1, 3, 5, 9])
def test_skipping_is_dropping_the_first_chunks(record_files, seed, skip):
    whole = read(record_files, seed=seed, epoch=1)
    assert read(record_files, seed=seed, epoch=1, skip=skip) == whole[skip:]


# Reading ahead.


def workers():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetch_keeps_the_order():
    def work(item):
        time.sleep(0.01 if item % 3 == 0 else 0)
        return item * item

    for depth in (1, 4):
        assert list(prefetch(range(20), work, depth)) == [item * item for item in range(20)]
    assert list(prefetch([], work)) == []
    assert not workers()


def test_prefetch_works_ahead_but_not_far():
    done = []
    results = prefetch(range(100), lambda item: done.append(item) or item, depth=2)
    assert next(results) == 0
    deadline = time.monotonic() + 10
    while len(done) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert 3 <= len(done) <= 4  # one taken, two in the queue, one that waits for room
    results.close()


@pytest.mark.parametrize("error", [ValueError("row 7 is broken"), MemoryError("full")])
def test_prefetch_raises_the_exception_of_the_work(error):
    def work(item):
        if item == 2:
            raise error
        return item

    results = prefetch(range(5), work)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(type(error), match=str(error)):
        next(results)
    assert not workers()


def test_prefetch_raises_the_exception_of_the_items():
    def items():
        yield 1
        raise OSError("the file is gone")

    results = prefetch(items(), lambda item: item)
    assert next(results) == 1
    with pytest.raises(OSError, match="the file is gone"):
        next(results)
    assert not workers()


def test_prefetch_ends_its_thread_when_the_consumer_stops():
    def endless():
        number = 0
        while True:
            yield number
            number += 1

    results = prefetch(endless(), lambda item: item)
    assert next(results) == 0
    assert len(workers()) == 1
    results.close()
    assert not workers()

    def consume():
        for item in prefetch(endless(), lambda item: item):
            if item == 3:
                raise RuntimeError("the consumer failed")

    with pytest.raises(RuntimeError, match="the consumer failed"):
        consume()
    assert not workers()


def test_prefetch_leaves_the_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        inside = list(prefetch(range(2), lambda _: torch.get_num_threads()))
        assert inside == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
