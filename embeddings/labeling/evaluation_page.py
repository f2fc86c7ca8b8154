"""What ``label-relevance evaluate`` shows: tables, and a page that needs nothing beside it."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from embeddings.labeling.calibration import BINS
from embeddings.labeling.grades import LABELS
from embeddings.labeling.scores import INTERVALS
from features.page import Picture, Table, render

FLOOR = "majority label"
HUMANS = "one person, by the others"

_NAMES = {"macro_f1": "macro F1"}
_PACKAGES = ("numpy", "pyarrow", "torch", "transformers")
_NOTE = (
    "In brackets 95 % intervals by a bootstrap over queries. A pair without a grade counts as "
    "wrong, by two labels. Calibration error: mean distance of confidence and accuracy over "
    f"{BINS} bins. Pairs a second: of the pairs that were graded, on the machine that did."
)


def tables(content: Mapping[str, Any]) -> list[Table]:
    """Return the tables of the content of ``evaluation.json``."""
    best = content["best"]
    return [
        _figures(content),
        _labels_given(best, content["graders"][best]["evaluation"]),
        _leads(best, content["differences"]),
    ]


def page(content: Mapping[str, Any]) -> str:
    """Return the page of the content of ``evaluation.json``."""
    found = {name: each["evaluation"] for name, each in content["graders"].items()}
    pictures = [_reliability(name, each["calibration"]) for name, each in found.items()]
    people = (
        "How far people agree is unknown: no pair of the split has two judgements."
        if content["humans"] is None
        else ""
    )
    return render(
        Path(__file__).parent / "evaluation.html",
        title="Graders of relevance",
        subtitle=f"Best: {content['best']}, by {content['chosen_by'].replace('_', ' ')}.",
        caveat=people,
        again="evaluation",
        command=content["command"],
        origin={
            "Split": content["split"],
            "Fingerprint of the split": content["split_fingerprint"],
            **{
                name: " ".join(filter(None, (each["model"], each["prompt_version"])))
                for name, each in content["graders"].items()
            },
        },
        versions={name: version(name) for name in _PACKAGES},
        tables=tables(content),
        pictures=pictures,
    )


def _figures(content: Mapping[str, Any]) -> Table:
    shown = {name: each["evaluation"] for name, each in content["graders"].items()}
    shown[FLOOR] = content["floor"]
    if content["humans"]:
        shown[HUMANS] = content["humans"]["evaluation"]
    rows = []
    for name, found in shown.items():
        told = found.get("calibration") or {}
        rate = found.get("pairs_per_second")
        rows.append(
            [
                name,
                *(_with_interval(found, figure) for figure in INTERVALS),
                _cell(found["mean_absolute_error"]),
                _cell(told.get("log_loss")),
                _cell(told.get("expected_calibration_error")),
                f"{found['ungraded']:,}",
                "-" if rate is None else f"{rate:,.1f}",
            ]
        )
    header = ["grader", *map(_name, INTERVALS), "mean abs. error", "log loss"]
    header += ["calibration error", "ungraded", "pairs/s"]
    title = f"Evaluation part: {content['evaluation_pairs']:,} pairs"
    return Table(title=title, header=header, rows=rows, note=_NOTE)


def _labels_given(best: str, found: Mapping[str, Any]) -> Table:
    rows = [
        [
            label,
            *(f"{count:,}" for count in found["confusion"][position]),
            f"{found['confusion_ungraded'][position]:,}",
            *(_cell(found[figure][position]) for figure in ("recall", "precision", "f1")),
        ]
        for position, label in enumerate(LABELS)
    ]
    header = ["label of people", *LABELS, "ungraded", "recall", "precision", "F1"]
    return Table(title=f"Labels that {best} gives", header=header, rows=rows)


def _leads(best: str, differences: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [
        [f"over {name}", *(_difference(found[figure]) for figure in INTERVALS)]
        for name, found in differences.items()
    ]
    header = ["lead", *map(_name, INTERVALS)]
    note = "Paired: both graders are drawn with the same queries."
    return Table(title=f"Lead of {best}", header=header, rows=rows, note=note)


def _reliability(name: str, told: Mapping[str, Any] | None) -> Picture:
    """Draw accuracy against confidence; the area of a dot is its share of the pairs."""
    title = f"Reliability of {name}"
    if told is None:
        return Picture(title=title, caption="", svg="")
    import matplotlib as mpl

    from features.figures import COLORS, RULE, STYLE, new_figure, to_svg

    bins = told["reliability"]
    confidence, accuracy = ([b[key] for b in bins] for key in ("confidence", "accuracy"))
    area = [600 * b["pairs"] / told["pairs"] for b in bins]
    with mpl.rc_context(STYLE):
        figure, axes = new_figure("Probability of the label given", "Share that people agree with")
        axes.plot([0, 1], [0, 1], color=RULE, linewidth=1)
        axes.plot(confidence, accuracy, color=COLORS[0], linewidth=1.2)
        axes.scatter(confidence, accuracy, s=area, color=COLORS[0], alpha=0.5, linewidth=0)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        svg = to_svg(figure, f"reliability-{name}")
    caption = "On the line, probabilities come true. A dot's area is its share of the pairs."
    return Picture(title=title, caption=caption, svg=svg)


def _with_interval(found: Mapping[str, Any], figure: str) -> str:
    low, high = found["intervals"][figure]
    return f"{_cell(found[figure])} [{_cell(low)}, {_cell(high)}]"


def _difference(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{_cell(found['difference'], '+')} [{_cell(low, '+')}, {_cell(high, '+')}]"


def _name(figure: str) -> str:
    return _NAMES.get(figure, figure.replace("_", " "))


def _cell(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3f}"
