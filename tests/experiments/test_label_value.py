"""What labels of a model are worth, on a small dataset with a grader that knows a rule."""

import json

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from tiny_dashclip import tiny_catalog, tiny_dashclip

from embeddings.catalog import read_catalog
from embeddings.config import AlignmentConfig, CroppingConfig, DashClipTraining, StartConfig
from embeddings.labeling.grades import Grades
from embeddings.labeling.options import Split
from embeddings.labeling.split import split
from embeddings.relevance import read_relevance, split_queries
from experiments.label_value import Trainings, label_value, main
from experiments.label_value_pairs import choose_pairs
from experiments.label_value_scores import METRICS, Scores, differences, figures
from features.config_file import to_toml
from features.errors import BadInputError
from features.files import fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:.*distutils:DeprecationWarning")  # tensorboard

HELD_OUT = 0.5


class Rule:
    """Grades by the words that query and title share."""

    model = "rule"
    prompt_version = ""
    fingerprint = "rule-1"
    chunk_pairs = 16

    def grade(self, pairs):
        shared = [
            len({*query.split()} & {*title.split()}) * 2 // len(query.split())
            for query, title in zip(pairs.queries, pairs.titles, strict=True)
        ]
        probability = np.eye(3, dtype=np.float32)[shared]
        yield Grades(
            position=np.arange(len(pairs)),
            label=np.array(shared, np.int8),
            probability=probability,
        )


@pytest.fixture
def data(tmp_path):
    """A dataset of which people graded two pairs in five."""
    folder = tiny_catalog(tmp_path / "data", images=False)
    table = pq.read_table(folder / "relevance.parquet")
    table = table.set_column(3, "source", [["human"] * len(table)])
    kept = np.random.default_rng(0).random(len(table)) < 0.4
    pq.write_table(table.filter(kept), folder / "relevance.parquet")
    return folder


@pytest.fixture
def config(tmp_path):
    return DashClipTraining(
        start=StartConfig(checkpoint=str(tiny_dashclip(tmp_path / "tiny", images=False))),
        cropping=CroppingConfig(epochs=1, batch=8),
        alignment=AlignmentConfig(epochs=1, batch=8, learning_rate=1e-3, mined_products=0),
        held_out_queries=HELD_OUT,
        precision="float32",
        threads=1,
    )


def split_of(data, folder, *, held_out=HELD_OUT):
    split(Split(data=data, output=folder, held_out_queries=held_out))
    return folder


def test_pairs_are_those_that_searching_shows_and_nobody_graded(data):
    catalog = read_catalog(data)
    training, held_out = split_queries(read_relevance(data, catalog), held_out=HELD_OUT)
    pairs = choose_pairs(catalog, training, products=5)
    queries = pairs["query"].to_pylist()
    assert sorted(set(queries)) == training.judged_queries()
    assert not set(queries) & set(held_out.judged_queries())
    assert set(pc.value_counts(pairs["query"]).field("counts").to_pylist()) == {5}
    chosen = list(zip(queries, pairs["product_id"].to_pylist(), strict=True))
    graded = {
        (training.queries[query], 1000 + product)
        for query, product in zip(training.query.tolist(), training.product.tolist(), strict=True)
    }
    assert len(set(chosen)) == len(chosen)
    assert not set(chosen) & graded
    # The best that BM25 finds comes first: the title that is the query, where nobody graded it.
    titles = dict(zip(range(1000, 1024), catalog.titles.to_pylist(), strict=True))
    for query in training.judged_queries():
        same = [(query, product) for product, title in titles.items() if title == query]
        if same and same[0] not in graded:
            assert chosen[queries.index(query)] == same[0]
    # What people graded of a query is left out, so that in the end nothing remains of it.
    everything = choose_pairs(catalog, training, products=24)
    assert len(everything) == 24 * len(training.judged_queries()) - len(training)


def test_arms_are_trained_alike_compared_and_kept(data, config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("embeddings.labeling.label.open_grader", lambda *_: Rule())
    monkeypatch.setattr("experiments.label_value_scores._SPLITS", 1)
    parts, grader, output = split_of(data, tmp_path / "split"), tmp_path / "g", tmp_path / "out"
    toml = tmp_path / "config.toml"
    toml.write_text(to_toml(config))
    arguments = ["label_value", "--data", data, "--split", parts, "--grader", grader]
    arguments += ["--output", output, "--seeds", 0, "--products", 4, "--config", toml]
    monkeypatch.setattr("sys.argv", [str(argument) for argument in arguments])
    assert main() == 0
    shown = capsys.readouterr().out
    document = json.loads((output / "label_value.json").read_text())
    arms = {arm["name"]: arm for arm in document["arms"]}
    assert list(arms) == ["no labels", "human", "model", "human and model"]
    relevance = read_relevance(data, read_catalog(data))
    training, held_out = split_queries(relevance, held_out=HELD_OUT)
    queries = training.judged_queries()
    assert document["labels"]["pairs"] == sum(document["labels"]["labels"]) == 4 * len(queries)
    assert document["labels"]["models"] == ["rule"]
    pairs = [arms[name]["training"]["pairs"] for name in ("human", "model", "human and model")]
    assert pairs == [len(training), 4 * len(queries), len(training) + 4 * len(queries)]
    # No arm takes more steps than another.
    trained = {name: arm["training"] for name, arm in arms.items() if arm["training"]}
    tuples = trained["human"]["tuples_an_epoch"]
    for found in trained.values():
        assert found["queries"] == len(queries)
        most = min(tuples, found["tuples_an_epoch"])
        assert found["tuples_trained_on"] == most // 8 * 8
    assert trained["human and model"]["tuples_an_epoch"] > tuples
    assert document["pairs"] == len(held_out)
    for arm in arms.values():
        assert len(arm["graded_relevance"]["values"]) == 1
        assert 0 <= arm["relevance_f1"]["mean"] <= 1
    [first, *_] = document["differences"]
    assert (first["of"], first["to"]) == ("human and model", "human")
    means = [arms[name]["ndcg"]["mean"] for name in ("human and model", "human")]
    assert first["ndcg"]["lift"] == pytest.approx(means[0] - means[1])
    low, high = first["ndcg"]["interval"]
    assert low < first["ndcg"]["lift"] < high
    assert "human and model" in shown
    markdown = (output / "label_value.md").read_text()
    assert "| human and model − human |" in markdown  # noqa: RUF001
    assert f"`python -m experiments.label_value --data {data}" in markdown
    assert f"The model labelled {4 * len(queries)} pairs" in markdown

    # Again: nothing is trained nor measured.
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    kept = fingerprint(*output.glob("*/evaluation.json"), *output.glob("*/training.json"))
    assert main() == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert kept == fingerprint(*output.glob("*/evaluation.json"), *output.glob("*/training.json"))
    again = json.loads((output / "label_value.json").read_text())
    assert again == document
    capsys.readouterr()
    arguments[arguments.index("--products") + 1] = 3
    monkeypatch.setattr("sys.argv", [str(argument) for argument in arguments])
    assert main() == 2
    assert "labels: was begun with another choice of pairs" in capsys.readouterr().err


def test_a_split_that_leaks_is_refused(data, config, tmp_path):
    trainings = Trainings(data, tmp_path / "out", config)
    trainings.refuse_leaks(split_of(data, tmp_path / "split"))
    leaking = split_of(data, tmp_path / "leaking", held_out=0)
    said = r"leaking: its part 'fine_tuning' holds \d+ queries that are held out from the training"
    with pytest.raises(BadInputError, match=said):
        trainings.refuse_leaks(leaking)
    with pytest.raises(BadInputError, match="different numbers, got \\[1, 1\\]"):
        label_value(data, tmp_path / "out", split=leaking, grader=tmp_path, seeds=(1, 1))
    with pytest.raises(BadInputError, match="products must be 1 or more, got 0"):
        label_value(data, tmp_path / "out", split=leaking, grader=tmp_path, products=0)


def scores(retrieval, f1):
    relevance = {"relevance_f1": f1, "relevance_f1_with_cosine": f1, "relevance_auc": f1}
    return Scores(retrieval={name: np.array(retrieval) for name in METRICS}, relevance=relevance)


def test_differences_pair_seeds_and_queries():
    base = {0: scores([0.0, 0.5, 1.0], 0.5), 1: scores([0.2, 0.4, 0.9], 0.7)}
    arm = {0: scores([0.1, 0.6, 1.1], 0.6), 1: scores([0.3, 0.5, 1.0], 0.9)}
    assert figures(base)["ndcg"]["values"] == pytest.approx([0.5, 0.5])
    found = differences(arm, base)
    # Each query of each seed gains a tenth: nothing is left to chance.
    assert found["recall"]["lift"] == pytest.approx(0.1)
    assert found["recall"]["interval"] == pytest.approx((0.1, 0.1))
    # 0.1 and 0.2: mean 0.15, standard error 0.05, one degree of freedom (12.706).
    assert found["relevance_f1"]["lift"] == pytest.approx(0.15)
    assert found["relevance_f1"]["interval"] == pytest.approx(
        (0.15 - 0.6353, 0.15 + 0.6353), abs=1e-4
    )
    assert found["relevance_f1"]["sampling_error"] == 0
    one = differences({0: arm[0]}, {0: base[0]})
    assert one["relevance_f1"]["interval"] is None
    assert one["relevance_f1"]["lift"] == pytest.approx(0.1)
