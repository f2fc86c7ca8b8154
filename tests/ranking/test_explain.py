"""``explain-ranker`` on runs of the tiny dataset."""

import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_dataset import write_tiny_dataset
from tiny_ranker import tiny_config

from features.batch import RequestBatch
from features.errors import BadInputError
from features.requests import build_requests
from ranking.attribution_groups import EMBEDDINGS
from ranking.bundle import Bundle
from ranking.explain import ExplainConfig, explain_ranker
from ranking.explain_cli import main
from ranking.explain_sample import SLICES, Week, draw_sample, keep_candidates, telling_request
from ranking.explain_tables import importance_table, paper_table, reasons
from ranking.run import train_ranker

FEATURES = {
    *("store", "hour", "query_type", "aisles_bought"),
    *("product", "brand", "price", "title_match"),
}
METHODS = ("auc_loss", "log_loss_rise", "integrated_gradients", "feature_ablation")


@pytest.fixture(scope="module")
def run(ranker_data, random_tables, tmp_path_factory):
    """A complete two-tower run; read only."""
    output = tmp_path_factory.mktemp("explained") / "run"
    train_ranker(ranker_data, output, tables=random_tables, config=tiny_config())
    return output


@pytest.fixture(scope="module")
def dcn(ranker_data, tmp_path_factory):
    """A complete run of the DCN baseline; read only."""
    output = tmp_path_factory.mktemp("explained") / "dcn"
    train_ranker(ranker_data, output, config=tiny_config(embedding_tower=False))
    return output


@pytest.fixture(scope="module")
def explained(run, ranker_data, tmp_path_factory):
    """The output of the command, and what it printed."""
    output = tmp_path_factory.mktemp("explained") / "importance"
    config = ExplainConfig(sample=70, permutations=3)
    document = explain_ranker(run, ranker_data, output, config, command="explain-ranker --seed 0")
    return output, document


def explain(run, data, output, **changes):
    config = ExplainConfig(**{"sample": 60, "permutations": 2} | changes)
    return explain_ranker(run, data, output, config)


def command(*arguments):
    return main([str(argument) for argument in arguments])


# What it says.


def test_the_document_has_every_group_by_every_method(explained):
    output, document = explained
    assert json.loads((output / "importance.json").read_text()) == document
    groups = document["groups"]
    assert {group["group"] for group in groups} == FEATURES | set(EMBEDDINGS)
    for method in METHODS:
        values = [group[method] for group in groups]
        ranks = [group["ranks"][method] for group in groups]
        assert ranks == [1 + sum(other > value for other in values) for value in values]
    for group in groups:
        for method in METHODS[:2]:
            low, high = group[f"{method}_interval"]
            assert low <= group[method] <= high
    assert [group["ranks"]["auc_loss"] for group in groups] == sorted(
        group["ranks"]["auc_loss"] for group in groups
    )
    assert document["requests"] == 70
    assert document["incompleteness"] < 0.05
    assert document["intervals"].startswith("95 %, over users")


def test_what_makes_clicks_likely_counts_most(explained):
    _, document = explained
    # Clicks of the tiny dataset follow the match of title and query most of all.
    assert document["groups"][0]["group"] == "title_match"
    assert document["groups"][0]["auc_loss_interval"][0] > 0.02


def test_the_paper_s_features_are_named_with_their_ranks(explained):
    _, document = explained
    groups = {group["group"]: group for group in document["groups"]}
    assert list(document["paper_ranks"]) == list(EMBEDDINGS)
    for place, name in enumerate(EMBEDDINGS, 1):
        found = document["paper_ranks"][name]
        assert found == {"paper": place, "group": name, "ranks": groups[name]["ranks"]}
    assert [row[:2] for row in paper_table(document).rows] == [
        ["query embedding", "1"],
        ["product embedding", "2"],
        ["purchase history", "3"],
    ]


def test_agreement_is_that_of_the_ranks(explained):
    _, document = explained
    assert len(document["agreement"]) == 6
    count = len(document["groups"])
    for pair in document["agreement"]:
        first, second = (
            np.array([group["ranks"][method] for group in document["groups"]])
            for method in pair["methods"]
        )
        assert pair["groups"] == count
        if len(set(first)) == len(set(second)) == count:  # without ties
            squares = ((first - second) ** 2).sum()
            expected = 1 - 6 * squares / (count * (count**2 - 1))
            assert pair["spearman"] == pytest.approx(expected)
            turns = np.sign(first[:, None] - first) * np.sign(second[:, None] - second)
            assert pair["kendall"] == pytest.approx(turns.sum() / (count * (count - 1)))


def test_one_request_is_explained(explained, run, ranker_data):
    _, document = explained
    request = document["request"]
    week = pq.read_table(ranker_data / "requests" / "week-0006.parquet")
    place = week["request_id"].to_pylist().index(request["request_id"])
    record = week.slice(place, 1)
    row = record.to_pylist()[0]
    bundle = Bundle.open(run / "bundle")
    batch = bundle.ranker.encode(RequestBatch.from_records(record, bundle.schema))
    logits = bundle.ranker(batch).detach().numpy()
    order = np.argsort(-logits)
    candidates = request["candidates"]
    assert [c["product_id"] for c in candidates] == [row["product_id"][i] for i in order]
    assert [c["clicked"] for c in candidates] == [row["clicked"][i] for i in order]
    assert any(c["clicked"] for c in candidates)
    assert request["purchases_in_history"] == len(row["purchase_history"]) > 0
    probability = torch.sigmoid(torch.from_numpy(logits[order]))
    assert [c["probability"] for c in candidates] == pytest.approx(probability.tolist(), abs=1e-6)
    sums = [sum(c["contributions"].values()) for c in candidates]
    assert sums == pytest.approx((logits[order] - logits.mean()).tolist(), abs=0.15)
    catalog = pq.read_table(ranker_data / "catalog.parquet")
    titles = dict(zip(*(catalog[n].to_pylist() for n in ("product_id", "title")), strict=True))
    assert [c["title"] for c in candidates] == [titles[c["product_id"]] for c in candidates]
    first = order[0]
    assert candidates[0]["values"]["title_match"] == row["title_match"][first]
    best = reasons(candidates[0], 2)
    assert best[0][1] == max(candidates[0]["contributions"].values(), key=abs)


def test_the_request_that_is_asked_for(run, ranker_data, tmp_path):
    week = pq.read_table(ranker_data / "requests" / "week-0006.parquet")
    wanted = week["request_id"][7].as_py()
    document = explain(run, ranker_data, tmp_path, request=wanted)
    assert document["request"]["request_id"] == wanted


def test_the_seed_and_nothing_else_decides(run, ranker_data, tmp_path):
    torch.manual_seed(1)
    first = explain(run, ranker_data, tmp_path / "1", seed=4)
    torch.manual_seed(2)
    assert explain(run, ranker_data, tmp_path / "2", seed=4) == first
    pages = [(tmp_path / name / "report.html").read_bytes() for name in "12"]
    assert pages[0] == pages[1]
    assert explain(run, ranker_data, tmp_path / "3", seed=5)["groups"] != first["groups"]


def test_features_taken_together(run, ranker_data, tmp_path):
    wanted = ("query=query embedding,query_type",)
    document = explain(run, ranker_data, tmp_path, groups=wanted)
    names = {group["group"] for group in document["groups"]}
    assert names == FEATURES - {"query_type"} | {"query", "product embedding", "purchase history"}
    assert document["paper_ranks"]["query embedding"]["group"] == "query"
    assert paper_table(document).rows[0][0] == "query embedding (in 'query')"


def test_a_ranker_without_embeddings(dcn, ranker_data, tmp_path):
    document = explain(dcn, ranker_data, tmp_path)
    assert {group["group"] for group in document["groups"]} == FEATURES
    assert document["paper_ranks"] == {}
    assert "Not in this model: query embedding, product embedding" in paper_table(document).note
    assert "none in this model" in (tmp_path / "report.html").read_text()


def test_a_week_that_was_trained_on_is_said(run, ranker_data, tmp_path):
    document = explain(run, ranker_data, tmp_path, week=5)
    assert document["week_was_trained_on"]
    assert "Week 5 was trained on" in (tmp_path / "report.html").read_text()


# The sample.


def test_slices(run, ranker_data):
    week = Week.open(run, ranker_data)
    records = week.records()
    history = records["purchase_history"].to_pylist()
    everything = draw_sample(week, records, "all", 10_000, 0)
    assert len(everything.records) == len(records) == everything.slice_requests
    with_history = draw_sample(week, records, "with_history", 10_000, 0)
    assert len(with_history.records) == sum(bool(items) for items in history)
    assert (with_history.batch.history_lengths > 0).all()
    thirds = [
        draw_sample(week, records, f"{name}_history", 10_000, 0).batch.history_lengths
        for name in ("short", "middle", "long")
    ]
    assert sum(len(lengths) for lengths in thirds) == len(with_history.records)
    assert thirds[0].max() < thirds[1].min() <= thirds[1].max() < thirds[2].min()
    with pytest.raises(BadInputError, match="unknown slice 'nobody'; known: all, with_history"):
        draw_sample(week, records, "nobody", 10, 0)
    assert len(SLICES) == 7


def test_unseen_products_are_those_that_training_never_showed(
    run, ranker_data, tmp_path, monkeypatch
):
    week = Week.open(run, ranker_data)
    shown = [
        pq.read_table(ranker_data / "requests" / f"week-000{n}.parquet", columns=["product_id"])
        for n in range(1, 6)
    ]
    products = pa.concat_tables(shown)["product_id"].combine_chunks().flatten().unique()
    assert set(week.products_seen().tolist()) == set(products.to_pylist())
    monkeypatch.setattr(Week, "products_seen", lambda _: np.arange(1000, 1140))
    records = week.records()
    sample = draw_sample(week, records, "unseen_products", 10_000, 0)
    assert sample.batch.product.min() >= 1140
    expected = sum(product >= 1140 for row in records["product_id"].to_pylist() for product in row)
    assert len(sample.batch.product) == expected == len(sample.user_c)
    assert (sample.batch.lengths > 0).all()


def test_candidates_that_are_kept_keep_what_they_have(run, ranker_data):
    week = Week.open(run, ranker_data)
    records = week.records().slice(0, 3)
    batch = RequestBatch.from_records(records, week.bundle.schema)
    kept = np.arange(len(batch.product)) % 2 == 0
    found = keep_candidates(batch, kept)
    ends = [0, *batch.lengths.cumsum(0).tolist()]
    assert found.lengths.tolist() == [kept[first:last].sum() for first, last in pairwise(ends)]
    assert found.product.tolist() == batch.product[::2].tolist()
    dense = batch.candidate_dense[:, ::2]
    torch.testing.assert_close(found.candidate_dense, dense, rtol=0, atol=0, equal_nan=True)
    assert found.query.equal(batch.query)


def test_the_request_to_tell_has_a_click_and_a_history(run, ranker_data):
    week = Week.open(run, ranker_data)
    sample = draw_sample(week, week.records(), "all", 50, 3)
    rows = sample.records.to_pylist()
    expected = next(row for row in rows if any(row["clicked"]) and row["purchase_history"])
    assert telling_request(sample)["request_id"][0].as_py() == expected["request_id"]


# The page.


class Targets(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.targets = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.targets += [v for n, v in attrs if n in ("src", "srcset", "href", "xlink:href")]


def test_the_page_stands_alone_and_says_where_it_is_from(explained):
    output, document = explained
    html = (output / "report.html").read_text()
    page = Targets()
    page.feed(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert all(target.startswith("#") for target in page.targets)
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert html.count("<svg") == 4
    assert html.startswith("<!DOCTYPE html>")
    for text in (
        "generated for tests",
        "explain-ranker --seed 0",
        document["data_fingerprint"],
        document["versions"]["torch"],
        "70 of 78 requests",
        str(document["request"]["request_id"]),
        *(cell for cell in importance_table(document).rows[0]),
    ):
        assert text in html
    assert not re.search(r"\b(nan|inf)\b", html)


# The command.


def test_the_command_writes_beside_the_run(run, ranker_data, capsys):
    status = command("--run", run, "--data", ranker_data, "--sample", 60, "--permutations", 2)
    assert status == 0
    printed = capsys.readouterr()
    assert "title_match" in printed.out
    assert "purchase history" in printed.out
    assert "Spearman" in printed.out
    assert "generated for tests" in printed.err
    assert {p.name for p in (run / "importance").iterdir()} == {"importance.json", "report.html"}
    shutil.rmtree(run / "importance")


def refused(capsys, *arguments):
    assert command(*arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message.removeprefix("explain-ranker: ")


def test_bad_input_is_one_sentence_and_writes_nothing(run, ranker_data, tmp_path, capsys):
    where = ("--run", run, "--data", ranker_data, "--output", tmp_path / "out")
    assert refused(capsys, *where, "--groups", "q=query_kind").startswith(
        "group 'q': unknown feature 'query_kind'; known: store, hour, query_type, "
    )
    assert "unknown slice 'new'; known: all, " in refused(capsys, *where, "--slice", "new")
    assert "week 6: holds no request 77" in refused(capsys, *where, "--request", "77")
    assert "holds no week 60" in refused(capsys, *where, "--week", "60")
    assert "'permutations' must be 2 or more, got 1" in refused(
        capsys, *where, "--permutations", "1"
    )
    message = refused(capsys, *where, "--slice", "without_history")
    assert re.search(r"slice 'without_history' has too few clicks: \d+ among \d+", message)
    message = refused(capsys, *where, "--sample", "2")
    assert re.search(r"too few clicks: \d+ among \d+ .*; draw more with --sample", message)
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_not_finished(run, ranker_data, tmp_path, capsys):
    unfinished = tmp_path / "run"
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("bundle", "metrics.json"))
    message = refused(capsys, "--run", unfinished, "--data", ranker_data)
    assert "is not a finished run of train-ranker" in message
    assert "is not a finished run" in refused(capsys, "--run", tmp_path / "no", "--data", "x")


def test_other_data_than_the_run_s(run, tmp_path, capsys):
    other = write_tiny_dataset(tmp_path / "other", seed=1)
    missing = refused(capsys, "--run", run, "--data", other)
    assert "holds no finished request records" in missing
    build_requests(other, other / "requests")
    message = refused(capsys, "--run", run, "--data", other)
    assert "the data of these request records" in message
    assert str(run) in message


def test_records_of_another_window(run, ranker_data, tmp_path: Path, capsys):
    other = tmp_path / "data"
    shutil.copytree(ranker_data, other, ignore=shutil.ignore_patterns("requests"))
    build_requests(other, other / "requests", window_days=7)
    message = refused(capsys, "--run", run, "--data", other)
    assert "the history window of these request records (7) is not what" in message
