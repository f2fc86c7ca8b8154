from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.catalog import read_catalog
from embeddings.labeling import pair_files
from embeddings.labeling.pair_files import (
    Titles,
    open_selection,
    select_given,
    select_unlabelled,
)
from features.errors import BadInputError

TITLES = {7: "Alder apple juice", 3: "  Birch soap ", 9: None, 5: " "}


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    catalog = {"product_id": list(TITLES), "title": list(TITLES.values())}
    pq.write_table(pa.table(catalog), folder / "catalog.parquet")
    return folder


def write_pairs(path, rows, **options):
    queries, products = zip(*rows, strict=True) if rows else ((), ())
    table = {"query": pa.array(queries, pa.string()), "product_id": pa.array(products, pa.int64())}
    pq.write_table(pa.table(table), path, **options)
    return path


def rows_of(selection, limit=None):
    chunks = enumerate(selection.chunks(limit))
    return [tuple(r.values()) for i, n in chunks for r in selection.read(i, n).to_pylist()]


def test_pairs_are_taken_once_and_in_their_order(tmp_path, data):
    rows = [("soap", 3), ("soap", 7), (None, 3), ("juice", 7), ("soap", 3), (" \t ", 7)]
    rows += [("juice", 9), ("juice", 5), ("juice", 1), ("juice", None), ("soap", 3), ("Soap", 3)]
    write_pairs(tmp_path / "pairs.parquet", rows)
    output = tmp_path / "out"
    selection = select_given(tmp_path / "pairs.parquet", read_catalog(data), output)
    assert rows_of(selection) == [("soap", 3), ("soap", 7), ("juice", 7), ("Soap", 3)]
    assert selection.pairs == 4
    assert selection.left_out == {
        "blank query": 2,
        "product unknown": 2,
        "product without a title": 2,
        "repeated": 2,
    }
    assert open_selection(output) == selection
    assert [path.name for path in output.iterdir()] == ["_pairs.parquet"]
    assert open_selection(tmp_path / "elsewhere") is None


def test_titles_are_those_of_the_catalog(data):
    assert Titles(read_catalog(data)).of(np.array([3, 7, 3])) == [
        *("Birch soap", "Alder apple juice", "Birch soap"),
    ]


def test_a_folder_is_read_in_the_order_of_its_files(tmp_path, data):
    folder = tmp_path / "pairs"
    folder.mkdir()
    rows = [(f"query {number}", 3 + 4 * (number % 2)) for number in range(9000)]
    write_pairs(folder / "a.parquet", rows[:4000], row_group_size=1000)
    write_pairs(folder / "b.parquet", [*rows[3000:7000], rows[0]], row_group_size=1500)
    write_pairs(folder / "c.parquet", rows[7000:])
    selection = select_given(folder, read_catalog(data), tmp_path / "out")
    assert rows_of(selection) == rows
    assert selection.left_out == {"repeated": 1001}


def test_chunks_and_limits(tmp_path, data, monkeypatch):
    monkeypatch.setattr(pair_files, "CHUNK_PAIRS", 2048)
    rows = [(f"query {number}", 3) for number in range(5000)]
    write_pairs(tmp_path / "pairs.parquet", rows)
    selection = select_given(tmp_path / "pairs.parquet", read_catalog(data), tmp_path / "out")
    assert selection.chunks() == [2048, 2048, 904]
    assert selection.chunks(2048) == [2048]
    assert selection.chunks(2049) == [2048, 1]
    assert selection.chunks(9999) == [2048, 2048, 904]
    assert rows_of(selection, 2049) == rows[:2049]


pairs = st.tuples(
    st.sampled_from(["a", "b", "", " ", "ä", None]), st.sampled_from([3, 7, 9, 5, 1, None])
)


@settings(max_examples=8, deadline=None)
@given(st.lists(pairs, max_size=40))
def test_every_row_is_taken_or_counted_as_left_out(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("pairs")
    catalog = {"product_id": list(TITLES), "title": list(TITLES.values())}
    pq.write_table(pa.table(catalog), folder / "catalog.parquet")
    path = write_pairs(folder / "pairs.parquet", rows)
    good = [row for row in rows if (row[0] or "").strip() and row[1] in (3, 7)]
    if not good:
        with pytest.raises(BadInputError, match="holds no pair to label"):
            select_given(path, read_catalog(folder), folder / "out")
        return
    selection = select_given(path, read_catalog(folder), folder / "out")
    assert rows_of(selection) == list(dict.fromkeys(good))
    assert selection.pairs + sum(selection.left_out.values()) == len(rows)


def test_unlabelled_pairs_of_the_impressions(tmp_path, data):
    shown = [  # request, query, product: soap is searched twice, juice three times
        *((1, "soap", 3), (1, "soap", 7), (2, "soap", 7), (1, "soap", 1)),
        *((3, "juice", 7), (4, "juice", 3), (5, "juice", 9), (5, "juice", 3)),
        (6, "bread", 3),
    ]
    request, query, product = zip(*shown, strict=True)
    impressions = {"request_id": request, "query": query, "product_id": product}
    pq.write_table(pa.table(impressions), data / "impressions.parquet")
    labels = [("juice", 7, "human"), ("soap", 3, "llm"), ("bread", 7, "human")]
    query, product, source = zip(*labels, strict=True)
    relevance = {"query": query, "product_id": product, "source": source, "label": [1, 1, 1]}
    pq.write_table(pa.table(relevance), data / "relevance.parquet")
    selection = select_unlabelled(data, read_catalog(data), tmp_path / "out")
    assert rows_of(selection) == [("juice", 3), ("soap", 7), ("soap", 3), ("bread", 3)]
    assert selection.left_out == {
        "human label": 1,
        "product unknown": 1,
        "product without a title": 1,
    }
    (data / "relevance.parquet").unlink()
    selection = select_unlabelled(data, read_catalog(data), tmp_path / "again")
    assert Counter(rows_of(selection))["juice", 7] == 1


def test_what_cannot_be_read_is_named(tmp_path, data):
    catalog = read_catalog(data)
    with pytest.raises(BadInputError, match=r"impressions\.parquet: no such file; name the pairs"):
        select_unlabelled(data, catalog, tmp_path / "out")
    path = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"query": ["soap"], "product": [3]}), path)
    with pytest.raises(BadInputError, match="column 'product_id' is missing; did you mean"):
        select_given(path, catalog, tmp_path / "out")
    pq.write_table(pa.table({"query": ["soap"], "product_id": ["3"]}), path)
    with pytest.raises(BadInputError, match="column 'product_id' is string, expected an integer"):
        select_given(path, catalog, tmp_path / "out")
    write_pairs(path, [("soap", 1), ("soap", 9)])
    with pytest.raises(
        BadInputError,
        match=r"holds no pair to label \(product unknown: 1, product without a title: 1\)",
    ):
        select_given(path, catalog, tmp_path / "out")
    assert not (tmp_path / "out" / "_pairs.parquet").exists()
    write_pairs(path, [])
    with pytest.raises(BadInputError, match=r"holds no pair to label \(it is empty\)"):
        select_given(path, catalog, tmp_path / "out")
