"""Figures of pages, each an inline SVG text.

They follow the page: text takes the page's font and colour, so one figure serves light and dark
pages, and the size comes from the page's layout. The same values give the same text.
"""

import io
import re
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Stand-ins that become CSS values in the finished SVG.
INK, RULE = "#010203", "#040506"
_CSS = {INK: "currentColor", RULE: "var(--rule)"}
COLORS = ("#3478c9", "#d9762b", "#2f9e78")
STYLE: dict[Any, Any] = {
    "axes.edgecolor": RULE,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 9.5,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.color": RULE,
    "ytick.labelcolor": INK,
}


def new_figure(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """Return an empty figure of the report with its axes."""
    # Not through pyplot: a bare Figure has no global registry, so it is freed like any object.
    figure = Figure(figsize=(4.4, 3.3))
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def to_svg(figure: Figure, name: str) -> str:
    """Return the figure as an ``<svg>`` element fit to stand in an HTML page."""
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows them
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same ids in every figure; nothing uses them
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg)
    for stand_in, css in _CSS.items():
        svg = svg.replace(stand_in, css)
    return svg
