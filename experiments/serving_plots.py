"""The serving benchmark's plots."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.ticker import FuncFormatter, NullFormatter

from experiments.serving_cases import FETCHED, FUSED, THIN, find_case
from features.figures import COLORS, STYLE, new_figure, to_svg
from features.page import Picture

_COLOR = {FUSED: COLORS[0], FETCHED: COLORS[1], THIN: COLORS[2]}
_LABEL = {FUSED: "fused", FETCHED: "fetched", THIN: "fetched, thinnest client"}
_STAGES = ("lookups", "fetch", "decode", "pool", "dense")
_STAGE_COLORS = ("#3478c9", "#d9762b", "#e3b23c", "#8a6fc2", "#2f9e78")


def pictures(document: Mapping[str, Any]) -> dict[str, Picture]:
    """Return the plots by the name of their file.

    Args:
        document: the content of ``serving.json``.
    """
    history = document["headline"]["history"]
    shape = f"{document['headline']['candidates']} candidates, history of {history}"
    found = {
        "latency": Picture(
            title=f"Latency by candidates, history of {history}",
            caption="p50 (line) and p99 (dashed); dotted: the limit of this machine, fused.",
            svg=latency_plot(document),
        ),
        "stages": Picture(
            title=f"Where the time goes, {shape}",
            caption="Means; ids by Zipf's law.",
            svg=stages_plot(document),
        ),
    }
    if document["load"]:
        found["load"] = Picture(
            title=f"Latency under load, {shape}",
            caption="p50 (line) and p99 (dashed), counted from the planned arrival.",
            svg=load_plot(document),
        )
    return found


def latency_plot(document: Mapping[str, Any]) -> str:
    """Draw p50 and p99 over the number of candidates, at the headline's history."""
    history, counts = document["headline"]["history"], document["plan"]["candidates"]
    with mpl.rc_context(STYLE):
        figure, axes = new_figure("Candidates", "ms")
        for variant in (FUSED, FETCHED):
            cases = [find_case(document["cases"], variant, (c, history)) for c in counts]
            for percentile, style in (("p50_ms", "o-"), ("p99_ms", "o--")):
                axes.plot(
                    counts,
                    [case[percentile] for case in cases if case],
                    style,
                    color=_COLOR[variant],
                    markersize=3.5,
                    label=_LABEL[variant] if percentile == "p50_ms" else None,
                )
            if variant == FUSED:
                limits = [case["limit_ms"] for case in cases if case]
                axes.plot(counts, limits, ":", color=_COLOR[variant], label="limit, fused")
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.legend(loc="best")
        return to_svg(figure, "serving-latency")


def stages_plot(document: Mapping[str, Any]) -> str:
    """Draw the mean time of each stage, of the headline's request."""
    shape = (document["headline"]["candidates"], document["headline"]["history"])
    with mpl.rc_context(STYLE):
        figure, axes = new_figure("ms", "")
        variants = (THIN, FETCHED, FUSED)
        drawn: set[str] = set()
        for place, variant in enumerate(variants):
            case = find_case(document["cases"], variant, shape)
            assert case is not None
            start = 0.0
            for stage, color in zip(_STAGES, _STAGE_COLORS, strict=True):
                width = case["stages_ms"].get(stage, {}).get("mean")
                if width is None:
                    continue
                label = None if stage in drawn else stage
                axes.barh(place, width, left=start, height=0.55, color=color, label=label)
                drawn.add(stage)
                start += width
        axes.set_yticks(range(len(variants)), [_LABEL[v].replace(", ", ",\n") for v in variants])
        axes.grid(visible=False, axis="y")
        axes.set_ylim(-0.6, len(variants) + 0.1)
        axes.legend(loc="upper right", ncols=3)
        return to_svg(figure, "serving-stages")


def load_plot(document: Mapping[str, Any]) -> str:
    """Draw p50 and p99 over the rate at which requests arrive."""
    with mpl.rc_context(STYLE):
        figure, axes = new_figure("Requests a second", "ms")
        for variant in (FUSED, FETCHED):
            cases = [case for case in document["load"] if case["mode"] == variant.mode]
            rates = [case["offered_per_second"] for case in cases]
            for percentile, style in (("p50_ms", "o-"), ("p99_ms", "o--")):
                axes.plot(
                    rates,
                    [case[percentile] for case in cases],
                    style,
                    color=_COLOR[variant],
                    markersize=3.5,
                    label=_LABEL[variant] if percentile == "p50_ms" else None,
                )
        axes.set(yscale="log", xlim=(0, None))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(loc="best")
        return to_svg(figure, "serving-load")
