"""Forest plots of the lifts over the baseline, with their 95 % intervals."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.ranking_page import usual_baseline
from experiments.ranking_slices import ALL
from features.figures import COLORS, STYLE, to_svg
from features.page import Picture

_WIDTH = 4.4  # inches
_LINE, _MARK, _AXIS = 0.165, 0.2, 0.55  # inches: of a line of a label, of an interval, below all
_LABEL_POINTS = 8.5
_CHARACTERS = 62  # that fit a line
_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
_LIGHT = "--rule: #d5dae0; color: #1c2128; background: #fff; font-family: sans-serif"


def lift_pictures(document: Mapping[str, Any]) -> list[Picture]:
    """Return a plot of the AUC lifts on all rows and one for each other slice that has any.

    Args:
        document: the content of ``ranking.json``.
    """
    titles = {about["name"]: about["title"] for about in document["variants"]}
    usual = usual_baseline(document)
    pictures = []
    for part in document["slices"]:
        rows = [
            row
            for row in document["rows"]
            if row["slice"] == part["name"] and row["interval"] is not None
        ]
        if not rows:
            continue
        names = titles if part["name"] == ALL else {name: name for name in titles}
        labels = [
            names[row["variant"]] + (f" (over {names[row['vs']]})" * (row["vs"] != usual))
            for row in rows
        ]
        picture = Picture(
            title=part["title"],
            caption=f"{part['definition']}; {part['positives']:,} clicks",
            svg=lift_plot(labels, rows, name=part["name"]),
        )
        pictures.append(picture)
    return pictures


def lift_plot(labels: Sequence[str], rows: Sequence[Mapping[str, Any]], *, name: str) -> str:
    """Draw the AUC lift of each row with its interval, below its label.

    The mark is filled where the interval leaves out 0. Zero, the baseline, is a vertical line.

    Args:
        labels: one a row.
        rows: of ``ranking.json``, with ``auc_lift`` and ``interval``.
        name: of the figure; figures of a page have different ones.
    """
    wrapped = [textwrap.wrap(label, _CHARACTERS) or [""] for label in labels]
    heights = [_LINE * len(lines) + _MARK for lines in wrapped]
    total = sum(heights)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, total + _AXIS))
        axes = figure.add_subplot(xlabel="AUC lift", ylim=(total, 0))
        axes.axvline(0, color=mpl.rcParams["axes.edgecolor"], linewidth=1.4)
        top = 0.0
        for lines, height, row in zip(wrapped, heights, rows, strict=True):
            low, high = row["interval"]
            apart = low > 0 or high < 0
            color = COLORS[1] if high < 0 else COLORS[0]
            place = top + height - _MARK / 2
            axes.plot((low, high), (place, place), color=color, solid_capstyle="butt")
            axes.plot(
                row["auc_lift"],
                place,
                "o",
                color=color,
                markersize=4.5,
                markerfacecolor=color if apart else "none",
            )
            axes.text(
                0,
                top + height - _MARK,
                "\n".join(lines),
                transform=axes.get_yaxis_transform(),
                va="bottom",
                fontsize=_LABEL_POINTS,
            )
            top += height
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda lift, _: _signed(lift)))
        return to_svg(figure, f"lifts-{name}")


def standalone(svg: str) -> str:
    """Return the text of an SVG file of its own, for light backgrounds."""
    return svg.replace("<svg ", f'<svg {_NAMESPACES} style="{_LIGHT}" ', 1)


def _signed(lift: float) -> str:
    return "0" if abs(lift) < 1e-12 else f"{lift:+.6f}".rstrip("0")
