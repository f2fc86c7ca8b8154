"""The report's figures, each as an inline SVG text (see `features.figures`)."""

import math
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator

from features.figures import COLORS, RULE, STYLE, new_figure, to_svg
from ranking.metrics import Predictions, reliability_bins, roc_points, score_histogram

_RARE = 0.1  # below this click rate, calibration is drawn on logarithmic axes
_MAX_POINTS = 400
_TICKS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999)


def roc_plot(predictions: Predictions) -> str:
    """Draw the ROC curve of every slice that has clicks and non-clicks."""
    with mpl.rc_context(STYLE):
        figure, axes = new_figure("False positive rate", "True positive rate")
        axes.plot([0, 1], [0, 1], color=RULE, linewidth=1)
        for color, (name, part) in zip(COLORS, predictions.slices().items(), strict=True):
            # The whole is drawn wide and pale: the slices often cover it.
            width, alpha = (4.0, 0.4) if name == "all" else (1.4, 1.0)
            if not part.one_class:
                (line,) = axes.plot(*roc_points(part), color=color, label=name.replace("_", " "))
                line.set(linewidth=width, alpha=alpha)
        axes.set(xlim=(0, 1), ylim=(0, 1.005))
        axes.legend(loc="lower right")
        return to_svg(figure, "roc")


def calibration_plot(predictions: Predictions) -> str:
    """Draw observed against predicted click rate with 95 % intervals.

    Axes are logarithmic where clicks are rare. A bin without any click has no place on them: a
    triangle marks the upper end of its interval.
    """
    bins = reliability_bins(predictions)
    rare = predictions.clicked.mean() < _RARE
    with mpl.rc_context(STYLE):
        figure, axes = new_figure("Mean predicted click rate", "Observed click rate")
        shown = (bins.positives > 0) & (bins.predicted > 0) if rare else bins.rows > 0
        silent = ~shown & (bins.predicted > 0)
        positive = np.concatenate([bins.predicted, bins.low, bins.high])
        positive = positive[positive > 0]
        ends = [positive.min() / 1.3, min(positive.max() * 1.3, 1.0)] if rare else [0, 1]
        axes.plot(ends, ends, color=RULE, linewidth=1)
        axes.errorbar(
            bins.predicted[shown],
            bins.observed[shown],
            yerr=[(bins.observed - bins.low)[shown], (bins.high - bins.observed)[shown]],
            color=COLORS[0],
            fmt="o-",
            markersize=3.5,
            linewidth=1.2,
        )
        axes.plot(bins.predicted[silent], bins.high[silent], "v", color=COLORS[1], markersize=4)
        if rare:
            axes.set(xscale="log", yscale="log")
            steps = (1.0, 2.0, 5.0) if ends[1] / ends[0] < 100 else (1.0,)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=steps))
                axis.set_major_formatter(FuncFormatter(lambda rate, _: _percent(rate)))
                axis.set_minor_formatter(FuncFormatter(lambda _rate, _: ""))
        axes.set(xlim=ends, ylim=ends)
        return to_svg(figure, "calibration")


def histogram_plot(predictions: Predictions) -> str:
    """Draw the share of clicked and of unclicked rows over the score, spaced in log odds."""
    histogram = score_histogram(predictions)
    edges = histogram.log_odds
    with mpl.rc_context(STYLE):
        figure, axes = new_figure("Predicted click rate (log odds scale)", "Share of the rows")
        for shares, color, label in (
            (histogram.unclicked, COLORS[0], "not clicked"),
            (histogram.clicked, COLORS[1], "clicked"),
        ):
            axes.stairs(shares, edges, fill=True, color=color, alpha=0.3)
            axes.stairs(shares, edges, color=color, label=label)
        places = _log_odds_ticks(edges[0], edges[-1])
        axes.set_xticks(places, [_percent(1 / (1 + math.exp(-place))) for place in places])
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(bottom=0)
        axes.legend(loc="best")
        return to_svg(figure, "histogram")


def loss_plot(curve: Sequence[tuple[int, float]]) -> str:
    """Draw training loss over rows seen, with its moving mean where there are many points.

    Args:
        curve: pairs of rows seen so far and log loss, at least one.
    """
    rows, loss = np.asarray(curve, dtype=np.float64).T
    thin = np.unique(np.linspace(0, len(rows) - 1, _MAX_POINTS).astype(np.int64))
    with mpl.rc_context(STYLE):
        figure, axes = new_figure("Training rows seen", "Training log loss")
        width = len(rows) // 20
        if width < 2:
            axes.plot(rows, loss, "o-", color=COLORS[0], markersize=3)
        else:
            axes.plot(rows[thin], loss[thin], color=COLORS[0], alpha=0.35, linewidth=1)
            axes.plot(rows[thin], _moving_mean(loss, width)[thin], color=COLORS[0])
            # The first few steps start from chance and would flatten all the rest.
            axes.set_ylim(0.95 * loss.min(), 1.1 * np.quantile(loss, 0.98))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: _short(count)))
        return to_svg(figure, "loss")


def _log_odds_ticks(low: float, high: float) -> list[float]:
    """Return the log odds of round rates in ``[low, high]``, far enough apart to label."""
    kept: list[float] = []
    for rate in _TICKS:
        place = math.log(rate / (1 - rate))
        if low <= place <= high and (not kept or place - kept[-1] > (high - low) / 7):
            kept.append(place)
    return kept if len(kept) > 1 else [low, (low + high) / 2, high]


def _moving_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Return the mean of each value and up to ``width - 1`` values before it."""
    sums = np.concatenate([[0.0], values.cumsum()])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _percent(rate: float) -> str:
    return f"{float(f'{100 * rate:.2g}'):.10g}%"


def _short(count: float) -> str:
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:g}{suffix}"
    return f"{count:g}"
