"""The report of ``explain-ranker``: one HTML file that needs nothing beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ranking.explain_plots import importance_plot
from ranking.explain_tables import (
    agreement_table,
    importance_table,
    paper_table,
    reasons,
    request_title,
)
from ranking.page import render

_REASONS = 6
_CARDS = 12
_INTERVALS = "Lines are 95 % intervals over users and permutations."
_FIGURES = (
    ("auc_loss", "Permutation: AUC", "AUC lost", _INTERVALS),
    ("log_loss_rise", "Permutation: log loss", "normalised log loss gained", _INTERVALS),
    (
        "integrated_gradients",
        "Integrated Gradients",
        "mean size of the contribution (log odds)",
        "From the average candidate of the sample to each candidate.",
    ),
    (
        "feature_ablation",
        "Feature Ablation",
        "mean size of the change (log odds)",
        "With the average candidate's values in place of the candidate's own.",
    ),
)


def render_page(document: Mapping[str, Any]) -> str:
    """Return the page that shows the content of ``importance.json``."""
    request = document["request"]
    return render(
        Path(__file__).with_name("explain.html"),
        document=document,
        figures=[
            (title, caption, importance_plot(document["groups"], key, label))
            for key, title, label, caption in _FIGURES
        ],
        paper=paper_table(document),
        importance=importance_table(document),
        agreement=agreement_table(document),
        request=request,
        request_title=request_title(request),
        cards=[_card(candidate, request) for candidate in request["candidates"][:_CARDS]],
        provenance={
            "Seed": str(document["seed"]),
            "Request records": document["data_fingerprint"],
            "Embedding tables": document["table_fingerprint"] or "none in this model",
        },
    )


def _card(candidate: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page shows of a candidate: who it is and what speaks for and against it."""
    given = {**request["values"], **candidate["values"]}
    return {
        "rank": candidate["rank"],
        "name": candidate["title"] or f"product {candidate['product_id']}",
        "product_id": candidate["product_id"],
        "clicked": candidate["clicked"],
        "probability": f"{candidate['probability']:.2%}",
        "reasons": [
            (name, _short(given.get(name)), f"{value:+.2f}", value > 0)
            for name, value in reasons(candidate, _REASONS)
        ],
    }


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
