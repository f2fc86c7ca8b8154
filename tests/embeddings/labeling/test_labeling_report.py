import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import cohen_kappa_score

from embeddings.catalog import read_catalog
from embeddings.labeling.cli import main
from embeddings.labeling.grades import UNGRADED, Grades
from embeddings.labeling.label_files import (
    SCHEMA,
    part_path,
    part_state,
    read_parts,
    summary,
    write_part,
)
from embeddings.labeling.options import Report
from embeddings.labeling.report import report
from embeddings.labeling.report_data import LabelTables
from features.errors import BadInputError

TITLES = ["apple juice", "orange <b>juice</b>", "soap", "bread"]


class Namer:
    model, prompt_version = "m", "p-1"


def write_labels(folder, rows, chunk=0):
    """Rows: query, product, label, probability of the label, ``None`` where it is not told."""
    query, product, label, told = zip(*rows, strict=True)
    pairs = pa.table({"query": query, "product_id": pa.array(product, pa.int64())})
    probability = np.full((len(rows), 3), np.nan, np.float32)
    for row, (given, own) in enumerate(zip(label, told, strict=True)):
        if own is not None:
            probability[row] = (1 - own) / 2
            probability[row, given] = own
    grades = Grades(
        position=np.arange(len(rows)), label=np.array(label, np.int8), probability=probability
    )
    write_part(part_path(folder, chunk), pairs, grades, Namer())


@pytest.fixture
def labels(tmp_path):
    folder = tmp_path / "labels"
    write_labels(folder, [("juice", 0, 2, 0.9), ("juice", 1, 1, 0.6), ("juice", 2, 0, 0.8)])
    write_labels(
        folder,
        [("soap", 2, 2, 0.7), ("soap", 0, 0, None), ("soap", 3, UNGRADED, None)],
        chunk=1,
    )
    return folder


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    catalog = {"product_id": list(range(len(TITLES))), "title": TITLES}
    pq.write_table(pa.table(catalog), folder / "catalog.parquet")
    return folder


def add_humans(data):
    rows = [("juice", 0, 2), ("juice", 1, 2), ("juice", 2, 0), ("bread", 3, 2)]
    rows += [("soap", 2, 1), ("soap", 2, 2)]  # two people: the mean of 1.5 is rounded up
    query, product, label = zip(*rows, strict=True)
    relevance = {"query": query, "product_id": product, "label": label, "source": ["human"] * 6}
    more = {"query": ["juice"], "product_id": [3], "label": [2], "source": ["derived"]}
    tables = [pa.table(relevance), pa.table(more)]
    pq.write_table(pa.concat_tables(tables), data / "relevance.parquet")


def add_impressions(data):
    shown = [(1, "juice", 0), (1, "juice", 3), (2, "juice", 0), (3, "bread", 3), (3, "bread", 0)]
    shown += [(4, "tea", 1), (5, "soap", 0), (5, "soap", 3)]
    request, query, product = zip(*shown, strict=True)
    table = {"request_id": request, "query": query, "product_id": product}
    pq.write_table(pa.table(table), data / "impressions.parquet")


def test_parts_hold_what_is_graded(labels):
    assert part_state(part_path(labels, 0)).pairs == 3
    state = part_state(part_path(labels, 1))
    assert (state.pairs, state.ungraded) == (3, 1)
    assert part_state(part_path(labels, 2)).pairs == 0
    _, last = read_parts(labels, SCHEMA.names)
    assert last.column("product_id").to_pylist() == [2, 0]
    assert last.column("probability").to_pylist() == [pytest.approx(0.7), None]
    assert last.column("probabilities").to_pylist()[1] is None
    assert last.column("source").to_pylist() == ["llm"] * 2


def test_an_endpoint_tells_of_one_label_only(tmp_path):
    probability = np.array([[np.nan, 0.75, np.nan]], np.float32)
    grades = Grades(position=np.arange(1), label=np.array([1], np.int8), probability=probability)
    pairs = pa.table({"query": ["juice"], "product_id": [0]})
    write_part(part_path(tmp_path, 0), pairs, grades, Namer())
    (row,) = pq.read_table(part_path(tmp_path, 0)).to_pylist()
    assert (row["probability"], row["probabilities"]) == (0.75, [None, 0.75, None])


def test_a_foreign_part_is_refused(tmp_path, labels):
    table = pq.read_table(part_path(labels, 0)).replace_schema_metadata(None)
    pq.write_table(table, part_path(tmp_path, 0))
    with pytest.raises(BadInputError, match=r"part-00000\.parquet: was not written by"):
        part_state(part_path(tmp_path, 0))


def test_the_summary_is_of_all_parts(labels):
    found = summary(labels)
    assert found["labelled"] == 5
    assert list(found["labels"].values()) == [2, 1, 2]
    probability = found["probability"]
    assert probability["known"] == 4
    assert probability["mean"] == pytest.approx((0.9 + 0.6 + 0.8 + 0.7) / 4)
    assert probability["p10"] == pytest.approx(0.6, abs=1e-3)
    assert probability["p50"] == pytest.approx(0.7, abs=1e-3)
    assert probability["p90"] == pytest.approx(0.9, abs=1e-3)
    assert list(probability["mean_by_label"].values()) == pytest.approx([0.8, 0.6, 0.8])


def test_all_that_there_is_to_tell(tmp_path, data, labels):
    add_humans(data)
    add_impressions(data)
    output = tmp_path / "report"
    content = report(Report(labels=labels, data=data, output=output), "the <command>")
    assert json.loads((output / "report.json").read_text()) == content
    assert (content["folder"], content["data"]) == (str(labels), str(data))
    found = content["distribution"]
    assert list(found["model"].values()) == [2, 1, 2]
    assert list(found["human"].values()) == [1, 0, 4]
    assert (found["queries"], found["products"]) == (2, 3)
    assert sum(map(sum, found["histogram"].values())) == 4
    assert found["histogram"]["irrelevant"][16] == 1  # 0.8 lies in [0.8, 0.85)
    # Searches 1 and 2 are for juice, 3 for bread, 4 for tea, 5 for soap.
    assert content["coverage"]["searches"] == {
        "total": 5,
        "human": 4 / 5,
        "model": 3 / 5,
        "both": 3 / 5,
        "any": 4 / 5,
    }
    # Juice 0 (twice) by both, bread 3 by humans, soap 0 by the model.
    assert content["coverage"]["impressions"] == {
        "total": 8,
        "human": 3 / 8,
        "model": 3 / 8,
        "both": 2 / 8,
        "any": 4 / 8,
    }
    human, model = [2, 2, 0, 2], [2, 1, 0, 2]
    disagreement = content["disagreement"]
    assert disagreement["pairs"] == 4
    assert disagreement["confusion"] == [[1, 0, 0], [0, 0, 0], [0, 1, 2]]
    assert disagreement["accuracy"] == 0.75
    assert disagreement["kappa"] == pytest.approx(cohen_kappa_score(human, model))
    assert disagreement["quadratic_kappa"] == pytest.approx(
        cohen_kappa_score(human, model, weights="quadratic")
    )
    frequent = content["frequent_queries"]
    assert [query["query"] for query in frequent] == ["juice", "bread", "soap", "tea"]
    assert frequent[0] == {
        "query": "juice",
        "searches": 2,
        "pairs": 2,
        "labelled": 1,
        "labels": {"irrelevant": 0, "moderately relevant": 0, "highly relevant": 1},
    }
    assert content["sample"]["humans disagree"] == [
        {
            "query": "juice",
            "title": TITLES[1],
            "label": 1,
            "human": 2,
            "probability": pytest.approx(0.6),
        }
    ]
    sure = content["sample"]["highly relevant, most sure"]
    assert sorted(pair["title"] for pair in sure) == ["apple juice", "soap"]
    page = (output / "report.html").read_text()
    assert "orange &lt;b&gt;juice" in page
    assert "the &lt;command&gt;" in page
    assert "http" not in re.sub(r"<code>.*?</code>", "", page, flags=re.DOTALL)
    assert page.count("<svg") == 3
    assert "Labelling has not come to an end." in page


def test_a_dataset_of_a_catalog_alone(tmp_path, data, labels, capsys):
    (labels / "labels.json").write_text(
        json.dumps({"complete": True, "ungraded": 1, "labelled": 5, "pairs": 6})
    )
    arguments = ["report", "--labels", labels, "--data", data, "--output", tmp_path / "report"]
    assert main(list(map(str, arguments))) == 0
    assert "irrelevant" in (shown := capsys.readouterr()).out
    assert "40.0%" in shown.out
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert content["coverage"] is content["disagreement"] is content["frequent_queries"] is None
    assert content["distribution"]["human"] is None
    assert "humans disagree" not in content["sample"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "1 further pairs have no label" in page


def test_labels_without_probability(tmp_path, data):
    folder = tmp_path / "labels"
    write_labels(folder, [("juice", 0, 2, None), ("juice", 1, 0, None)])
    content = report(Report(labels=folder, data=data, output=tmp_path / "report"))
    assert content["probability"] is None
    assert content["distribution"]["histogram"] is None
    assert list(content["sample"]) == ["irrelevant, any", "highly relevant, any"]
    assert "Not recorded." in (tmp_path / "report" / "report.html").read_text()


def test_the_sample_is_drawn_by_the_seed(tmp_path, data):
    folder = tmp_path / "labels"
    write_labels(folder, [(f"query {i:03}", i % 4, 1, 0.5 + i / 1000) for i in range(400)])

    with LabelTables.open(folder, data, read_catalog(data), tmp_path) as tables:
        one, again, other = (tables.sample(seed) for seed in (0, 0, 1))
    assert one == again != other
    most, least = (one[f"moderately relevant, {end} sure"] for end in ("most", "least"))
    assert all(pair["query"] >= "query 200" for pair in most)
    assert all(pair["query"] < "query 200" for pair in least)
    assert len({pair["query"] for pair in least}) == 6


def test_a_folder_without_labels_is_named(tmp_path, data):
    with pytest.raises(BadInputError, match="elsewhere: holds no labels; `label-relevance label`"):
        report(Report(labels=tmp_path / "elsewhere", data=data, output=tmp_path / "report"))
    write_labels(tmp_path / "labels", [("soap", 3, UNGRADED, None)])
    with pytest.raises(BadInputError, match="labels: its files hold no label"):
        report(Report(labels=tmp_path / "labels", data=data, output=tmp_path / "report"))
    assert not (tmp_path / "report" / "report.html").exists()
