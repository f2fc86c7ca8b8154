"""What ``importance.json`` says, as tables and sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

from features.page import Table
from ranking.attribution_groups import EMBEDDINGS

METHODS = ("auc_loss", "log_loss_rise", "integrated_gradients", "feature_ablation")
TITLES = {
    "auc_loss": "permutation, AUC",
    "log_loss_rise": "permutation, log loss",
    "integrated_gradients": "integrated gradients",
    "feature_ablation": "feature ablation",
}

_NOTHING = "–"  # noqa: RUF001
_SHOWN = 10  # candidates of the explained request on the terminal
_REASONS = 3


def all_tables(document: Mapping[str, Any]) -> list[Table]:
    """Return the tables of the terminal."""
    return [
        importance_table(document),
        paper_table(document),
        agreement_table(document),
        request_table(document),
    ]


def importance_table(document: Mapping[str, Any]) -> Table:
    """Return the groups with each method's figure and rank, the most important first."""
    rows = []
    for group in document["groups"]:
        rank = group["ranks"]
        rows.append(
            [
                group["group"],
                f"{group['auc_loss']:z.5f}",
                interval(group["auc_loss_interval"]),
                str(rank["auc_loss"]),
                f"{group['log_loss_rise']:z.5f}",
                interval(group["log_loss_rise_interval"]),
                str(rank["log_loss_rise"]),
                f"{group['integrated_gradients']:.3f}",
                str(rank["integrated_gradients"]),
                f"{group['feature_ablation']:.3f}",
                str(rank["feature_ablation"]),
            ]
        )
    header = ["group", "AUC lost", "95 % interval", "rank", "norm. log loss gained"]
    header += ["95 % interval", "rank", "int. gradients", "rank", "ablation", "rank"]
    return Table(title=scope(document), header=header, rows=rows)


def agreement_table(document: Mapping[str, Any]) -> Table:
    """Return how alike the methods rank the groups."""
    rows = [
        [
            " and ".join(TITLES[method] for method in pair["methods"]),
            _coefficient(pair["spearman"]),
            _coefficient(pair["kendall"]),
        ]
        for pair in document["agreement"]
    ]
    title = f"Agreement of the ranks of {len(document['groups'])} groups"
    return Table(title=title, header=["methods", "Spearman", "Kendall"], rows=rows)


def request_table(document: Mapping[str, Any]) -> Table:
    """Return the likeliest candidates of the explained request, each with its reasons."""
    request = document["request"]
    rows = [
        [
            str(candidate["rank"]),
            str(candidate["product_id"]),
            f"{candidate['probability']:.4f}",
            "yes" if candidate["clicked"] else "no",
            ", ".join(f"{name} {value:+.2f}" for name, value in reasons(candidate)),
        ]
        for candidate in request["candidates"][:_SHOWN]
    ]
    count = len(request["candidates"])
    note = f"The first {_SHOWN} of {count} candidates." if count > _SHOWN else ""
    header = ["rank", "product", "probability", "clicked", "why (log odds over the request's mean)"]
    return Table(title=request_title(request), header=header, rows=rows, note=note)


def contributions_table(document: Mapping[str, Any]) -> Table:
    """Return every group's contribution to every candidate of the explained request."""
    names = [group["group"] for group in document["groups"]]
    rows = [
        [
            str(candidate["product_id"]),
            f"{candidate['probability']:.4f}",
            "yes" if candidate["clicked"] else "no",
            *(f"{candidate['contributions'][name]:+.3f}" for name in names),
        ]
        for candidate in document["request"]["candidates"]
    ]
    header = ["product", "probability", "clicked", *names]
    return Table(title="All contributions", header=header, rows=rows)


def reasons(candidate: Mapping[str, Any], most: int = _REASONS) -> list[tuple[str, float]]:
    """Return the greatest contributions of a candidate, of either sign, the greatest first."""
    found = sorted(candidate["contributions"].items(), key=lambda item: -abs(item[1]))
    return [(name, value) for name, value in found[:most] if value]


def request_title(request: Mapping[str, Any]) -> str:
    """Return which request it is."""
    return (
        f"Request {request['request_id']}: '{request['query']}', "
        f"{request['purchases_in_history']:,} purchases in the history"
    )


def scope(document: Mapping[str, Any]) -> str:
    """Return what the importances are told for."""
    return (
        f"{document['dataset']}, week {document['week']}, slice {document['slice']}: "
        f"{document['requests']:,} requests, {document['rows']:,} candidates, "
        f"{document['positives']:,} clicks; AUC {document['auc']:.5f}, "
        f"normalised log loss {document['normalized_log_loss']:.5f}"
    )


def paper_table(document: Mapping[str, Any]) -> Table:
    """Return where the paper's first three features stand here, by each method."""
    rows = []
    for name, found in document["paper_ranks"].items():
        inside = "" if found["group"] == name else f" (in '{found['group']}')"
        ranks = [str(found["ranks"][method]) for method in METHODS]
        rows.append([name + inside, str(found["paper"]), *ranks])
    note = "The paper's ranks are by permutation. "
    missing = [name for name in EMBEDDINGS if name not in document["paper_ranks"]]
    if missing:
        note += f"Not in this model: {', '.join(missing)}. "
    return Table(
        title=f"The paper's first three features: their ranks among {len(document['groups'])}",
        header=["feature", "paper", *(TITLES[method] for method in METHODS)],
        rows=rows,
        note=note.strip(),
    )


def interval(ends: Sequence[float]) -> str:
    """Return an interval as text."""
    return f"{ends[0]:z.5f} to {ends[1]:z.5f}"


def _coefficient(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.3f}"
