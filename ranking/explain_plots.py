"""The bars of importance, each figure an inline SVG text (see `features.figures`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from features.figures import COLORS, STYLE, to_svg
from ranking.attribution_groups import EMBEDDINGS


def importance_plot(groups: Sequence[Mapping[str, Any]], method: str, label: str) -> str:
    """Draw one method's importance of each group as horizontal bars, the greatest on top.

    Groups that hold an embedding or the purchase history have another colour.

    Args:
        groups: of ``importance.json``.
        method: key of the figure in a group; ``METHOD_interval``, where there is one, is drawn.
        label: of the axis.
    """
    ordered = sorted(groups, key=lambda group: group[method])
    values = [group[method] for group in ordered]
    spread = None
    if f"{method}_interval" in ordered[0]:
        ends = [group[f"{method}_interval"] for group in ordered]
        spread = [
            [value - low for value, (low, _) in zip(values, ends, strict=True)],
            [high - value for value, (_, high) in zip(values, ends, strict=True)],
        ]
    embedded = [not set(EMBEDDINGS).isdisjoint(group["members"]) for group in ordered]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 0.9 + 0.21 * len(ordered)))
        axes = figure.add_subplot(xlabel=label)
        axes.barh(
            [group["group"] for group in ordered],
            values,
            xerr=spread,
            color=[COLORS[1] if own else COLORS[0] for own in embedded],
            error_kw={"ecolor": mpl.rcParams["text.color"], "elinewidth": 1, "capsize": 2},
            height=0.7,
        )
        axes.set_axisbelow(True)
        axes.grid(visible=False, axis="y")
        axes.margins(y=0.01)
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=5)
        return to_svg(figure, method)
