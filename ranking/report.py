"""The report of a run: one HTML file that needs nothing beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from features.files import write_text
from ranking.metrics import Predictions, SliceMetrics
from ranking.page import render
from ranking.plots import calibration_plot, histogram_plot, loss_plot, roc_plot

_COLUMNS = (
    ("AUC", "auc", "{:.5f}"),
    ("log loss", "log_loss", "{:.5f}"),
    ("norm. log loss", "normalized_log_loss", "{:.5f}"),
    ("avg. precision", "average_precision", "{:.4f}"),
    ("calibration", "calibration", "{:.4f}"),
    ("AUC in requests", "within_request_auc", "{:.5f}"),
    ("rows", "rows", "{:,}"),
    ("clicks", "positives", "{:,}"),
    ("requests", "requests", "{:,}"),
)
_NOTHING = "–"  # noqa: RUF001


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What a run has to say for itself.

    Attributes:
        metrics: the content of ``metrics.json``, as `ranking.metrics.metrics_document` gives it.
        predictions: the evaluation rows that the figures are drawn from.
        loss_curve: pairs of training rows seen and log loss; may be empty.
        caveat: the sentence that stands beside every figure of this dataset; may be empty.
        evaluated_on: what the evaluation rows are, such as "week 44".
        config: the resolved configuration, as TOML.
        command: the exact command line.
        versions: version of each package that matters, in the order to show.
        data_fingerprint: of the request records.
        table_fingerprint: of the embedding tables' encoder; empty for a model without tables.
    """

    metrics: Mapping[str, Any]
    predictions: Predictions
    loss_curve: Sequence[tuple[int, float]]
    caveat: str
    evaluated_on: str
    config: str
    command: str
    versions: Mapping[str, str]
    data_fingerprint: str
    table_fingerprint: str = ""


def write_report(path: Path, report: RunReport) -> None:
    """Write ``report`` to ``path``, whole or not at all.

    Raises:
        ValueError: the predictions hold one class only, so that no figure can be drawn.
    """
    if report.predictions.one_class:
        raise ValueError("a report needs predictions of clicked and unclicked rows")
    write_text(path, _render(report))


def format_slice_rows(slices: Mapping[str, SliceMetrics]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the table of metrics by slice, as text.

    Args:
        slices: as `ranking.metrics.slice_metrics` returns them; a missing value becomes a dash.
    """
    header = ["slice", *(title for title, _, _ in _COLUMNS)]
    rows = [
        [name.replace("_", " "), *(_cell(metrics.get(key), form) for _, key, form in _COLUMNS)]
        for name, metrics in slices.items()
    ]
    return header, rows


def _cell(value: float | None, form: str) -> str:
    return _NOTHING if value is None else form.format(value)


def _render(report: RunReport) -> str:
    header, rows = format_slice_rows(report.metrics["slices"])
    return render(
        Path(__file__).with_name("report.html"),
        report=report,
        header=header,
        rows=rows,
        training=_training_facts(report.metrics["training"]),
        figures=_figures(report),
        provenance={
            "Seed": str(report.metrics["seed"]),
            "Request records": report.data_fingerprint or _NOTHING,
            "Embedding tables": report.table_fingerprint or "none in this model",
        },
    )


def _training_facts(training: Mapping[str, float]) -> dict[str, str]:
    return {
        "Rows": f"{training['rows']:,.0f}",
        "Time": _duration(training["seconds"]),
        "Rows per second": f"{training['rows_per_second']:,.0f}",
        "Peak memory": f"{training['peak_rss_mb']:,.0f} MB",
    }


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _figures(report: RunReport) -> list[tuple[str, str, str]]:
    """Return title, caption and SVG (empty: nothing to draw) of each figure."""
    predictions = report.predictions
    return [
        ("ROC", "By slice; the straight line is chance.", roc_plot(predictions)),
        (
            "Calibration",
            "Bars are 95 % Wilson intervals; the straight line is perfect calibration. "
            "A triangle is the upper end for a group without any click.",
            calibration_plot(predictions),
        ),
        (
            "Training loss",
            "Log loss of the training batches as they came, and its moving mean.",
            loss_plot(report.loss_curve) if report.loss_curve else "",
        ),
        (
            "Scores by label",
            "Share of the clicked and of the unclicked rows at each score.",
            histogram_plot(predictions),
        ),
    ]
