import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ranking.metrics import Predictions, metrics_document, slice_metrics
from ranking.plots import calibration_plot
from ranking.report import RunReport, format_slice_rows, write_report

CAVEAT = "Simulated after real shopping patterns; a click is a purchase."


def predictions(rate: float = 0.03, requests: int = 400) -> Predictions:
    rng = np.random.default_rng(11)
    lengths = rng.integers(1, 20, requests)
    odds = rate / (1 - rate) * np.exp(rng.normal(0, 1.5, lengths.sum()))
    probability = odds / (1 + odds)
    return Predictions(
        clicked=rng.random(len(probability)) < probability,
        probability=probability.astype(np.float32),
        lengths=lengths,
        with_history=rng.random(requests) < 0.9,
    )


def report(**changes) -> RunReport:
    seen = changes.pop("predictions", None) or predictions()
    metrics = metrics_document(
        dataset=changes.pop("dataset", "tiny"),
        model="two-tower",
        seed=42,
        slices=slice_metrics(seen),
        training={
            "rows": 1_234_567,
            "seconds": 754.2,
            "rows_per_second": 1637.0,
            "peak_rss_mb": 2345.6,
        },
    )
    parts = {
        "metrics": metrics,
        "predictions": seen,
        "loss_curve": [(1000 * step, 1 / step) for step in range(1, 200)],
        "caveat": CAVEAT,
        "evaluated_on": "week 44",
        "config": "[model]\nembedding_dim = 16\n",
        "command": "train-ranker --output runs/tiny",
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
        "data_fingerprint": "d" * 64,
        "table_fingerprint": "e" * 64,
    }
    return RunReport(**{**parts, **changes})


def written(folder: Path, content: RunReport) -> str:
    write_report(folder / "report.html", content)
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    return (folder / "report.html").read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Checks that elements nest, and gathers what could load something from elsewhere."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[str] = []
        self.targets: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href", "xlink:href", "data", "action"):
                self.targets.append(value)
            if name == "id":
                self.ids.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def outline(html: str) -> Outline:
    parser = Outline()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


def test_it_shows_caveat_numbers_and_origin(tmp_path):
    content = report()
    html = written(tmp_path, content)
    everything = content.metrics["slices"]["all"]
    for text in (
        "<h1>two-tower on tiny</h1>",
        CAVEAT,
        "week 44",
        f"{everything['auc']:.5f}",
        f"{everything['normalized_log_loss']:.5f}",
        f"{everything['rows']:,}",
        "without history",
        "1,234,567",
        "12 min 34 s",
        "1,637",
        "2,346 MB",
        "embedding_dim = 16",
        "train-ranker --output runs/tiny",
        "2.13.0",
        "d" * 64,
        "e" * 64,
        "42",
    ):
        assert text in html
    assert html.index(CAVEAT) < html.index("<table")
    # A column for each slice: three fit a phone, nine metrics do not.
    assert '<th scope="col">without history</th>' in html


def test_it_stands_alone_and_fits_a_phone(tmp_path):
    html = written(tmp_path, report())
    page = outline(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.elements)
    assert all(target.startswith("#") for target in page.targets)
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "prefers-color-scheme: dark" in html


def test_every_figure_draws_curves_with_the_page_s_own_colours(tmp_path):
    html = written(tmp_path, report())
    figures = re.findall(r"<figure>(.*?)</figure>", html, flags=re.DOTALL)
    titles = [re.search("<h3>(.*)</h3>", figure)[1] for figure in figures]
    assert titles == ["ROC", "Calibration", "Training loss", "Scores by label"]
    for figure in figures:
        assert figure.count("<path") > 10
        assert re.search(r'<svg viewBox="0 0 [\d. ]+" role="img">', figure)
        assert "currentColor" in figure
        assert "#010203" not in figure
        assert "#040506" not in figure
    assert all(label in figures[0] for label in ("all", "with history", "without history"))
    ids = outline(html).ids
    assert len(ids) == len(set(ids))
    # What a figure refers to by id is there.
    assert set(re.findall(r'(?:url\(|href=")#(\w+)', html)) <= set(ids)


def test_the_same_run_gives_the_same_file(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    assert written(tmp_path / "first", report()) == written(tmp_path / "second", report())


def test_markup_in_names_and_texts_is_escaped(tmp_path):
    html = written(
        tmp_path,
        report(
            dataset="<b>bold</b>",
            caveat="a < b & <i>c</i>",
            command="train-ranker --output '<script>'",
            config='name = "<u>"',
            versions={"<s>": "<em>"},
        ),
    )
    assert "&lt;b&gt;bold&lt;/b&gt;" in html
    assert "a &lt; b &amp; &lt;i&gt;c&lt;/i&gt;" in html
    assert not re.search(r"<(b|i|u|s|em|script)>", html)
    outline(html)


def test_what_is_missing_is_left_out_or_said(tmp_path):
    html = written(
        tmp_path, report(caveat="", evaluated_on="", loss_curve=[], table_fingerprint="")
    )
    assert 'class="caveat"' not in html
    assert "Evaluated on" not in html
    assert "Not recorded." in html
    assert "none in this model" in html
    assert html.count("<svg") == 3


@pytest.mark.parametrize(
    "seen",
    [
        pytest.param(predictions(rate=0.4), id="balanced labels"),
        pytest.param(
            Predictions(
                clicked=np.arange(40) == 0,
                probability=np.full(40, 0.025),
                lengths=np.array([40]),
                with_history=np.array([True]),
            ),
            id="a constant score and an empty slice",
        ),
        pytest.param(
            Predictions(
                clicked=np.arange(100) == 0,
                probability=np.where(np.arange(100) == 0, 1.0, 0.0),
                lengths=np.array([50, 50]),
                with_history=np.array([True, False]),
            ),
            id="scores of exactly 0 and 1",
        ),
    ],
)
def test_unusual_predictions_are_drawn(tmp_path, seen):
    html = written(tmp_path, report(predictions=seen, loss_curve=[(10, 0.5)]))
    assert html.count("<svg") == 4
    assert not re.search(r"\b(nan|inf)\b", html)


def test_a_group_without_clicks_is_marked_on_logarithmic_axes():
    clicked = np.zeros(1000, dtype=bool)
    clicked[900:920] = True
    seen = Predictions(
        clicked=clicked,
        probability=np.repeat([0.001, 0.2], [900, 100]),
        lengths=np.full(100, 10),
        with_history=np.ones(100, dtype=bool),
    )
    triangle = "#d9762b"  # its colour
    assert triangle in calibration_plot(seen)
    seen.clicked[0] = True
    assert triangle not in calibration_plot(seen)


def test_one_class_is_refused_and_writes_nothing(tmp_path):
    seen = predictions()
    one_class = replace(seen, clicked=np.zeros_like(seen.clicked))
    with pytest.raises(ValueError, match="clicked and unclicked"):
        write_report(tmp_path / "report.html", replace(report(), predictions=one_class))
    assert list(tmp_path.iterdir()) == []


def test_slice_rows_are_text_with_a_dash_for_what_is_undefined():
    header, rows = format_slice_rows(
        {
            "all": {"auc": 0.93541, "log_loss": 0.0435678, "rows": 325_000, "positives": 3_900},
            "without_history": {"auc": None, "log_loss": None, "rows": 12, "positives": 0},
        }
    )
    assert header[:4] == ["slice", "AUC", "log loss", "norm. log loss"]
    first, second = (dict(zip(header, row, strict=True)) for row in rows)
    assert (first["slice"], first["AUC"], first["log loss"]) == ("all", "0.93541", "0.04357")
    assert (first["rows"], first["clicks"]) == ("325,000", "3,900")
    assert (second["slice"], second["AUC"]) == ("without history", "–")  # noqa: RUF001
    assert (second["rows"], second["clicks"]) == ("12", "0")
