import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from experiments.paired_test import auc_estimate, compare, mean_over_weeks
from experiments.ranking_results import EvaluationWeek, VariantResult
from experiments.ranking_table import write_results
from features.errors import BadInputError

WEEKS = (45, 53)
ROW_KEYS = {
    *("variant", "slice", "auc_mean", "auc_std", "normalized_log_loss_mean"),
    *("normalized_log_loss_std", "auc_lift", "interval", "p_value", "seeds", "rows", "positives"),
}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def simulated(seeds=3):
    """Return two weeks and three variants: a baseline, a better and a worse one.

    Requests without history have about 25 clicks a week, unseen products about 5.
    """
    rng = np.random.default_rng(3)
    weeks, odds = [], {}
    for number in WEEKS:
        lengths = rng.integers(1, 12, 600)
        rows = int(lengths.sum())
        odds[number] = rng.normal(-2, 1.5, rows)
        weeks.append(
            EvaluationWeek(
                week=number,
                clicked=rng.random(rows) < sigmoid(odds[number]),
                lengths=lengths,
                user_id=rng.integers(0, 90, 600) * 7,
                history_lengths=np.where(np.arange(600) % 24 == 0, 0, rng.integers(1, 90, 600)),
                product_seen=np.arange(rows) % 120 > 0,
            )
        )

    def variant(name, title, baseline, noise, facts):
        scores = {
            week: sigmoid(value + noise * rng.normal(size=(seeds, len(value)))).astype(np.float32)
            for week, value in odds.items()
        }
        return VariantResult(
            name=name,
            title=title,
            baseline=baseline,
            probability=scores,
            seeds=tuple(range(seeds)),
            facts=facts,
        )

    facts = {"rows_per_second": 88_000.4, "parameters": 3_200_000, "model_bytes": 12_900_000}
    return weeks, [
        variant("dcn", "DCN baseline", None, 1.0, facts),
        variant("history", "DCN + <b>history</b> | all", "dcn", 0.6, facts),
        variant("random", "random initialization", "history", 1.5, {}),
    ]


def write(output, weeks, variants, **changes):
    about = {
        "dataset": "tiny",
        "caveat": "Simulated; a click is a purchase.",
        "command": "benchmark-ranking --data 'a b'",
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
        "data_fingerprint": "d" * 64,
        "comparisons": [("random", "dcn")],
    }
    write_results(output, weeks=weeks, variants=variants, **{**about, **changes})
    return json.loads((output / "ranking.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def results():
    return simulated()


@pytest.fixture(scope="module")
def folder(results, tmp_path_factory):
    output = tmp_path_factory.mktemp("ranking") / "results"
    write(output, *results)
    return output


@pytest.fixture(scope="module")
def document(folder):
    return json.loads((folder / "ranking.json").read_text(encoding="utf-8"))


def find(document, variant, part, rows="rows"):
    (row,) = (r for r in document[rows] if (r["variant"], r["slice"]) == (variant, part))
    return row


def test_every_variant_has_a_row_on_every_slice(document):
    slices = ["all", "with_history", "without_history", "unseen_products", "short_history"]
    slices += ["middle_history", "long_history", "week_45", "week_53"]
    expected = [(part, variant) for part in slices for variant in ("dcn", "history", "random")]
    assert [(row["slice"], row["variant"]) for row in document["rows"]] == expected
    assert all(set(row) >= ROW_KEYS for row in document["rows"])
    assert document["dataset"] == "tiny"
    assert list(document)[:2] == ["dataset", "rows"]


def test_figures_are_means_over_weeks_by_seed_then_over_seeds(document, results):
    weeks, (_, variant, _) = results
    by_seed = {"auc": [], "precision": [], "calibration": []}
    for seed in range(3):
        scores = [(week.clicked, variant.probability[week.week][seed]) for week in weeks]
        by_seed["auc"].append(np.mean([roc_auc_score(*pair) for pair in scores]))
        by_seed["precision"].append(np.mean([average_precision_score(*pair) for pair in scores]))
        by_seed["calibration"].append(np.mean([p.mean() / y.mean() for y, p in scores]))
    row = find(document, "history", "all")
    assert row["auc_mean"] == pytest.approx(np.mean(by_seed["auc"]))
    assert row["auc_std"] == pytest.approx(np.std(by_seed["auc"], ddof=1))
    assert row["average_precision"] == pytest.approx(np.mean(by_seed["precision"]))
    assert row["calibration"] == pytest.approx(np.mean(by_seed["calibration"]), rel=1e-5)
    assert row["rows"] == sum(len(week.clicked) for week in weeks)
    assert row["positives"] == sum(int(week.clicked.sum()) for week in weeks)
    assert row["seeds"] == 3
    assert row["model_bytes"] == 12_900_000


def test_lift_is_tested_over_the_weeks_together(document, results):
    weeks, variants = results
    users = np.unique(np.concatenate([week.user_id for week in weeks]))
    sides = []
    for variant in variants[1::-1]:
        estimates = []
        for week in weeks:
            user = np.searchsorted(users, np.repeat(week.user_id, week.lengths))
            scores = variant.probability[week.week]
            estimates.append(auc_estimate(week.clicked, scores, user, len(users), (0, 1, 2)))
        sides.append(mean_over_weeks(estimates))
    expected = compare(*sides)
    row = find(document, "history", "all")
    assert row["vs"] == "dcn"
    assert row["auc_lift"] == pytest.approx(expected.lift)
    assert row["interval"] == pytest.approx(expected.interval)
    assert row["p_value"] == pytest.approx(expected.p_value)
    assert row["auc_sampling_error"] == pytest.approx(expected.sampling_error)
    assert row["auc_training_error"] == pytest.approx(expected.training_error)
    assert row["auc_lift"] > 0 > row["normalized_log_loss_lift"]
    assert row["normalized_log_loss_interval"][1] < 0


def test_a_baseline_has_no_lift_and_another_baseline_is_named(document):
    row = find(document, "dcn", "all")
    assert [row[key] for key in ("vs", "auc_lift", "interval", "p_value")] == [None] * 4
    assert find(document, "random", "all")["vs"] == "history"
    other = find(document, "random", "all", "comparisons")
    assert other["vs"] == "dcn"
    lifts = [find(document, name, "all")["auc_lift"] for name in ("history", "random")]
    assert other["auc_lift"] == pytest.approx(sum(lifts))


def test_a_slice_with_too_few_clicks_in_a_week_is_pooled(document, results):
    weeks, (baseline, *_) = results
    clicked, scores = [], []
    for week in weeks:
        rows = np.repeat(week.history_lengths == 0, week.lengths)
        clicked.append(week.clicked[rows])
        scores.append(baseline.probability[week.week][:, rows])
    counts = [int(part.sum()) for part in clicked]
    assert min(counts) < 30 <= sum(counts)
    pooled = np.concatenate(scores, axis=1)
    row = find(document, "dcn", "without_history")
    expected = [roc_auc_score(np.concatenate(clicked), score) for score in pooled]
    assert row["auc_mean"] == pytest.approx(np.mean(expected))
    (about,) = (part for part in document["slices"] if part["name"] == "without_history")
    assert about["pooled"]
    assert about["shortage"] == ""


def test_a_slice_with_too_few_clicks_says_so_and_has_no_figure(document, folder):
    row = find(document, "history", "unseen_products")
    counts = {"rows": row["rows"], "positives": row["positives"]}
    assert 0 < counts["positives"] < 30
    for key in ("auc_mean", "auc_std", "normalized_log_loss_mean", "auc_lift", "interval"):
        assert row[key] is None
    text = f"too few clicks: {counts['positives']}"
    for name in ("ranking.md", "report.html"):
        assert (folder / name).read_text(encoding="utf-8").count(text) == 6  # twice a variant


def test_a_week_by_itself_is_that_week(document, results):
    weeks, (baseline, *_) = results
    scores = baseline.probability[53]
    expected = np.mean([roc_auc_score(weeks[1].clicked, score) for score in scores])
    assert find(document, "dcn", "week_53")["auc_mean"] == pytest.approx(expected)


def test_the_same_results_give_the_same_bytes(results, folder, tmp_path):
    write(tmp_path, *results)
    names = {"ranking.json", "ranking.md", "report.html", "lifts.svg"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_markdown_has_all_columns_then_slice_by_slice(document, folder):
    text = (folder / "ranking.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert titles[:3] == [
        "all rows",
        "AUC and lift by slice",
        "random initialization against DCN baseline",
    ]
    assert titles[3:5] == ["with purchase history", "without purchase history"]
    assert titles[-1] == "Provenance"
    row = find(document, "history", "all")
    low, high = row["interval"]
    line = (
        f"| DCN + <b>history</b> \\| all | {row['auc_mean']:.4f} ± {row['auc_std']:.4f} "
        f"| {row['auc_lift']:+.4f} [{low:+.4f}, {high:+.4f}] | <.001 |"
    )
    assert line in text
    assert "| 88,000 | 3,200,000 | 12.9 |" in text
    for said in ("**Mind the data.** Simulated", "--data 'a b'", "torch 2.13.0", "d" * 64):
        assert said in text
    assert (
        "over DCN baseline, that of random initialization over DCN + <b>history</b> | all" in text
    )


def test_the_page_stands_alone_and_says_where_it_comes_from(folder):
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\((?!#)|<(script|link|img|iframe)", html)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "DCN + &lt;b&gt;history&lt;/b&gt; | all" in html
    assert "<b>" not in html
    for said in ("Simulated; a click", "--data &#39;a b&#39;", "2.13.0", "d" * 64, "weeks 45, 53"):
        assert said in html
    assert html.index("Simulated") < html.index("<svg")
    # All rows and each slice but the one with too few clicks.
    assert html.count("<svg") == 8


def test_the_plot_is_an_svg_file_with_every_lift(folder):
    svg = (folder / "lifts.svg").read_text(encoding="utf-8")
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert "random initialization (over DCN + &lt;b&gt;history&lt;/b&gt; | all)" in svg
    assert "DCN baseline" not in svg


def test_one_seed_has_no_deviation_and_says_what_is_left_out(tmp_path):
    weeks, variants = simulated(seeds=1)
    document = write(tmp_path, weeks, variants)
    row = find(document, "history", "all")
    assert row["auc_std"] is None
    assert row["auc_training_error"] is None
    assert row["interval"][0] < row["auc_lift"] < row["interval"][1]
    text = (tmp_path / "ranking.md").read_text(encoding="utf-8")
    assert "0 ± 0" not in text
    assert "training noise is unknown" in text


def test_a_baseline_alone_has_no_plot(tmp_path):
    weeks, variants = simulated(seeds=1)
    (tmp_path / "lifts.svg").write_text("of an earlier call")
    write(tmp_path, weeks, variants[:1], comparisons=())
    assert not (tmp_path / "lifts.svg").exists()
    assert "<svg" not in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("chosen", "changes", "message"),
    [
        ((0, 1, 1), {}, "variant 'history' is given twice"),
        ((1, 2), {}, "'history' is to be compared with 'dcn', but there are no results of 'dcn'"),
        ((0, 1), {}, "'random' is to be compared with 'dcn', but there are no results of 'random'"),
        ((0,), {"comparisons": [], "short": True}, "'dcn' must have a score for each of the"),
    ],
)
def test_results_that_do_not_fit_are_refused(results, tmp_path, chosen, changes, message):
    weeks, variants = results
    if changes.pop("short", False):
        week = weeks[0]
        parts = {n: getattr(week, n) for n in ("clicked", "product_seen")}
        longer = {n: np.append(value, [False]) for n, value in parts.items()}
        weeks = [
            EvaluationWeek(
                week=45,
                lengths=np.append(week.lengths, 1),
                user_id=np.append(week.user_id, 1),
                history_lengths=np.append(week.history_lengths, 1),
                **longer,
            )
        ]
    with pytest.raises(BadInputError, match=re.escape(message)):
        write(tmp_path, weeks, [variants[i] for i in chosen], **changes)
    assert list(tmp_path.iterdir()) == []
