import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from embeddings import tables
from embeddings.tables import EmbeddingTable, open_table, read_table, write_table
from features.errors import BadInputError

EMBEDDING = np.array([[0.6, 0.8], [1.0, 0.0], [0.0, -1.0]], np.float16)


def product_table(**changes):
    content = {
        "ids": pa.array([7, 2**60 + 1, -3], pa.int64()),
        "embedding": EMBEDDING,
        "fingerprint": "text-abc",
        "normalized": True,
    }
    return EmbeddingTable(**content | changes)


def write_raw(path, *, ids=None, embedding=None, metadata=None, without=None):
    """Write a table past all checks."""
    ids = pa.array([7, 8, 9], pa.int64()) if ids is None else ids
    if embedding is None:
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(EMBEDDING.reshape(-1)), 2)
    entries = {
        tables.FINGERPRINT: "text-abc",
        tables.DIMENSION: "2",
        tables.NORMALIZED: "true",
        tables.ROWS: "3",
    } | (metadata or {})
    entries.pop(without, None)
    content = pa.table({"id": ids, "embedding": embedding}).replace_schema_metadata(entries)
    pq.write_table(content, path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_products_come_back_as_they_were(tmp_path, dtype):
    written = product_table(embedding=EMBEDDING.astype(dtype))
    write_table(tmp_path / "product.parquet", written)
    read = read_table(tmp_path / "product.parquet")
    assert read.ids.equals(written.ids)
    assert read.embedding.dtype == dtype
    np.testing.assert_array_equal(read.embedding, written.embedding)
    assert (read.fingerprint, read.normalized, read.dim, len(read)) == ("text-abc", True, 2, 3)


def test_queries_come_back_as_they_were(tmp_path):
    ids = pa.array(["crème fraîche", " two  spaces ", ""], pa.string())
    write_table(tmp_path / "query.parquet", product_table(ids=ids, normalized=False))
    read = read_table(tmp_path / "query.parquet")
    assert read.ids.to_pylist() == ["crème fraîche", " two  spaces ", ""]
    assert read.normalized is False


def test_the_file_is_what_the_contract_says(tmp_path):
    write_table(tmp_path / "product.parquet", product_table())
    schema = pq.read_schema(tmp_path / "product.parquet")
    assert schema.field("id").type == pa.int64()
    assert schema.field("embedding").type == pa.list_(pa.float16(), 2)
    assert schema.metadata == {
        b"dashclip.encoder_fingerprint": b"text-abc",
        b"dashclip.dimension": b"2",
        b"dashclip.normalized": b"true",
        b"dashclip.rows": b"3",
    }


def test_a_table_without_rows(tmp_path):
    empty = product_table(ids=pa.array([], pa.int64()), embedding=np.empty((0, 4), np.float32))
    write_table(tmp_path / "t.parquet", empty)
    assert read_table(tmp_path / "t.parquet").embedding.shape == (0, 4)


def test_a_table_of_several_row_groups(tmp_path):
    rows = 2 * 16_384 + 5
    embedding = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    table = product_table(ids=pa.array(np.arange(rows)), embedding=embedding)
    write_table(tmp_path / "t.parquet", table)
    assert pq.ParquetFile(tmp_path / "t.parquet").num_row_groups == 3
    np.testing.assert_array_equal(read_table(tmp_path / "t.parquet").embedding, embedding)


@given(
    embedding=hnp.arrays(
        st.sampled_from([np.float16, np.float32]),
        st.tuples(st.integers(0, 5), st.integers(1, 4)),
        elements=st.floats(-8, 8, width=16),
    ),
    ids=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=5, max_size=5, unique=True),
)
def test_any_table_comes_back_as_it_was(tmp_path_factory, embedding, ids):
    path = tmp_path_factory.mktemp("table") / "t.parquet"
    ids = pa.array(ids[: len(embedding)], pa.int64())
    write_table(path, product_table(ids=ids, embedding=embedding))
    read = read_table(path)
    assert read.ids.equals(ids)
    np.testing.assert_array_equal(read.embedding, embedding)
    assert read.embedding.dtype == embedding.dtype


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ids": pa.array([1, 2, 3], pa.int32())}, "ids must be int64 or string, got int32"),
        ({"embedding": EMBEDDING.astype(np.float64)}, "got float64"),
        ({"embedding": EMBEDDING[:2]}, r"must be \[3, D\], as there are 3 ids, got \[2, 2\]"),
        ({"embedding": EMBEDDING.reshape(-1)}, r"got \[6\]"),
    ],
)
def test_a_table_of_wrong_types_cannot_be_made(changes, said):
    with pytest.raises(ValueError, match=said):
        product_table(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ids": pa.array([1, None, 3], pa.int64())}, "column 'id', row 2: is null"),
        ({"ids": pa.array([1, 3, 3], pa.int64())}, "3 stands in 2 rows"),
        ({"embedding": np.where(EMBEDDING == 0, np.nan, EMBEDDING)}, "row 2"),
    ],
)
def test_a_broken_table_is_not_written(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        write_table(tmp_path / "t.parquet", product_table(**changes))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    write_table(path, product_table())

    def interrupted(content, where, **options):
        where.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(tables.pq, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_table(path, product_table(fingerprint="text-new"))
    assert list(tmp_path.iterdir()) == [path]
    assert read_table(path).fingerprint == "text-abc"


def test_a_missing_file(tmp_path):
    with pytest.raises(BadInputError, match=r"t\.parquet: no such embedding table"):
        read_table(tmp_path / "t.parquet")


def test_a_file_that_is_not_parquet(tmp_path):
    (tmp_path / "t.parquet").write_text("id,embedding\n")
    with pytest.raises(BadInputError, match=r"t\.parquet: not a readable Parquet file"):
        read_table(tmp_path / "t.parquet")


def test_a_truncated_file(tmp_path):
    path = tmp_path / "t.parquet"
    write_table(path, product_table())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInputError, match="not a readable Parquet file"):
        read_table(path)


@pytest.mark.parametrize(
    "key", [tables.FINGERPRINT, tables.DIMENSION, tables.NORMALIZED, tables.ROWS]
)
def test_missing_metadata(tmp_path, key):
    write_raw(tmp_path / "t.parquet", without=key)
    with pytest.raises(BadInputError, match=f"the file's metadata lacks '{key}'"):
        read_table(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({tables.ROWS: "4"}, "'dashclip.rows' says '4' and the file holds 3"),
        ({tables.DIMENSION: "384"}, "'dashclip.dimension' says '384' and the file holds 2"),
        ({tables.NORMALIZED: "yes"}, "must be 'true' or 'false', got 'yes'"),
    ],
)
def test_metadata_that_disagrees(tmp_path, metadata, said):
    write_raw(tmp_path / "t.parquet", metadata=metadata)
    with pytest.raises(BadInputError, match=said):
        read_table(tmp_path / "t.parquet")


def test_a_missing_column(tmp_path):
    pq.write_table(pa.table({"id": [1], "vector": [0.5]}), tmp_path / "t.parquet")
    with pytest.raises(BadInputError, match="column 'embedding' is missing; found id, vector"):
        read_table(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"ids": pa.array([1, 2, 3], pa.int32())}, "column 'id' is int32"),
        ({"ids": pa.array([1.0, 2.0, 3.0])}, "column 'id' is double"),
        (
            {"embedding": pa.array([[1.0], [2.0], [3.0]], pa.list_(pa.float32()))},
            "column 'embedding' is list<element: float>, expected a fixed-size list",
        ),
        (
            {"embedding": pa.array([[1, 2]] * 3, pa.list_(pa.float64(), 2))},
            "expected a fixed-size list of float16 or float32",
        ),
        (
            {"embedding": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.float32(), 2))},
            "column 'embedding', row 2: is null",
        ),
        (
            {"embedding": pa.array([[1, 2], [0, None], [3, 4]], pa.list_(pa.float32(), 2))},
            r"row 2 \(id 8\): holds a value that is not finite",
        ),
        (
            {"embedding": pa.array([[1, 2], [3, 4], [5, np.inf]], pa.list_(pa.float32(), 2))},
            r"row 3 \(id 9\): holds a value that is not finite",
        ),
        ({"ids": pa.array([7, None, 9], pa.int64())}, "column 'id', row 2: is null"),
        ({"ids": pa.array(["a", "b", "a"])}, "'a' stands in 2 rows, expected one"),
    ],
)
def test_broken_columns(tmp_path, content, said):
    write_raw(tmp_path / "t.parquet", **content)
    with pytest.raises(BadInputError, match=said):
        read_table(tmp_path / "t.parquet")


# A file of several row groups, or of one, and parts of it, each read some rows at a time.


def write_groups(path, rows, groups):
    embedding = np.arange(rows * 2, dtype=np.float16).reshape(rows, 2)
    write_table(path, product_table(ids=pa.array(np.arange(rows), pa.int64()), embedding=embedding))
    pq.write_table(pq.read_table(path), path, row_group_size=groups)
    return embedding


@given(rows=st.integers(1, 30), group=st.integers(1, 12), ends=st.tuples(*[st.integers(0, 30)] * 2))
def test_any_range_is_read_by_blocks(tmp_path_factory, rows, group, ends):
    path = tmp_path_factory.mktemp("table") / "t.parquet"
    embedding = write_groups(path, rows, group)
    first, last = sorted(min(end, rows) for end in ends)
    found = np.full((rows, 2), -1, np.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_AT_ONCE", 5)
        stored = open_table(path).embedding
        for begin, values in stored.blocks(first, last):
            assert len(values) <= 5
            found[begin : begin + len(values)] = values
    np.testing.assert_array_equal(found[first:last], embedding[first:last])
    assert (found[:first] == -1).all()
    assert (found[last:] == -1).all()
    assert (stored.shape, stored.dtype, len(stored)) == ((rows, 2), np.float16, rows)


@pytest.mark.parametrize("group", [16_384, 80_000])
def test_a_part_is_read_without_the_rest_in_memory(tmp_path, group):
    """41 MB of embeddings, in row groups of 8 MB or in one of all."""
    path = tmp_path / "t.parquet"
    ids = pa.array(np.arange(80_000), pa.int64())
    write_table(path, product_table(ids=ids, embedding=np.zeros((80_000, 256), np.float16)))
    pq.write_table(
        pq.read_table(path), path, row_group_size=group, compression="none", use_dictionary=False
    )
    stored = open_table(path).embedding
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in stored.blocks(20_000, 70_000)]
    assert len(held) >= 50_000 // 4096
    assert max(held) < 20e6


def test_an_open_table_is_read_as_it_was(tmp_path):
    path = tmp_path / "t.parquet"
    write_table(path, product_table())
    stored = open_table(path).embedding
    write_table(path, product_table(embedding=EMBEDDING * 2))
    ((_, values),) = stored.blocks(1, 3)
    np.testing.assert_array_equal(values, EMBEDDING[1:])


def test_a_broken_value_is_found_where_it_is_read(tmp_path):
    path = tmp_path / "t.parquet"
    broken = pa.array([[1, 2], [3, 4], [5, np.inf]], pa.list_(pa.float32(), 2))
    write_raw(path, embedding=broken)
    stored = open_table(path).embedding
    assert [len(values) for _, values in stored.blocks(0, 2)] == [2]
    with pytest.raises(BadInputError, match=r"row 3 \(id 9\): holds a value that is not finite"):
        list(stored.blocks(2, 3))
