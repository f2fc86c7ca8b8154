"""The results of the ranking benchmark: the paper's Table 2, in JSON, Markdown and as a page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from experiments.paired_test import Lift, compare
from experiments.ranking_page import cells_note, render_page, summary_tables, tables
from experiments.ranking_plots import lift_pictures, standalone
from experiments.ranking_results import EvaluationWeek, VariantResult
from experiments.ranking_scores import Scoring, SliceScore
from experiments.ranking_slices import LEAST, Slice, make_slices
from features.console import print_table, say
from features.errors import BadInputError
from features.files import write_text

RANKING_JSON = "ranking.json"
RANKING_MD = "ranking.md"
REPORT = "report.html"
LIFTS = "lifts.svg"

_NO_LIFT = ("lift", "interval", "p_value", "sampling_error", "training_error")


def write_results(
    output: Path,
    *,
    dataset: str,
    caveat: str,
    command: str,
    versions: Mapping[str, str],
    data_fingerprint: str,
    weeks: Sequence[EvaluationWeek],
    variants: Sequence[VariantResult],
    comparisons: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """Measure and test every variant on every slice, print the tables and write the results.

    The same arguments give the same bytes: ``ranking.json``, ``ranking.md``, ``report.html`` and
    ``lifts.svg``, each whole or not at all.

    Args:
        output: the folder to write into.
        dataset: its name.
        caveat: the sentence that stands beside every figure of this dataset; may be empty.
        command: the exact command line.
        versions: of each package that matters, in the order to show.
        data_fingerprint: of the request records.
        weeks: the evaluation weeks.
        variants: in the order of the table; each with probabilities for all rows of all weeks.
        comparisons: pairs of names to test besides each variant against its own baseline.

    Returns:
        The content of ``ranking.json``.

    Raises:
        BadInputError: a variant is given twice, compared with one that is not given, or lacks the
            scores of a week; or all rows together are too few.
    """
    _check(weeks, variants, comparisons)
    slices = make_slices(weeks)
    scoring, scores = Scoring(weeks, variants), {}
    for part in slices:
        say(f"measuring {part.title}: {part.shortage or f'{part.count:,} rows'}")
        scores[part.name] = scoring.measure(part)
    document = {
        "dataset": dataset,
        "rows": [_row(v, part, scores[part.name]) for part in slices for v in variants],
        "comparisons": [
            {"variant": name, "vs": vs, "slice": part.name, **_lifts(name, vs, scores[part.name])}
            for name, vs in comparisons
            for part in slices
        ],
        "variants": [_about_variant(variant) for variant in variants],
        "slices": [_about_slice(part) for part in slices],
        "weeks": [week.week for week in weeks],
        "fewest_clicks": LEAST,
        "caveat": caveat,
        "command": command,
        "versions": dict(versions),
        "data_fingerprint": data_fingerprint,
    }
    pictures = lift_pictures(document)
    write_text(output / RANKING_MD, _markdown(document))
    write_text(output / REPORT, render_page(document, pictures))
    if pictures:
        write_text(output / LIFTS, standalone(pictures[0].svg))
    else:
        (output / LIFTS).unlink(missing_ok=True)
    write_text(output / RANKING_JSON, json.dumps(document, indent=2, allow_nan=False) + "\n")
    for table in summary_tables(document):
        rows = [[escape(cell) for cell in row] for row in table.rows]
        print_table(escape(f"{dataset}, {table.title}"), table.header, rows)
    if caveat:
        say(f"Caveat: {caveat}")
    say(f"Report: {output / REPORT}")
    return document


def _check(
    weeks: Sequence[EvaluationWeek],
    variants: Sequence[VariantResult],
    comparisons: Sequence[tuple[str, str]],
) -> None:
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise BadInputError(f"variant '{name}' is given twice")
    against = [(v.name, v.baseline) for v in variants if v.baseline is not None]
    for name, vs in [*against, *comparisons]:
        for known in (name, vs):
            if known not in names:
                raise BadInputError(
                    f"'{name}' is to be compared with '{vs}', but there are no results of '{known}'"
                )
    for variant in variants:
        for week in weeks:
            scores = variant.probability.get(week.week)
            if scores is None or scores.shape[1] != len(week.clicked):
                found = "none" if scores is None else f"{scores.shape[1]:,}"
                raise BadInputError(
                    f"variant '{variant.name}' must have a score for each of the "
                    f"{len(week.clicked):,} rows of week {week.week}, got {found}"
                )


def _row(variant: VariantResult, part: Slice, scores: Mapping[str, SliceScore]) -> dict[str, Any]:
    score = scores.get(variant.name)
    return {
        "variant": variant.name,
        "title": variant.title,
        "slice": part.name,
        **_spread("auc", score.auc.values if score else None),
        **_spread("normalized_log_loss", score.loss.values if score else None),
        "vs": variant.baseline,
        **_lifts(variant.name, variant.baseline, scores),
        "average_precision": score.average_precision if score else None,
        "within_request_auc": score.within_request_auc if score else None,
        "calibration": score.calibration if score else None,
        "seeds": len(variant.seeds),
        "rows": part.count,
        "positives": part.positives,
        **{name: float(value) for name, value in variant.facts.items()},
    }


def _spread(name: str, values: np.ndarray | None) -> dict[str, float | None]:
    """Return mean and, of several seeds, standard deviation."""
    mean = None if values is None else float(values.mean())
    std = None if values is None or len(values) < 2 else float(values.std(ddof=1))
    return {f"{name}_mean": mean, f"{name}_std": std}


def _lifts(name: str, vs: str | None, scores: Mapping[str, SliceScore]) -> dict[str, Any]:
    """Return lift, interval, p and standard errors of AUC and normalised log loss."""
    if vs is None or not scores:
        return {**_named("auc", None), **_named("normalized_log_loss", None)}
    variant, baseline = scores[name], scores[vs]
    return {
        **_named("auc", compare(variant.auc, baseline.auc)),
        **_named("normalized_log_loss", compare(variant.loss, baseline.loss)),
    }


def _named(metric: str, lift: Lift | None) -> dict[str, Any]:
    """Return the fields of ``lift`` with JSON's names; the AUC's interval and p bear none."""
    fields: dict[str, Any] = dict.fromkeys(_NO_LIFT)
    if lift is not None:
        fields = {name: getattr(lift, name) for name in _NO_LIFT}
    plain = ("interval", "p_value") if metric == "auc" else ()
    return {
        name if name in plain else f"{metric}_{name}": list(value)
        if isinstance(value, tuple)
        else value
        for name, value in fields.items()
    }


def _about_variant(variant: VariantResult) -> dict[str, Any]:
    return {
        "name": variant.name,
        "title": variant.title,
        "vs": variant.baseline,
        "seeds": list(variant.seeds),
    }


def _about_slice(part: Slice) -> dict[str, Any]:
    return {
        "name": part.name,
        "title": part.title,
        "definition": part.definition,
        "rows": part.count,
        "positives": part.positives,
        "weeks": list(part.clicked),
        "pooled": len(part.groups) == 1 and len(part.groups[0]) > 1,
        "shortage": part.shortage,
    }


def _markdown(document: Mapping[str, Any]) -> str:
    lines = [f"# Ranking on {document['dataset']}", ""]
    if document["caveat"]:
        lines += [f"**Mind the data.** {document['caveat']}", ""]
    lines += [cells_note(document), ""]
    for table in tables(document):
        lines += [f"## {table.title}", ""]
        lines += [_markdown_row(table.header), _markdown_row(["---"] * len(table.header))]
        lines += [_markdown_row(row) for row in table.rows]
        lines += ["", table.note, ""]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines += ["## Provenance", "", f"`{document['command']}`", ""]
    lines += [f"Data fingerprint: `{document['data_fingerprint']}`", "", f"{versions}."]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
