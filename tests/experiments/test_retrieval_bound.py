"""What bounds Graded Relevance@10: three queries by hand, and the command from end to end."""

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embeddings.relevance import write_training_queries
from embeddings.text_encoder import TextEncoder
from experiments import retrieval_bound
from experiments.retrieval_bound import document_of, label_noise
from experiments.retrieval_bound_scores import (
    HYBRID,
    Judgements,
    kinds_of,
    measure,
    scores_of,
    z_scores,
)
from experiments.retrieval_rows import DASHCLIP
from experiments.retrieval_table import benchmark_retrieval
from experiments.retrieval_task import ProductVectors, RetrievalTask
from features.errors import BadInputError

PRODUCTS = 24
GRADES = {  # "a" has 12 judged products and a best sum of 5, the others 2 and 10, and 3 each
    "a": dict.fromkeys(range(12), 0) | {0: 2, 1: 2, 2: 1},
    "bolt 5": {12: 2, 13: 1},
    "c d e f": dict.fromkeys(range(14, 24), 0) | {14: 1, 23: 2},
}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    titles = [None, *(f"title {row}" for row in range(1, PRODUCTS))]
    catalog = pa.table({"product_id": list(range(100, 100 + PRODUCTS)), "title": titles})
    pq.write_table(catalog, folder / "catalog.parquet")
    pairs = [(q, 100 + row, grade) for q, found in GRADES.items() for row, grade in found.items()]
    query, product, label = zip(*pairs, strict=True)
    relevance = {"query": query, "product_id": product, "label": label}
    relevance |= {"source": ["human"] * len(pairs), "split": ["test"] * len(pairs)}
    pq.write_table(pa.table(relevance), folder / "relevance.parquet")
    return RetrievalTask.read(folder)


def by_hand():
    """Return scores [3, 24] by which each query has something to tell."""
    a, b, c = np.full((3, PRODUCTS), -1.0)
    a[:12] = np.arange(12)  # the relevant ones last of the judged
    a[12:14] = 100  # and two unjudged before all
    b[12], b[:9], b[13] = 9, 8, 0  # one relevant, nine unjudged, and the other relevant
    return np.stack([a, b, c])  # the last finds all alike: products 0 to 9 come first


def titles():
    """Return title vectors: 12 is like 2, 13 almost like 1, and 3 to 11 like 14 to 23."""
    vectors = np.zeros((PRODUCTS, 4))
    vectors[3:, 3] = 1
    vectors[1], vectors[2], vectors[12] = np.eye(4)[[0, 1, 1]]
    vectors[13] = (0.85, 0, (1 - 0.85**2) ** 0.5, 0)
    return vectors


@pytest.fixture
def figures(task):
    return measure(task, Judgements.of(task), lambda part: by_hand()[part], titles())


def test_judged_products_only(figures):
    # "a": of products 11 to 2, the first ten of the judged, only 2 has a grade: 1 of 5.
    assert figures.judged_only == pytest.approx([1 / 5, 1, 1])


def test_graded_relevance_by_length_of_the_list(figures):
    assert figures.graded[10] == pytest.approx([0, 2 / 3, 0])
    assert figures.graded[20] == pytest.approx([1, 1, 1 / 3])  # "c d e f": 14 among 0 to 19
    assert figures.graded[50] == pytest.approx([1, 1, 1])
    assert figures.graded[100] == pytest.approx([1, 1, 1])


def test_unjudged(figures):
    assert figures.listed == 10
    assert figures.unjudged.tolist() == [2, 9, 10]


def test_twins_take_the_grade_of_the_product_they_resemble(figures):
    wide, narrow = figures.twins[0.8], figures.twins[0.9]
    # "a": 12 is like 2 (grade 1), 13 like 1 (grade 2, cosine .85). "bolt 5": 2 like 12, 1 like 13.
    # "c d e f": seven are as like 14 (grade 1) as 23 (grade 2). Product 0 has no title.
    assert wide.count.tolist() == [2, 2, 7]
    assert narrow.count.tolist() == [1, 1, 7]
    assert wide.graded == pytest.approx([3 / 5, 1, 1])  # cut at 1 from 5 / 3 and 14 / 3
    assert narrow.graded == pytest.approx([1 / 5, 1, 1])


def test_judged_products_in_random_order(task):
    judged = Judgements.of(task)
    assert judged.per_query.tolist() == [12, 2, 10]
    assert judged.relevant_per_query.tolist() == [3, 2, 2]
    assert judged.in_random_order() == pytest.approx([10 / 12, 1, 1])


def test_document(task, figures):
    document = document_of(task, Judgements.of(task), {"it": figures})
    row = document["rows"][0]
    assert (document["queries"], document["products"]) == (3, 24)
    assert document["judged_per_query"] == 8
    assert document["queries_with_more_judged_than_k"] == 1
    means = {key: figure["mean"] for key, figure in row["graded_relevance"].items()}
    assert means == pytest.approx({"10": 2 / 9, "20": 7 / 9, "50": 1, "100": 1})
    assert row["graded_relevance"]["10"]["interval"] == pytest.approx([0, 2 / 3])
    assert row["judged_only"]["mean"] == pytest.approx(11 / 15)
    assert row["lost_to_unjudged"]["mean"] == pytest.approx(11 / 15 - 2 / 9)
    assert row["lost_to_order"]["mean"] == pytest.approx(4 / 15)
    assert row["unjudged"]["mean"] == pytest.approx(21 / 30)
    assert [twin["share_of_unjudged"] for twin in row["twins"]] == pytest.approx([11 / 21, 9 / 21])
    assert row["twins"][0]["graded_relevance"]["mean"] == pytest.approx(13 / 15)
    assert row["kinds"]["with a digit"]["mean"] == pytest.approx(2 / 3)
    assert row["kinds"]["without"]["mean"] == 0
    assert row["kinds"]["7 words or more"] is None


@given(seed=st.integers(0, 2**32 - 1), levels=st.integers(1, 30))
def test_bounds_hold_for_any_scores(task, seed, levels):
    scores = np.random.default_rng(seed).integers(0, levels, (3, PRODUCTS)).astype(np.float32)
    found = measure(task, Judgements.of(task), lambda part: scores[part], titles())
    assert (found.judged_only >= found.graded[10] - 1e-12).all()
    assert (found.graded[20] >= found.graded[10]).all()
    wide, narrow = found.twins[0.8], found.twins[0.9]
    assert (found.unjudged >= wide.count).all()
    assert (wide.count >= narrow.count).all()
    assert (wide.graded >= narrow.graded).all()
    assert (narrow.graded >= np.minimum(1, found.graded[10])).all()


def test_kinds_of_queries():
    queries = ["2x4", "ceiling fan", "3/4 in pipe", "a b c d e f", "a b c d e f g", "#?"]
    kinds = kinds_of(queries)
    assert kinds["with a digit"].tolist() == [True, False, True, False, False, False]
    assert kinds["up to 3 words"].tolist() == [True, True, False, False, False, True]
    assert kinds["4 to 6 words"].tolist() == [False, False, True, True, False, False]
    assert kinds["7 words or more"].tolist() == [False, False, False, False, True, False]
    assert (kinds["with a digit"] ^ kinds["without"]).all()


def test_z_scores():
    assert z_scores(np.array([[1.0, 3], [5, 5]])).tolist() == [[-1, 1], [0, 0]]


def test_products_without_a_vector_share_the_lowest_cosine(task):
    products = ProductVectors(
        vectors=np.array([[2.0, 0], [-3, 0], [0, 5]], np.float32), places=np.array([1, 3, 5])
    )
    cosines = task.cosines(np.array([[7.0, 0], [0, -1]], np.float32), products)
    assert cosines[:, [1, 3, 5]].tolist() == [[1, -1, 0], [0, 0, -1]]
    assert (np.delete(cosines, [1, 3, 5], axis=1) == -1).all()


def write_labels(folder, rows):
    query, product, label, source = zip(*rows, strict=True)
    table = {"query": query, "product_id": product, "label": label, "source": source}
    pq.write_table(pa.table(table), folder / "relevance.parquet")
    return folder


def test_one_label_a_pair_tells_nothing_of_noise(tmp_path):
    found = label_noise(write_labels(tmp_path, [("a", 1, 2, "human"), ("a", 1, 0, "llm")]))
    assert (found["labelled_several_times"], found["differing"]) == (0, 0)
    assert "nothing is known" in found["note"]


def test_several_labels_of_one_source_tell_how_often_they_differ(tmp_path):
    rows = [("a", 1, 2, "human"), ("a", 1, 1, "human"), ("a", 2, 0, "human"), ("a", 2, 0, "human")]
    found = label_noise(write_labels(tmp_path, [*rows, ("b", 1, 1, "human")]))
    assert (found["labelled_several_times"], found["differing"]) == (2, 1)
    assert (
        "2 pairs that one source labels several times, the labels of 50.0% differ"
        in (found["note"])
    )


def test_missing_bm25s_is_told(task, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    minilm = TextEncoder.packaged()
    with pytest.raises(BadInputError, match="bm25s is not installed; install it with: pip"):
        scores_of(task, minilm, minilm)


# --- the command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a folder that says it is MiniLM, trained on two of the queries."""
    folder = tmp_path_factory.mktemp("model")
    for file in TextEncoder.packaged().folder.iterdir():
        (folder / file.name).symlink_to(file)
    write_training_queries(folder, ["whole milk", "dish soap"])
    return folder


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["retrieval_bound", *map(str, arguments)])
    return retrieval_bound.main()


def test_the_command_agrees_with_the_benchmark(tiny_dataset, model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("Stemmer", reason="PyStemmer is an optional extra")
    arguments = ("--data", tiny_dataset, "--model", model, "--output", tmp_path / "out")
    assert run(monkeypatch, *arguments) == 0
    shown = capsys.readouterr()
    assert "What GR@10 lacks to 1" in shown.out
    assert "Caveat: generated for tests" in shown.err
    assert "nothing is known of how far graders differ" in shown.err
    written = (tmp_path / "out" / "retrieval_bound.json").read_bytes()
    rows = {row["name"]: row for row in json.loads(written)["rows"]}
    assert list(rows) == ["BM25", "BM25 (stemmed)", "MiniLM (untrained)", DASHCLIP, HYBRID]
    table = benchmark_retrieval(tiny_dataset, tmp_path / "table", model=model)
    for row in table["rows"]:
        if row["name"] in rows:
            found = rows[row["name"]]["graded_relevance"]["10"]
            assert found["mean"] == pytest.approx(row["graded_relevance"])
            assert found["interval"] == pytest.approx(row["interval"]["graded_relevance"])

    assert run(monkeypatch, *arguments) == 0  # the same figures again
    assert (tmp_path / "out" / "retrieval_bound.json").read_bytes() == written


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--model", "/no/model", "/no/model: no such model folder"),
        ("--data", "/no/data", "/no/data"),
        ("--output", __file__, "is a file; name a folder"),
    ],
)
def test_bad_input_ends_with_2_and_one_sentence(
    option, value, message, tiny_dataset, model, tmp_path, monkeypatch, capsys
):
    given = ("--data", tiny_dataset, "--model", model, "--output", tmp_path / "out", option, value)
    assert run(monkeypatch, *given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
