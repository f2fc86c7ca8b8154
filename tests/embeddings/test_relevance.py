from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embeddings.catalog import Catalog
from embeddings.relevance import (
    SOURCES,
    Relevance,
    held_out_queries,
    label_files,
    query_hashes,
    read_relevance,
    split_queries,
    unseen,
    write_training_queries,
)
from features.errors import BadInputError


@pytest.fixture
def catalog(tmp_path):
    return catalog_of(tmp_path, [30, 10, 20])


def catalog_of(folder, ids):
    titles = pa.array([None] * len(ids), pa.string())
    ids = pa.array(ids, pa.int64())
    return Catalog(path=folder / "catalog.parquet", product_ids=ids, titles=titles)


def write(path, rows, **replaced):
    """Write rows of (query, product_id, label, source)."""
    query, product_id, label, source = zip(*rows, strict=True)
    content = {
        "query": query,
        "product_id": product_id,
        "label": pa.array(label, pa.int8()),
        "source": source,
    }
    path.parent.mkdir(exist_ok=True)
    content = {name: value for name, value in (content | replaced).items() if value is not None}
    pq.write_table(pa.table(content), path)


ROWS = [
    ("milk", 10, 2, "human"),
    ("bread", 20, 0, "llm"),
    ("milk", 30, 1, "derived"),
    ("bread", 30, 2, "human"),
]


def pairs(relevance):
    """Return {(query, row of the catalog): label}."""
    return {
        (relevance.queries[query], product): label
        for query, product, label in zip(
            relevance.query.tolist(),
            relevance.product.tolist(),
            relevance.label.tolist(),
            strict=True,
        )
    }


def test_pairs_come_as_rows_of_the_catalog(tmp_path, catalog):
    write(tmp_path / "relevance.parquet", ROWS)
    found = read_relevance(tmp_path, catalog)
    assert found.queries == ["bread", "milk"]
    assert found.query.tolist() == [0, 0, 1, 1]
    assert found.product.tolist() == [0, 2, 0, 1]
    assert found.label.tolist() == [2, 0, 1, 2]
    types = (found.query.dtype, found.product.dtype, found.label.dtype)
    assert types == (np.int32, np.int64, np.int8)
    assert found.published_test is None
    assert len(found) == 4


def test_files_in_a_folder_and_other_types(tmp_path, catalog):
    path = tmp_path / "relevance.parquet"
    dictionary = pa.array(["milk", "milk", "é", "b"]).dictionary_encode()
    write(path / "a.parquet", ROWS, query=dictionary)
    write(path / "b.parquet", ROWS[:1], query=pa.array(["a"], pa.large_string()), label=[1])
    found = read_relevance(tmp_path, catalog)
    assert found.queries == ["a", "b", "milk", "é"]
    assert pairs(found)["a", 1] == 1
    assert pairs(found)["milk", 2] == 0


def test_some_of_the_pairs(tmp_path, catalog):
    write(tmp_path / "relevance.parquet", ROWS)
    every = read_relevance(tmp_path, catalog)
    some = every.take(every.label == 2)
    assert pairs(some) == {("bread", 0): 2, ("milk", 1): 2}
    assert pairs(every.take(np.array([3]))) == {("milk", 1): 2}
    assert some.queries is every.queries
    assert every.take(np.array([3])).judged_queries() == ["milk"]


@pytest.mark.parametrize(
    ("judgements", "label"),
    [
        ([(1, "llm"), (1, "llm")], 1),
        ([(0, "llm"), (2, "human"), (0, "derived")], 2),
        ([(0, "derived"), (1, "llm"), (0, "derived")], 1),
        ([(1, "human"), (2, "human"), (0, "llm")], 2),  # 1.5
        ([(0, "human"), (1, "human")], 1),  # 0.5
        ([(0, "human"), (0, "human"), (1, "human")], 0),  # 0.33
        ([(1, "human"), (2, "human"), (2, "human")], 2),  # 1.67
        ([(0, "human"), (2, "human")], 1),
    ],
)
def test_a_pair_judged_several_times_gets_one_label(tmp_path, catalog, judgements, label):
    rows = [("milk", 10, *judgement) for judgement in judgements]
    write(tmp_path / "relevance.parquet", [*rows[:1], ("milk", 20, 0, "llm"), *rows[1:]])
    assert pairs(read_relevance(tmp_path, catalog)) == {("milk", 1): label, ("milk", 2): 0}


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.sampled_from([10, 20, 30]),
            st.integers(0, 2),
            st.sampled_from(SOURCES),
        ),
        min_size=1,
        max_size=30,
    )
)
def test_merged_labels_are_those_of_a_plain_reckoning(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("merged")
    write(folder / "relevance.parquet", rows)
    expected = {}
    for row, product in enumerate([30, 10, 20]):
        for query in "abc":
            judged = [
                (SOURCES.index(s), label) for q, p, label, s in rows if (q, p) == (query, product)
            ]
            best = [label for source, label in judged if source == min(judged)[0]]
            if best:
                expected[query, row] = int(np.floor(np.mean(best) + 0.5))
    assert pairs(read_relevance(folder, catalog_of(folder, [30, 10, 20]))) == expected


@pytest.mark.parametrize(
    ("replaced", "said"),
    [
        ({"label": None, "labels": [0] * 4}, "column 'label' is missing; did you mean 'labels'?"),
        ({"source": None}, "column 'source' is missing"),
        ({"query": [1, 2, 3, 4]}, "column 'query' is int64, expected text"),
        ({"product_id": list("abcd")}, "column 'product_id' is string, expected an integer"),
        ({"label": [0.5, 1, 2, 2]}, "column 'label' is double, expected an integer"),
        ({"label": [0, 1, 3, 7]}, "column 'label', row 3: is 3, expected 0, 1 or 2"),
        ({"label": [0, -1, 2, 0]}, "column 'label', row 2: is -1, expected 0, 1 or 2"),
        ({"label": [0, 1, 2, None]}, "column 'label', row 4: is null, expected 0, 1 or 2"),
        (
            {"source": ["human", "gpt", "llm", "llm"]},
            "column 'source', row 2: is 'gpt', expected human, llm or derived",
        ),
        ({"query": ["a", None, "b", "c"]}, "column 'query', row 2: is null, expected text that is"),
        ({"query": ["a", "b", " \t", "c"]}, r"column 'query', row 3: is ' \\t', expected text"),
        ({"product_id": [10, None, 20, 20]}, "column 'product_id', row 2: is null"),
        (
            {"product_id": [10, 7, 8, 7]},
            r"names 2 products that .*catalog\.parquet does not hold, the first is 7 in row 2",
        ),
        (
            {"product_id": pa.array([1 << 63, 10, 10, 10], pa.uint64())},
            "cannot be read: Integer value 9223372036854775808 not in range",
        ),
        ({"split": ["train", "dev", "test", "test"]}, "row 2: is 'dev', expected train or test"),
        ({"split": ["train", None, "test", "test"]}, "row 2: is null, expected train or test"),
        (
            {"split": ["train", "test", "test", "test"]},
            "query 'milk' is in the training and in the held-out set",
        ),
    ],
)
def test_broken_labels(tmp_path, catalog, replaced, said):
    write(tmp_path / "relevance.parquet", ROWS, **replaced)
    with pytest.raises(BadInputError, match=rf"relevance\.parquet: .*{said}"):
        read_relevance(tmp_path, catalog)


def test_missing_and_empty_labels(tmp_path, catalog):
    with pytest.raises(BadInputError, match=r"relevance\.parquet: no such file; it holds the rel"):
        read_relevance(tmp_path, catalog)
    path = tmp_path / "relevance.parquet"
    write(path, ROWS)
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(BadInputError, match=r"relevance\.parquet: the table is empty"):
        read_relevance(tmp_path, catalog)
    path.write_bytes(b"PAR1")
    with pytest.raises(BadInputError, match=r"relevance\.parquet: cannot be read"):
        read_relevance(tmp_path, catalog)


def test_a_split_in_some_files_only(tmp_path, catalog):
    path = tmp_path / "relevance.parquet"
    write(path / "a.parquet", ROWS, split=["train"] * 4)
    write(path / "b.parquet", ROWS)
    with pytest.raises(BadInputError, match="column 'split' stands in some of its files only"):
        read_relevance(tmp_path, catalog)


def test_a_query_in_the_splits_of_two_files(tmp_path, catalog):
    path = tmp_path / "relevance.parquet"
    write(path / "a.parquet", ROWS, split=["train"] * 4)
    write(path / "b.parquet", ROWS[:1], split=["test"])
    with pytest.raises(BadInputError, match="query 'milk' is in the training and in the held-out"):
        read_relevance(tmp_path, catalog)


LABELLED = [  # by a model: a query that people judged too, and one that they did not
    ("milk", 20, 0, "llm"),
    ("milk", 10, 0, "llm"),
    ("soap", 30, 2, "llm"),
]


def write_labels(folder):
    """Write `LABELLED` as ``label-relevance label`` does, with what lies beside it."""
    probability = pa.array([[0.7, 0.2, 0.1]] * 2, pa.list_(pa.float32(), 3))
    more = {"model": ["tiny"] * 2, "prompt_version": [""] * 2, "probabilities": probability}
    write(folder / "part-00000.parquet", LABELLED[:2], **more, probability=[0.7] * 2)
    write(folder / "part-00001.parquet", LABELLED[2:])
    (folder / "labels.json").write_text("{}")
    (folder / "answers.parquet").write_text("not of the labels")
    return folder


def test_labels_of_a_model_are_read_beside_those_of_the_dataset(tmp_path, catalog):
    write(tmp_path / "relevance.parquet", ROWS)
    labels = write_labels(tmp_path / "labels")
    human = {("milk", 1): 2, ("bread", 0): 2}
    model = {("milk", 2): 0, ("soap", 0): 2, ("bread", 2): 0}
    found = read_relevance(tmp_path, catalog, labels=labels)
    assert pairs(found) == human | model | {("milk", 0): 1}  # people's grade of milk 10 counts
    for source, expected in (("human", human), ("llm", model | {("milk", 1): 0})):
        some = read_relevance(tmp_path, catalog, labels=labels, source=source)
        assert pairs(some) == expected
        assert some.queries == found.queries == ["bread", "milk", "soap"]
    assert pairs(read_relevance(tmp_path, catalog, source="human")) == human
    assert label_files(labels) == [labels / "part-00000.parquet", labels / "part-00001.parquet"]


@pytest.mark.parametrize("split", [None, ["test", "train", "test", "train"]])
def test_held_out_are_the_same_queries_whatever_labels_are_read(tmp_path, catalog, split):
    write(tmp_path / "relevance.parquet", ROWS, split=split)
    labels = write_labels(tmp_path / "labels")
    own = read_relevance(tmp_path, catalog)
    expected = dict(zip(own.queries, held_out_queries(own, held_out=0.5), strict=True))
    alone = dict(zip(["soap"], held_out_queries(judged(["soap"]), held_out=0.5), strict=True))
    # A split that the dataset publishes holds out nothing that it does not know.
    expected["soap"] = False if split else alone["soap"]
    for source in ("all", "human", "llm"):
        found = read_relevance(tmp_path, catalog, labels=labels, source=source)
        held_out = held_out_queries(found, held_out=0.5)
        assert dict(zip(found.queries, held_out, strict=True)) == expected
        training, test = split_queries(found, held_out=0.5)
        assert len(training) + len(test) == len(found)
        assert not any(expected[query] for query in training.judged_queries())


def test_labels_of_a_model_alone(tmp_path, catalog):
    labels = write_labels(tmp_path / "labels")
    found = read_relevance(tmp_path, catalog, labels=labels)
    assert pairs(found) == {("milk", 1): 0, ("milk", 2): 0, ("soap", 0): 2}
    assert found.published_test is None
    with pytest.raises(BadInputError, match="labels: there is no label of source 'human'"):
        read_relevance(tmp_path, catalog, labels=labels, source="human")


def test_what_is_wrong_with_labels_of_a_model(tmp_path, catalog):
    write(tmp_path / "relevance.parquet", [row for row in ROWS if row[3] == "human"])
    with pytest.raises(
        BadInputError, match=r"relevance\.parquet: there is no label of source 'llm'"
    ):
        read_relevance(tmp_path, catalog, source="llm")
    labels = tmp_path / "labels"
    for there in (False, True):
        with pytest.raises(
            BadInputError, match=r"labels: holds no part-\*\.parquet; name a folder"
        ):
            read_relevance(tmp_path, catalog, labels=labels)
        if not there:
            labels.mkdir()
    write(labels / "part-00000.parquet", [("milk", 10, -1, "llm")])
    with pytest.raises(BadInputError, match=r"part-00000\.parquet: .* row 1: is -1, expected 0, 1"):
        read_relevance(tmp_path, catalog, labels=labels)


def judged(queries, **more):
    """Return one pair for each query."""
    count = len(queries)
    return Relevance(
        queries=list(queries),
        query=np.arange(count, dtype=np.int32),
        product=np.zeros(count, np.int64),
        label=np.full(count, 2, np.int8),
        **more,
    )


NUMBERED = [f"query {number}" for number in range(20_000)]


def test_a_fifth_of_the_queries_is_held_out():
    training, held_out = split_queries(judged(NUMBERED))
    assert not set(training.judged_queries()) & set(held_out.judged_queries())
    assert len(training) + len(held_out) == 20_000
    assert abs(len(held_out) - 4000) < 4 * np.sqrt(20_000 * 0.2 * 0.8)
    tenth = split_queries(judged(NUMBERED), held_out=0.1)[1]
    assert set(tenth.judged_queries()) < set(held_out.judged_queries())


def test_another_seed_holds_out_other_queries():
    held_out = [
        set(split_queries(judged(NUMBERED), seed=seed)[1].judged_queries()) for seed in (0, 1, -1)
    ]
    assert all(abs(len(a & b) - 800) < 150 for a, b in pairwise(held_out))
    assert held_out[0] == set(split_queries(judged(NUMBERED), seed=0)[1].judged_queries())


def test_the_side_of_a_query_depends_on_its_text_alone():
    assert query_hashes(["a", "milk"]).tolist() == [
        -5808556873153909620,
        -2714228416964129214,
    ]  # FNV-1a
    held_out = set(split_queries(judged(NUMBERED))[1].judged_queries())
    few = split_queries(judged(["milk", *NUMBERED[7:30:3]]))[1]
    assert set(few.judged_queries()) - {"milk"} == held_out & set(NUMBERED[7:30:3])


def test_all_pairs_of_a_query_go_together(tmp_path, catalog):
    write(tmp_path / "relevance.parquet", ROWS)
    sides = split_queries(read_relevance(tmp_path, catalog), held_out=0.5)
    assert sorted(len(side) for side in sides) in ([0, 4], [2, 2])


@pytest.mark.parametrize("share", [0, 1, -0.2, float("nan")])
def test_the_share_of_held_out_queries(share):
    with pytest.raises(BadInputError, match="between 0 and 1, got"):
        split_queries(judged(["a"]), held_out=share)


def test_a_published_split_counts(tmp_path, catalog):
    split = ["test", "train", "test", "train"]
    write(tmp_path / "relevance.parquet", ROWS, split=split)
    relevance = read_relevance(tmp_path, catalog)
    assert relevance.published_test.tolist() == [False, True]
    for seed in range(5):
        training, held_out = split_queries(relevance, seed=seed)
        assert training.judged_queries() == ["bread"]
        assert held_out.judged_queries() == ["milk"]


def test_a_model_tells_what_it_has_not_seen(tmp_path):
    training, held_out = split_queries(judged(NUMBERED[:100]))
    write_training_queries(tmp_path, training.judged_queries())
    found = unseen(judged(NUMBERED[:100]), tmp_path)
    assert found.judged_queries() == held_out.judged_queries()
    assert unseen(judged(["new", *NUMBERED[:3]]), tmp_path).judged_queries()[0] == "new"
    hashes = pq.read_table(tmp_path / "training_queries.parquet")["hash"].to_pylist()
    assert hashes == sorted(query_hashes(training.judged_queries()).tolist())


def test_a_model_trained_on_no_queries_has_seen_none(tmp_path):
    write_training_queries(tmp_path, [])
    assert unseen(judged(["a", "b"]), tmp_path).judged_queries() == ["a", "b"]


def test_a_model_trained_on_a_query_that_is_held_out(tmp_path):
    write_training_queries(tmp_path, ["a", "b"])
    test = np.array([False, True, True])
    with pytest.raises(BadInputError, match=r"query 'b' is in the training and in the held-out"):
        unseen(judged(["a", "b", "c"], published_test=test), tmp_path)
    fine = unseen(judged(["a", "bb", "c"], published_test=test), tmp_path)
    assert fine.judged_queries() == ["bb", "c"]


def test_a_model_that_does_not_tell(tmp_path):
    with pytest.raises(BadInputError, match=r"training_queries\.parquet: no such file; it tells"):
        unseen(judged(["a"]), tmp_path)
    pq.write_table(pa.table({"hash": ["a"]}), tmp_path / "training_queries.parquet")
    with pytest.raises(BadInputError, match="column 'hash' is string, expected int64"):
        unseen(judged(["a"]), tmp_path)
