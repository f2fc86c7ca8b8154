"""The report of ``explain-ranker``: one HTML file that needs nothing beside it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from features.page import Picture, render
from ranking.explain_plots import importance_plot
from ranking.explain_tables import (
    agreement_table,
    contributions_table,
    importance_table,
    paper_table,
    reasons,
    request_title,
)

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
        title=f"What {document['model']} on {document['dataset']} rests on",
        subtitle=f"Week {document['week']}, slice {document['slice']}: "
        f"{document['requests']:,} of {document['slice_requests']:,} requests",
        caveat=document["caveat"],
        trained_on=document["week"] if document["week_was_trained_on"] else None,
        sample=_sample(document),
        paper=paper_table(document),
        pictures=[
            Picture(
                title=title, caption=caption, svg=importance_plot(document["groups"], key, label)
            )
            for key, title, label, caption in _FIGURES
        ],
        importance=replace(importance_table(document), title="All figures", note=_note(document)),
        agreement=agreement_table(document),
        request=request,
        request_title=request_title(request),
        cards=[_card(candidate, request) for candidate in request["candidates"][:_CARDS]],
        contributions=contributions_table(document),
        again="report",
        command=document["command"],
        origin={
            "Seed": str(document["seed"]),
            "Request records": document["data_fingerprint"],
            "Embedding tables": document["table_fingerprint"] or "none in this model",
        },
        versions=document["versions"],
    )


def _sample(document: Mapping[str, Any]) -> dict[str, str]:
    return {
        "AUC": f"{document['auc']:.5f}",
        "Norm. log loss": f"{document['normalized_log_loss']:.5f}",
        "Candidates": f"{document['rows']:,}",
        "Clicks": f"{document['positives']:,}",
        "Users": f"{document['users']:,}",
        "Permutations": str(document["permutations"]),
    }


def _note(document: Mapping[str, Any]) -> str:
    return (
        "Permutation: features of a request move between requests, those of a candidate between "
        "candidates, a purchase history as a whole; its cost is the mean over "
        f"{document['permutations']} permutations. Features that tell the same share their "
        "importance: each can be missed while the other is there. Integrated Gradients and "
        "Feature Ablation: mean size of what a group adds to the log odds of "
        f"{document['attributed_rows']:,} candidates, over the average candidate; the "
        f"contributions of Integrated Gradients miss {document['incompleteness']:.2%} of the "
        "change that they explain."
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
            {
                "name": name if given.get(name) is None else f"{name} = {_short(given[name])}",
                "amount": f"{value:+.2f}",
                "speaks_for": value > 0,
            }
            for name, value in reasons(candidate, _REASONS)
        ],
    }


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
