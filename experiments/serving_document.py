"""What ``serving.json`` says: the measured cases with their limits, and the headline figures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from experiments.serving_cases import FETCHED, FUSED, THIN, Case, Plan, Variant, find_case
from experiments.serving_roofline import from_json, limit
from experiments.serving_worker import LIMITS, QUALITY, Results

P99_MS_AT_MOST = 1.0
OVER_LIMIT_AT_MOST = 3.0
FETCHED_OVER_FUSED_AT_LEAST = 5.0

POPULARITIES = ("zipf", "uniform")


def make_document(results: Results, plan: Plan, cases: Sequence[Case]) -> dict[str, Any]:
    """Return the measured part of ``serving.json``.

    Args:
        results: all of the cases, their variants, limits and quality.
        plan: that the cases are of.
        cases: in the order to show.
    """
    limits = _measured(results, LIMITS)
    measured = [
        case.about() | _measured(results, case.key) | _limit(case, limits) for case in cases
    ]
    closed = [case for case in measured if case["load"] is None]
    _, rates = from_json(limits)
    return {
        "headline": headline(closed, plan.headline),
        "cases": closed,
        "load": [case for case in measured if case["load"] is not None],
        "variants": _variants(results, list(dict.fromkeys(case.variant for case in cases))),
        "quality": _measured(results, QUALITY),
        "rates": rates.about(),
        "plan": asdict(plan),
    }


def _measured(results: Results, name: str) -> dict[str, Any]:
    found = results.load(name)
    assert found is not None, f"{name} was measured before"
    return found


def _limit(case: Case, limits: dict[str, Any]) -> dict[str, Any]:
    """Return the limit of a case; that of a fetching one is none of this machine's memory."""
    if case.variant.mode == "fetched" or case.load is not None:
        return {}
    work, rates = from_json(limits)
    return limit(
        work,
        rates,
        candidates=case.candidates,
        history=case.history,
        table_dtype=case.variant.table_dtype,
        popularity=case.popularity,
    )


def _variants(results: Results, variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Return memory of each variant, and how far its probabilities are from the float32 model's."""
    found = {variant: dict(_measured(results, variant.name)) for variant in variants}
    exact = next(
        (
            about["probabilities"]
            for variant, about in found.items()
            if (variant.mode, variant.runtime, variant.table_dtype)
            == ("fused", "torchscript", "float32")
        ),
        None,
    )
    rows = []
    for variant, about in found.items():
        own = about.pop("probabilities")
        about["largest_difference"] = None
        if exact is not None and own is not None:
            about["largest_difference"] = float(np.abs(np.array(own) - np.array(exact)).max())
        rows.append(asdict(variant) | about)
    return rows


def headline(cases: list[dict[str, Any]], shape: tuple[int, int]) -> dict[str, Any]:
    """Return the figures that matter, for each popularity of ids, and what they should be.

    Args:
        cases: without those under load.
        shape: candidates and purchases.
    """
    found: dict[str, Any] = {
        "candidates": shape[0],
        "history": shape[1],
        "fused_p99_ms_at_most": P99_MS_AT_MOST,
        "fused_p50_over_limit_at_most": OVER_LIMIT_AT_MOST,
        "fetched_over_fused_p99_at_least": FETCHED_OVER_FUSED_AT_LEAST,
    }
    for popularity in POPULARITIES:
        fused, fetched, thin = (
            find_case(cases, variant, shape, popularity=popularity)
            for variant in (FUSED, FETCHED, THIN)
        )
        assert fused is not None
        assert fetched is not None
        assert thin is not None
        found[popularity] = {
            "fused_p50_ms": fused["p50_ms"],
            "fused_p99_ms": fused["p99_ms"],
            "limit_ms": fused["limit_ms"],
            "fused_p50_over_limit": fused["p50_ms"] / fused["limit_ms"],
            "fused_p50_over_limit_at_shapes": fused["p50_ms"] / fused["limit_at_shapes_ms"],
            "fetched_p99_ms": fetched["p99_ms"],
            "fetched_over_fused_p99": fetched["p99_ms"] / fused["p99_ms"],
            "delay_ms_to_wanted": max(
                FETCHED_OVER_FUSED_AT_LEAST * fused["p99_ms"] - fetched["p99_ms"], 0.0
            ),
            "fetched_thin_p99_ms": thin["p99_ms"],
            "fetched_thin_over_fused_p99": thin["p99_ms"] / fused["p99_ms"],
            "fetching_over_dense": fetching_over_dense(fetched),
            "fetching_thin_over_dense": fetching_over_dense(thin),
        }
    return found


def fetching_over_dense(case: Mapping[str, Any]) -> float:
    """Return the mean time of all stages before the dense part over that of the dense part."""
    means = {name: stage["mean"] for name, stage in case["stages_ms"].items()}
    dense = means.pop("dense")
    return sum(means.values()) / dense
