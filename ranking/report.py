"""The report of a run: one HTML file that needs nothing beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from features.files import write_text
from features.page import Picture, Table, render
from ranking.metrics import Predictions, SliceMetrics
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
_METRICS_NOTE = (
    "Normalised log loss: log loss divided by the entropy of the slice's own click rate (lower is "
    "better, 1 knows the click rate and nothing else). Calibration: predicted divided by observed "
    "click rate. AUC in requests: mean over the requests that have a click and a non-click."
)


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
    return render(
        Path(__file__).with_name("report.html"),
        title=f"{report.metrics['model']} on {report.metrics['dataset']}",
        subtitle=f"Evaluated on {report.evaluated_on}" if report.evaluated_on else "",
        caveat=report.caveat,
        metrics=_metrics_table(report.metrics["slices"]),
        pictures=_pictures(report),
        training=_training_facts(report.metrics["training"]),
        config=report.config.strip(),
        again="run",
        command=report.command,
        origin={
            "Seed": str(report.metrics["seed"]),
            "Data fingerprint (request records)": report.data_fingerprint or _NOTHING,
            "Embedding tables": report.table_fingerprint or "none in this model",
        },
        versions=report.versions,
    )


def _metrics_table(slices: Mapping[str, SliceMetrics]) -> Table:
    """Return the metrics with a column for each slice, which fits a phone."""
    header, rows = format_slice_rows(slices)
    turned = [list(column) for column in zip(header, *rows, strict=True)]
    return Table(title="Metrics", header=turned[0], rows=turned[1:], note=_METRICS_NOTE)


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


def _pictures(report: RunReport) -> list[Picture]:
    predictions = report.predictions
    return [
        Picture(
            title="ROC",
            caption="By slice; the straight line is chance.",
            svg=roc_plot(predictions),
        ),
        Picture(
            title="Calibration",
            caption="Bars are 95 % Wilson intervals; the straight line is perfect calibration. "
            "A triangle is the upper end for a group without any click.",
            svg=calibration_plot(predictions),
        ),
        Picture(
            title="Training loss",
            caption="Log loss of the training batches as they came, and its moving mean.",
            svg=loss_plot(report.loss_curve) if report.loss_curve else "",
        ),
        Picture(
            title="Scores by label",
            caption="Share of the clicked and of the unclicked rows at each score.",
            svg=histogram_plot(predictions),
        ),
    ]
