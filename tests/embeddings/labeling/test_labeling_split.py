import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.catalog import read_catalog
from embeddings.labeling.cli import main
from embeddings.labeling.judgements import PARTS, read_judgements
from embeddings.labeling.options import Split
from embeddings.labeling.split import _places, split
from embeddings.relevance import read_relevance, split_queries
from features.errors import BadInputError
from tests.tiny_labels import QUERIES, write_tiny_labels


@pytest.fixture
def data(tmp_path):
    return write_tiny_labels(tmp_path / "data", raters=3, noise=0.2)


def options(data, output="split", **changed):
    asked = {"evaluation": 0.25, "validation": 0.25, "held_out_queries": 0.0} | changed
    return Split(data=data, output=data.parent / output, **asked)


def rows(folder, *, parts=PARTS):
    """Return (query, product_id, label) of all rows of the parts, sorted."""
    tables = [pq.read_table(folder / f"{part}.parquet") for part in parts]
    table = pa.concat_tables(tables).to_pydict()
    return sorted(zip(table["query"], table["product_id"], table["label"], strict=True))


def change(data, name, make):
    path = data / f"{name}.parquet"
    pq.write_table(make(pq.read_table(path)), path)


def with_column(table, name, values):
    return table.set_column(table.column_names.index(name), name, values)


def test_every_judgement_is_in_one_part_and_no_query_in_two(data):
    content = split(options(data))
    given = pq.read_table(data / "relevance.parquet").to_pydict()
    expected = sorted(zip(given["query"], given["product_id"], given["label"], strict=True))
    assert rows(data.parent / "split") == expected
    queries = [
        {query for query, _, _ in rows(data.parent / "split", parts=[part])} for part in PARTS
    ]
    assert sum(len(part) for part in queries) == len(set.union(*queries)) == len(QUERIES)
    for part, found in zip(PARTS, queries, strict=True):
        figures = content["parts"][part]
        assert figures["queries"] == len(found)
        assert figures["judgements"] == 3 * figures["pairs"] == 9 * len(found)
        assert sum(figures["labels"]) == figures["pairs"]
        assert sum(figures["label_shares"]) == pytest.approx(1, abs=1e-5)


def test_titles_are_those_of_the_catalog(data):
    split(options(data))
    catalog = pq.read_table(data / "catalog.parquet")
    title = dict(zip(catalog["product_id"].to_pylist(), catalog["title"].to_pylist(), strict=True))
    part = pq.read_table(data.parent / "split" / "fine_tuning.parquet")
    assert part["title"].to_pylist() == [title[i] for i in part["product_id"].to_pylist()]


def test_queries_that_training_holds_out_are_left_out(data):
    relevance = read_relevance(data, read_catalog(data))
    training, held_out = split_queries(relevance, held_out=0.3, seed=0)
    content = split(options(data, held_out_queries=0.3))
    found = {query for query, _, _ in rows(data.parent / "split")}
    assert found == set(training.judged_queries())
    assert content["left_out"]["held_out"] == 3 * len(held_out) > 0


def test_a_published_split_counts(data):
    test = QUERIES[:5]

    def publish(table):
        sides = ["test" if query in test else "train" for query in table["query"].to_pylist()]
        return table.append_column("split", pa.array(sides))

    change(data, "relevance", publish)
    content = split(options(data, held_out_queries=0.9))
    assert {query for query, _, _ in rows(data.parent / "split")} == set(QUERIES[5:])
    assert content["left_out"]["held_out"] == 5 * 9


def test_products_without_title_and_other_sources_are_counted(data):
    relevance = pq.read_table(data / "relevance.parquet")
    first = relevance["product_id"][0].as_py()
    without = sum(product == first for product in relevance["product_id"].to_pylist())
    ids = pq.read_table(data / "catalog.parquet")["product_id"].to_pylist()
    titles = [None if product == first else f"title {product}" for product in ids]
    change(data, "catalog", lambda table: with_column(table, "title", pa.array(titles)))
    sources = ["human"] * (len(relevance) - 2) + ["llm", "derived"]
    change(data, "relevance", lambda table: with_column(table, "source", pa.array(sources)))
    content = split(options(data))
    assert content["left_out"] == {"not_human": 2, "without_title": without, "held_out": 0}
    found = rows(data.parent / "split")
    assert len(found) == len(relevance) - 2 - without
    assert first not in {product for _, product, _ in found}


def test_the_same_command_finds_it_done_and_another_is_refused(data, capsys):
    content = split(options(data))
    written = (data.parent / "split" / "split.json").stat().st_mtime_ns
    assert split(options(data)) == content
    assert (data.parent / "split" / "split.json").stat().st_mtime_ns == written
    assert "already" in capsys.readouterr().err
    with pytest.raises(BadInputError, match=r"another 'seed' \(0, not 1\)"):
        split(options(data, seed=1))
    change(data, "relevance", lambda table: table.slice(1))
    with pytest.raises(BadInputError, match="another 'data_fingerprint'"):
        split(options(data))


def test_a_folder_of_something_else_stays(data):
    with pytest.raises(BadInputError, match="exists and is no split"):
        split(options(data, output="data"))
    assert (data / "catalog.parquet").exists()


def test_two_runs_write_the_same_bytes_and_another_seed_draws_other_queries(data):
    for output, seed in (("a", 0), ("b", 0), ("c", 1)):
        split(options(data, output=output, seed=seed))
    parts = {
        output: [(data.parent / output / f"{part}.parquet").read_bytes() for part in PARTS]
        for output in "abc"
    }
    assert parts["a"] == parts["b"] != parts["c"]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(200, 400))
def test_labels_are_mixed_alike_in_all_parts(seed, queries):
    # All judgements of a query are the same: the hardest case, as its mean is 0, 1 or 2.
    rng = np.random.default_rng(seed)
    of_query = rng.choice(3, queries, p=rng.dirichlet(np.ones(3)))
    query = np.repeat(np.arange(queries), rng.integers(1, 9, queries))
    label = pa.array(of_query[query], pa.int8())
    texts = [f"query {i}" for i in range(queries)]
    place = _places(texts, query, pa.table({"label": label}), seed)
    for low, high in ((0, 0.25), (0.25, 0.5), (0.5, 1)):
        part = (place >= low) & (place < high)
        assert part.mean() == pytest.approx(high - low, abs=0.02)
        for value in range(3):
            expected = (of_query == value).mean()
            assert (of_query[part] == value).mean() == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"evaluation": 0.0}, "--evaluation is a share of the queries between 0 and 1, got 0.0"),
        ({"evaluation": 0.5, "validation": 0.5}, "leave no query to fine-tune on"),
        ({"held_out_queries": 1.0}, "--held-out-queries is a share from 0 to below 1, got 1.0"),
        ({"evaluation": 0.001, "validation": 0.001}, "leaves none for the part"),
    ],
)
def test_shares_that_do_not_work_are_told(data, changed, message):
    with pytest.raises(BadInputError, match=message):
        split(options(data, **changed))
    assert not (data.parent / "split").exists()


def test_data_without_human_labels_is_told(data):
    sources = pa.array(["llm"] * len(pq.read_table(data / "relevance.parquet")))
    change(data, "relevance", lambda table: with_column(table, "source", sources))
    with pytest.raises(BadInputError, match="no human label is left to split"):
        split(options(data))
    (data / "relevance.parquet").unlink()
    with pytest.raises(BadInputError, match="no such file; it holds the human labels"):
        split(options(data))


def test_the_command_prints_the_parts_and_how_people_agree(data, capsys):
    arguments = ["split", "--data", str(data), "--output", str(data.parent / "split")]
    assert main([*arguments, "--held-out-queries", "0.1"]) == 0
    printed = capsys.readouterr()
    content = json.loads((data.parent / "split" / "split.json").read_text())
    assert content["agreement"]["pairs"] == sum(p["pairs"] for p in content["parts"].values())
    assert "fine-tuning" in printed.out
    assert f"Fleiss' kappa {content['agreement']['fleiss_kappa']:.3f}" in printed.err
    assert main([*arguments, "--evaluation", "2"]) == 2
    assert capsys.readouterr().err.startswith("label-relevance: --evaluation is a share")


def test_one_judgement_a_pair_tells_nothing_of_agreement(tmp_path):
    data = write_tiny_labels(tmp_path / "data")
    assert split(options(data))["agreement"] is None
    part = read_judgements(tmp_path / "split", "evaluation")
    assert part.given.tolist() == part.label.tolist()
