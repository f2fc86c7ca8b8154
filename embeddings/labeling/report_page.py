"""What ``label-relevance report`` shows: tables, and a page that needs nothing beside it."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from embeddings.labeling.grades import LABELS
from embeddings.labeling.report_data import BINS, PAPER
from features.figures import COLORS, STYLE, new_figure, to_svg
from features.page import Picture, Table, render

_PACKAGES = ("duckdb", "numpy", "pyarrow")
_SHORT = ("irrelevant", "moderate", "high")
_NOTHING = "-"
_BAR = 0.8  # of the room that a group of bars has


def tables(content: Mapping[str, Any]) -> list[Table]:
    """Return the tables of the content of ``report.json`` that a terminal shows too."""
    found = [_labels(content)]
    if content["coverage"]:
        found.append(_coverage(content["coverage"]))
    if content["disagreement"]:
        found.append(_confusion(content["disagreement"]))
    return found


def page(content: Mapping[str, Any]) -> str:
    """Return the page of the content of ``report.json``."""
    labelling = content["labelling"] or {}
    grader = labelling.get("grader", {})
    pictures = [_distribution_picture(content["distribution"]), _probability_picture(content)]
    if content["coverage"]:
        pictures.append(_coverage_picture(content["coverage"]))
    queries = content["frequent_queries"]
    origin = {
        "Labels": content["folder"],
        "Dataset": content["data"],
        "Grader": " ".join(filter(None, (grader.get("model"), grader.get("prompt_version")))),
        "Fingerprint of the grader": grader.get("fingerprint", ""),
        "Labelled by": labelling.get("run", {}).get("command", ""),
    }
    return render(
        Path(__file__).parent / "report.html",
        title="Relevance labels of a model",
        subtitle=f"{content['labelled']:,} pairs of {content['distribution']['queries']:,} queries "
        f"and {content['distribution']['products']:,} products",
        caveat=_caveat(labelling),
        again="report",
        command=content["command"],
        origin={name: value for name, value in origin.items() if value},
        versions={name: version(name) for name in _PACKAGES},
        pictures=pictures,
        tables=tables(content),
        queries=_queries(queries) if queries else None,
        sample=[_sample(name, pairs) for name, pairs in content["sample"].items()],
    )


def _caveat(labelling: Mapping[str, Any]) -> str:
    if not labelling:
        return "Labelling has not come to an end."
    if not labelling["complete"]:
        return (
            f"Labelling was stopped: {labelling['labelled']:,} of {labelling['pairs']:,} pairs "
            "have a label."
        )
    if labelling["ungraded"]:
        return (
            f"{labelling['ungraded']:,} further pairs have no label, since no answer for them "
            "could be read."
        )
    return ""


def _labels(content: Mapping[str, Any]) -> Table:
    found = content["distribution"]
    sure = (content["probability"] or {}).get("mean_by_label", {})
    columns = [_shares(found["model"].values()), PAPER]
    header = ["label", "pairs", "share", "paper"]
    if found["human"]:
        columns.append(_shares(found["human"].values()))
        header.append("humans here")
    rows = [
        [
            label,
            f"{found['model'][label]:,}",
            *(f"{shares[position]:.1%}" for shares in columns),
            *([_number(sure.get(label))] if sure else []),
        ]
        for position, label in enumerate(LABELS)
    ]
    note = "Paper: 32 million labels of a language model (Section 2.2). "
    if found["human"]:
        note += "Humans here: the dataset's own human labels, of other pairs for the most part. "
    if sure:
        header.append("mean prob.")
        note += f"Half of all labels have a probability of {content['probability']['p50']:.2f} up, "
        note += f"a tenth one below {content['probability']['p10']:.2f}."
    return Table(title="Labels", header=header, rows=rows, note=note.strip())


def _coverage(coverage: Mapping[str, Any]) -> Table:
    names = {"human": "humans", "model": "the model", "both": "both", "any": "one or both"}
    return Table(
        title="Coverage of search volume",
        header=["labelled by", "searches", "impressions"],
        rows=[
            [shown, *(f"{coverage[of][name]:.2%}" for of in ("searches", "impressions"))]
            for name, shown in names.items()
        ],
        note=f"Of {coverage['searches']['total']:,} searches, those whose query has a label; of "
        f"{coverage['impressions']['total']:,} impressions, those whose query and product have "
        "one. Paper: more than 99 % of the search volume.",
    )


def _confusion(found: Mapping[str, Any]) -> Table:
    figures = ", ".join(
        f"{name} {_number(found[key])}"
        for name, key in (
            ("accuracy", "accuracy"),
            ("macro F1", "macro_f1"),
            ("kappa", "kappa"),
            ("quadratic kappa", "quadratic_kappa"),
        )
    )
    return Table(
        title="Against humans",
        header=["label of humans", *(f"model: {short}" for short in _SHORT)],
        rows=[
            [label, *(f"{count:,}" for count in counts)]
            for label, counts in zip(LABELS, found["confusion"], strict=True)
        ],
        note=f"{found['pairs']:,} pairs that both labelled: {figures}.",
    )


def _queries(queries: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for query in queries:
        shares = _shares(query["labels"].values()) if query["labelled"] else [None] * len(LABELS)
        rows.append(
            [
                query["query"],
                f"{query['searches']:,}",
                f"{query['pairs']:,}",
                f"{query['labelled'] / query['pairs']:.0%}",
                *(_NOTHING if share is None else f"{share:.0%}" for share in shares),
            ]
        )
    return Table(
        title="Most frequent queries",
        header=["query", "searches", "pairs shown", "labelled", *_SHORT],
        rows=rows,
    )


def _sample(name: str, pairs: Sequence[Mapping[str, Any]]) -> Table:
    by_humans = any(pair["human"] is not None for pair in pairs)
    header = ["query", "title", "label", "probability", *(["humans"] if by_humans else [])]
    rows = []
    for pair in pairs:
        row = [pair["query"], pair["title"] or _NOTHING, _SHORT[pair["label"]]]
        row.append(_number(pair["probability"]))
        if by_humans:
            row.append(_NOTHING if pair["human"] is None else _SHORT[pair["human"]])
        rows.append(row)
    return Table(title=name[0].upper() + name[1:], header=header, rows=rows)


def _distribution_picture(found: Mapping[str, Any]) -> Picture:
    """Draw the shares of the labels beside those of the paper and of humans."""
    groups = {"this model": _shares(found["model"].values()), "paper": list(PAPER)}
    if found["human"]:
        groups["humans here"] = _shares(found["human"].values())
    svg = _bars(groups, _SHORT, "Share of the labels", "labels")
    return Picture(title="Labels", caption="Shares of the three labels.", svg=svg)


def _coverage_picture(coverage: Mapping[str, Any]) -> Picture:
    """Draw which share of searches and impressions has whose labels."""
    groups = {of: [coverage[of][name] for name in _BY] for of in ("searches", "impressions")}
    svg = _bars(groups, list(_BY.values()), "Share of the volume", "coverage")
    caption = "Searches by their query, impressions by query and product."
    return Picture(title="Coverage of search volume", caption=caption, svg=svg)


_BY = {"human": "humans", "model": "model", "any": "one or both"}


def _bars(
    groups: Mapping[str, Sequence[float]], names: Sequence[str], ylabel: str, name: str
) -> str:
    """Draw bars side by side, one for each group at each name."""
    places, width = np.arange(len(names)), _BAR / len(groups)
    with mpl.rc_context(STYLE):
        figure, axes = new_figure("", ylabel)
        for number, (group, shares) in enumerate(groups.items()):
            at = places + (number - (len(groups) - 1) / 2) * width
            drawn = axes.bar(at, shares, width * 0.92, color=COLORS[number], label=group)
            axes.bar_label(drawn, [f"{share:.1%}" for share in shares], padding=2, fontsize=7)
        axes.set_xticks(places, names)
        axes.grid(visible=False, axis="x")
        axes.set_axisbelow(True)
        axes.set_ylim(0, 1.12)
        axes.set_yticks(np.linspace(0, 1, 6), [f"{share:.0%}" for share in np.linspace(0, 1, 6)])
        # Above the bars: within the axes it would hide some.
        figure.legend(loc="outside upper left", ncols=len(groups), handlelength=1)
        return to_svg(figure, name)


def _probability_picture(content: Mapping[str, Any]) -> Picture:
    """Draw how many labels have which probability, stacked by label."""
    title = "How sure the model is"
    histogram = content["distribution"]["histogram"]
    if histogram is None:
        return Picture(title=title, caption="", svg="")
    counts = np.array(list(histogram.values()), np.float64)
    shares = counts / counts.sum()
    edges = np.linspace(0, 1, BINS + 1)
    first = int(np.flatnonzero(shares.sum(0))[0])
    with mpl.rc_context(STYLE):
        figure, axes = new_figure("Probability of the label given", "Share of the labels")
        bottom = np.zeros(BINS)
        for color, short, part in zip(COLORS, _SHORT, shares, strict=True):
            axes.bar(
                *(edges[:-1], part, 0.9 / BINS, bottom), align="edge", color=color, label=short
            )
            bottom += part
        axes.set(xlim=(edges[first], 1))
        axes.set_axisbelow(True)
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        figure.legend(loc="outside upper left", ncols=len(LABELS), handlelength=1)
        svg = to_svg(figure, "probability")
    return Picture(title=title, caption="As the grader tells it, stacked by label.", svg=svg)


def _shares(counts: Any) -> list[float]:
    counts = list(counts)
    return [count / max(sum(counts), 1) for count in counts]


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.3f}"
