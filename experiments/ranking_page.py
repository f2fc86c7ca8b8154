"""What the ranking benchmark has to show: tables, and a page that needs nothing beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.ranking_slices import ALL
from features.page import Picture, Table, render

_NOTHING = "–"  # noqa: RUF001
_TEST = ("AUC", "AUC lift", "p", "norm. log loss", "norm. log loss lift", "p")
_MORE: tuple[tuple[str, str, str, float], ...] = (
    ("avg. precision", "average_precision", "{:.4f}", 1),
    ("AUC in requests", "within_request_auc", "{:.4f}", 1),
    ("calibration", "calibration", "{:.3f}", 1),
    ("rows/s", "rows_per_second", "{:,.0f}", 1),
    ("parameters", "parameters", "{:,.0f}", 1),
    ("MB", "model_bytes", "{:,.1f}", 1e-6),
)
_MORE_NOTE = (
    "AUC in requests: mean over the requests that have a click and a non-click. Calibration: "
    "predicted / observed click rate. Rows/s: in training. MB: of the model's file."
)


def render_page(document: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    """Return the page that shows the content of ``ranking.json`` with the plots of its lifts.

    Args:
        document: as `experiments.ranking_table.write_results` returns it.
        pictures: of `experiments.ranking_plots.lift_pictures`, all rows first.
    """
    summary, found = summary_tables(document), tables(document)
    return render(
        Path(__file__).with_name("ranking.html"),
        title=f"Ranking on {document['dataset']}",
        subtitle=_subtitle(document),
        caveat=document["caveat"],
        note=cells_note(document),
        everything=_unbroken(found[0]),
        tables=[_unbroken(table) for table in summary[1:]],
        details=[_unbroken(table) for table in found[len(summary) :]],
        pictures=pictures,
        again="page",
        command=document["command"],
        origin={"Data fingerprint (request records)": document["data_fingerprint"] or _NOTHING},
        versions=document["versions"],
    )


def _unbroken(table: Table) -> Table:
    """Return the table with no line break after a ±, as its cells may wrap."""
    rows = [[cell.replace("± ", "±\u00a0") for cell in row] for row in table.rows]
    return replace(table, rows=rows)


def cells_note(document: Mapping[str, Any]) -> str:
    """Return what the reader of the tables must know."""
    one_seed = any(len(variant["seeds"]) == 1 for variant in document["variants"])
    return (
        "Mean ± standard deviation over seeds (of the mean over weeks). Normalised log loss: log "
        "loss / entropy of the click rate; lower is better. Lift: variant minus baseline, with its "
        "95 % interval and two-sided p, by DeLong's test on the same rows, clustered by user and "
        "with the variance between training seeds added. p is not corrected for the number of "
        "comparisons."
        + (" Of a variant with one seed, the training noise is unknown and left out." * one_seed)
    )


def _subtitle(document: Mapping[str, Any]) -> str:
    weeks = document["weeks"]
    counts = sorted({len(variant["seeds"]) for variant in document["variants"]})
    seeds = " or ".join(map(str, counts))
    return (
        f"Evaluated on {'week' if len(weeks) == 1 else 'weeks'} {', '.join(map(str, weeks))}; "
        f"{seeds} {'seed' if counts == [1] else 'seeds'}"
    )


def tables(document: Mapping[str, Any]) -> list[Table]:
    """Return all tables of the content of ``ranking.json``.

    All rows with all columns, all slices at a glance, other comparisons, then slice by slice.
    """
    everything, *others = [_slice_table(document, part) for part in document["slices"]]
    return [everything, *summary_tables(document)[1:], *others]


def summary_tables(document: Mapping[str, Any]) -> list[Table]:
    """Return the tables that tell the most, which are the first of `tables`."""
    pairs = {(row["variant"], row["vs"]): None for row in document["comparisons"]}
    return [
        _slice_table(document, document["slices"][0]),
        _overview(document),
        *(_comparison_table(document, *pair) for pair in pairs),
    ]


def _overview(document: Mapping[str, Any]) -> Table:
    """Return AUC and lift of each variant on each slice."""
    by_key = {(row["variant"], row["slice"]): row for row in document["rows"]}
    slices = document["slices"]
    return Table(
        title="AUC and lift by slice",
        header=["variant", *(part["title"] for part in slices)],
        rows=[
            [
                name,
                *(_overview_cell(by_key[name, part["name"]], part["shortage"]) for part in slices),
            ]
            for name in (variant["name"] for variant in document["variants"])
        ],
        note="* The 95 % interval of the lift leaves out 0.",
    )


def _overview_cell(row: Mapping[str, Any], shortage: str) -> str:
    if shortage:
        return shortage
    if row["auc_lift"] is None:
        return f"{row['auc_mean']:.4f}"
    low, high = row["interval"] or (0, 0)
    star = "*" if low > 0 or high < 0 else ""
    return f"{row['auc_mean']:.4f} ({row['auc_lift']:+.4f}{star})"


def _slice_table(document: Mapping[str, Any], part: Mapping[str, Any]) -> Table:
    rows = [row for row in document["rows"] if row["slice"] == part["name"]]
    more = _MORE if part["name"] == ALL else ()
    return Table(
        title="all rows" if part["name"] == ALL else part["title"],
        header=["variant", *_TEST, *(title for title, *_ in more)],
        rows=[
            [
                row["title"],
                *_test_cells(row, part["shortage"]),
                *(_number(row.get(key), form, scale) for _, key, form, scale in more),
            ]
            for row in rows
        ],
        note=" ".join([_slice_note(part), _baseline_note(document), *([_MORE_NOTE] * bool(more))]),
    )


def _slice_note(part: Mapping[str, Any]) -> str:
    weeks = ", ".join(map(str, part["weeks"]))
    plural = "week" if len(part["weeks"]) == 1 else "weeks"
    definition = part["definition"][0].upper() + part["definition"][1:]
    note = f"{definition}: {part['rows']:,} with {part['positives']:,} clicks in {plural} {weeks}."
    if part["pooled"]:
        note += " A week has too few by itself: the rows of all are pooled."
    return note


def _baseline_note(document: Mapping[str, Any]) -> str:
    """Say what the lifts are over: the baseline of most, and those of the others by name."""
    titles = {about["name"]: about["title"] for about in document["variants"]}
    usual = usual_baseline(document)
    if usual is None:
        return "No variant has a baseline."
    others = [
        f", that of {about['title']} over {titles[about['vs']]}"
        for about in document["variants"]
        if about["vs"] not in (usual, None)
    ]
    return f"Lifts are over {titles[usual]}{''.join(others)}."


def usual_baseline(document: Mapping[str, Any]) -> str | None:
    """Return the name of the baseline that most variants have; ``None`` where none has one."""
    found = [about["vs"] for about in document["variants"] if about["vs"] is not None]
    return max(found, key=found.count, default=None)


def _comparison_table(document: Mapping[str, Any], variant: str, vs: str) -> Table:
    titles = {about["name"]: about["title"] for about in document["variants"]}
    slices = {part["name"]: part for part in document["slices"]}
    rows = [row for row in document["comparisons"] if (row["variant"], row["vs"]) == (variant, vs)]
    return Table(
        title=f"{titles[variant]} against {titles[vs]}",
        header=["slice", "clicks", "AUC lift", "p", "norm. log loss lift", "p"],
        rows=[
            [
                slices[row["slice"]]["title"],
                f"{slices[row['slice']]['positives']:,}",
                *_lift_cells(row),
            ]
            for row in rows
        ],
    )


def _test_cells(row: Mapping[str, Any], shortage: str) -> list[str]:
    if shortage:
        return [shortage, *[_NOTHING] * (len(_TEST) - 1)]
    lift, p, loss_lift, loss_p = _lift_cells(row)
    loss = _spread(row, "normalized_log_loss")
    return [_spread(row, "auc"), lift, p, loss, loss_lift, loss_p]


def _lift_cells(row: Mapping[str, Any]) -> list[str]:
    """Return lift with interval, and p, of the AUC and of the normalised log loss."""
    cells = []
    for metric, prefix in (("auc", ""), ("normalized_log_loss", "normalized_log_loss_")):
        lift, interval = row[f"{metric}_lift"], row[f"{prefix}interval"]
        text = _NOTHING if lift is None else f"{lift:+.4f}"
        if interval is not None:
            text += f" [{interval[0]:+.4f}, {interval[1]:+.4f}]"
        cells += [text, _p(row[f"{prefix}p_value"])]
    return cells


def _spread(row: Mapping[str, Any], metric: str) -> str:
    mean, std = row[f"{metric}_mean"], row[f"{metric}_std"]
    return f"{mean:.4f}" if std is None else f"{mean:.4f} ± {std:.4f}"


def _p(value: float | None) -> str:
    if value is None:
        return _NOTHING
    return "<.001" if value < 0.001 else f"{value:.3f}".lstrip("0")


def _number(value: float | None, form: str, scale: float) -> str:
    return _NOTHING if value is None else form.format(value * scale)
