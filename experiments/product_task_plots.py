"""The two pictures of the product tasks: aisles on a t-SNE map, cosines by relevance grade.

The paper's Figures 4 and 5. Both are SVG texts that follow the page they stand in.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from embeddings.relevance import HIGH, IRRELEVANT, MODERATE
from features.figures import COLORS, STYLE, new_figure, to_svg

GRADES = ("IR", "MR", "HR")
MOST_POINTS = 3000
NAMED_AISLES = 16

_GRADE_COLORS = (COLORS[1], COLORS[0], COLORS[2])
_GRID = 400
_OTHER = "#8a929b"
# Of about one brightness, so that they show on light and on dark pages.
_AISLE_COLORS = (
    *("#3478c9", "#d9762b", "#2f9e78", "#c9424a", "#8d63c4", "#9a6a4f", "#d05fa8", "#6f9a2e"),
    *("#1fa3b8", "#c79a1e", "#5b6fd6", "#e0685f", "#4b8f4f", "#a8559a", "#7a8fb5", "#b07a3a"),
)
_MAP_INCHES = (4.2, 4.4)
_MAP_DPI = 250  # of the points; everything else is drawn as vectors
_LABEL_POINTS = 8.5
_CHARACTER = 0.66  # mean width of a bold letter, in font sizes


def tsne_map(vectors: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Return [N, 2] t-SNE coordinates of [N, D] vectors; distances are those of unit vectors."""
    from sklearn.manifold import TSNE

    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(norms > 0, norms, 1)
    perplexity = min(30.0, (len(unit) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(unit)


def sample_rows(count: int, most: int = MOST_POINTS, *, seed: int = 0) -> np.ndarray:
    """Return at most ``most`` of ``count`` positions, ascending, drawn without replacement."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def tsne_plot(points: np.ndarray, classes: np.ndarray, names: Sequence[str]) -> str:
    """Draw the map; the `NAMED_AISLES` most frequent aisles are coloured and named.

    A name stands at the median of the aisle's densest cluster, or beside it, with a line, where
    names would overlap.

    Args:
        points: [N, 2] of `tsne_map`.
        classes: [N] positions in ``names``.
        names: of the aisles.
    """
    counts = np.bincount(classes, minlength=len(names))
    named = [c for c in np.argsort(-counts, kind="stable")[:NAMED_AISLES] if counts[c]]
    low, high = points.min(axis=0), points.max(axis=0)
    # In points of print, so that text and map have one measure.
    places = (points - low) / np.maximum(high - low, 1e-9) * (np.array(_MAP_INCHES) * 72 - 12) + 6
    width, height = (72 * side for side in _MAP_INCHES)
    with mpl.rc_context(STYLE | {"figure.constrained_layout.use": False}):
        figure = Figure(figsize=_MAP_INCHES, dpi=_MAP_DPI)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
        axes.set_axis_off()
        other = ~np.isin(classes, named)
        style: dict[str, Any] = {"s": 5, "linewidths": 0, "rasterized": True}
        axes.scatter(*places[other].T, color=_OTHER, alpha=0.35, **style)
        for color, aisle in zip(_AISLE_COLORS, named, strict=False):
            axes.scatter(*places[classes == aisle].T, color=color, alpha=0.75, **style)
        sizes = np.array([_label_size(names[aisle]) for aisle in named])
        centres = np.array([_densest(places[classes == aisle]) for aisle in named])
        spots = spread_labels(centres, sizes, np.array([width, height]))
        ink = mpl.rcParams["text.color"]
        for color, aisle, centre, (x, y), size in zip(
            _AISLE_COLORS, named, centres, spots, sizes, strict=False
        ):
            if np.abs(centre - (x, y)).max() > 2 * _LABEL_POINTS:
                axes.plot((centre[0], x), (centre[1], y), color=ink, linewidth=0.5)
            left = x - size[0] / 2
            axes.scatter(left + 4, y, s=26, color=color, edgecolors=ink, linewidths=0.6, zorder=3)
            axes.text(left + 9, y, names[aisle], va="center_baseline", fontsize=_LABEL_POINTS)
        return to_svg(figure, "tsne")


def spread_labels(centres: np.ndarray, sizes: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Return [L, 2] centres of boxes moved apart until none overlap and all lie in the frame.

    Args:
        centres: [L, 2] where the boxes would be.
        sizes: [L, 2] width and height of each.
        bounds: width and height of the frame. Where it is too small, some boxes still overlap.
    """
    spots = centres.astype(np.float64)
    for _ in range(500):
        spots = np.clip(spots, sizes / 2, bounds - sizes / 2)
        moved = False
        for i in range(len(spots)):
            for j in range(i):
                apart = spots[i] - spots[j]
                overlap = (sizes[i] + sizes[j]) / 2 - np.abs(apart)
                if overlap.min() > 1e-6:
                    axis = int(overlap.argmin())
                    push = (overlap[axis] / 2 + 0.1) * (1 if apart[axis] >= 0 else -1)
                    spots[i, axis] += push
                    spots[j, axis] -= push
                    moved = True
        if not moved:
            break
    return np.clip(spots, sizes / 2, bounds - sizes / 2)


def density_plot(cosine: np.ndarray, label: np.ndarray, limits: tuple[float, float]) -> str:
    """Draw the density of the cosines of each grade, with its median.

    Args:
        cosine: [P] of query and product.
        label: [P] 0 IR, 1 MR, 2 HR.
        limits: ends of the horizontal axis, so that two plots can be compared.
    """
    grid = np.linspace(*limits, _GRID)
    with mpl.rc_context(STYLE):
        figure, axes = new_figure("Cosine of query and product", "Density")
        for grade, (name, color) in enumerate(zip(GRADES, _GRADE_COLORS, strict=True)):
            values = cosine[label == grade]
            density = _density(values, grid)
            if density is None:
                continue
            median = float(np.median(values))
            axes.fill_between(grid, density, color=color, alpha=0.18, linewidth=0)
            axes.plot(grid, density, color=color, label=f"{name}, median {median:.2f}")
            axes.vlines(median, 0, np.interp(median, grid, density), color=color, linestyles="--")
        axes.set(xlim=limits)
        axes.set_ylim(bottom=0)
        if axes.get_legend_handles_labels()[0]:
            # Above the curves: within the axes it would hide one or the other.
            figure.legend(loc="outside upper left", ncols=len(GRADES), **_TIGHT)
        return to_svg(figure, "density")


_TIGHT: dict[str, Any] = {"handlelength": 1, "handletextpad": 0.4, "columnspacing": 1}


def separation(cosine: np.ndarray, label: np.ndarray) -> dict[str, Any]:
    """Return how far apart the cosines of the grades lie.

    Returns:
        ``median``: by grade; ``auc_hr_ir``, ``auc_hr_mr``, ``auc_mr_ir``: the share of pairs of
        values of the two grades in which the higher grade has the higher cosine (ties count half);
        ``overlap_hr_ir``: the area under both densities, 1 for equal ones, 0 for disjoint ones.
        ``None`` where a grade has no value, or too few for a density.
    """
    from sklearn.metrics import roc_auc_score

    values = [cosine[label == grade] for grade in range(len(GRADES))]

    def auc(high: int, low: int) -> float | None:
        if not len(values[high]) or not len(values[low]):
            return None
        truth = np.repeat([1, 0], [len(values[high]), len(values[low])])
        return float(roc_auc_score(truth, np.concatenate([values[high], values[low]])))

    medians = {
        name: float(np.median(found)) if len(found) else None
        for name, found in zip(GRADES, values, strict=True)
    }
    return {
        "median": medians,
        "auc_hr_ir": auc(HIGH, IRRELEVANT),
        "auc_hr_mr": auc(HIGH, MODERATE),
        "auc_mr_ir": auc(MODERATE, IRRELEVANT),
        "overlap_hr_ir": _overlap(values[HIGH], values[IRRELEVANT]),
    }


def cosine_limits(cosines: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """Return ends of an axis that holds the cosines of all encoders, with a margin."""
    low = min(float(values.min()) for values in cosines.values())
    high = max(float(values.max()) for values in cosines.values())
    margin = 0.05 * (high - low) + 1e-3
    return low - margin, high + margin


def _overlap(a: np.ndarray, b: np.ndarray) -> float | None:
    ends = cosine_limits({"a": a, "b": b}) if len(a) and len(b) else (0.0, 1.0)
    margin = ends[1] - ends[0]  # the tails of the kernels reach beyond the values
    grid = np.linspace(ends[0] - margin, ends[1] + margin, 4 * _GRID)
    densities = [_density(a, grid), _density(b, grid)]
    if densities[0] is None or densities[1] is None:
        return None
    step = grid[1] - grid[0]
    return float(np.minimum(densities[0], densities[1]).sum() * step)


def _density(values: np.ndarray, grid: np.ndarray) -> np.ndarray | None:
    """Return the Gaussian kernel density on ``grid``; ``None`` of values that have no spread."""
    from scipy.stats import gaussian_kde

    if len(values) < 3 or values.std() < 1e-6:
        return None
    return gaussian_kde(values.astype(np.float64))(grid)


def _densest(points: np.ndarray) -> np.ndarray:
    """Return [2] the median of the points around that which has the most others near it.

    An aisle may have several clusters, and the median of all its points then lies in none.
    """
    near = np.linalg.norm(points[:, None] - points, axis=2) < 0.06 * 72 * min(_MAP_INCHES)
    return np.median(points[near[near.sum(axis=1).argmax()]], axis=0)


def _label_size(name: str) -> tuple[float, float]:
    """Return width and height of a label with its dot, in points of print."""
    return len(name) * _CHARACTER * _LABEL_POINTS + 11, 1.25 * _LABEL_POINTS
