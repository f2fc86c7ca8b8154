"""What the product tasks have to show: tables and one HTML page that needs nothing beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from features.page import Picture, Table, render

_NOTHING = "–"  # noqa: RUF001
_DERIVED = (
    "The relevance labels are derived from attributes of the products; where the aisle is among "
    "these, an encoder trained on them has indirectly seen it."
)


def tables(document: Mapping[str, Any]) -> list[Table]:
    """Return the tables of the content of ``product_tasks.json``, without recall by aisle."""
    found = []
    if document["aisle"]:
        found += [_aisle_table(document["aisle"]), _difference_table("aisle", document)]
    if document["relevance"]:
        found += [
            _relevance_table(document["relevance"]),
            _difference_table("relevance", document),
            _cosine_table(document["relevance"]["cosines"]),
        ]
    return [table for table in found if table.rows]


def recall_table(aisle: Mapping[str, Any]) -> Table:
    """Return the mean recall of each aisle with each embedding, the largest aisle first."""
    classes = sorted(aisle["classes"], key=lambda found: -found["products"])
    rows = [
        [
            found["name"],
            f"{found['products']:,}{'*' if found['low_support'] else ''}",
            *(f"{row['recall'][found['name']]:.3f}" for row in aisle["rows"]),
        ]
        for found in classes
    ]
    header = [f"{row['embedding']}, {row['encoder']}" for row in aisle["rows"]]
    return Table(
        title="Recall by aisle",
        header=["aisle", "products", *header],
        rows=rows,
        note="* Low support: fewer products than the median aisle. Mean over the seeds.",
    )


def render_page(document: Mapping[str, Any], pictures: Sequence[Picture]) -> str:
    """Return the page that shows the content of ``product_tasks.json`` with its pictures."""
    relevance = document["relevance"]
    derived = bool(relevance) and "derived" in relevance["sources"]
    seeds = document["seeds"]
    return render(
        Path(__file__).with_name("product_tasks.html"),
        title=f"Product tasks on {document['dataset']}",
        subtitle=f"Small classifiers on frozen embeddings, {seeds} "
        f"{'seed' if seeds == 1 else 'seeds'} (mean ± standard deviation)",
        caveat=document["caveat"],
        notices=[*document["skipped"], *([_DERIVED] if derived else [])],
        pictures=pictures,
        tables=tables(document),
        recall=recall_table(document["aisle"]) if document["aisle"] else None,
        again="page",
        command=document["command"],
        origin={f"Encoder, {name}": value for name, value in document["encoders"].items()},
        versions=document["versions"],
    )


def _aisle_table(aisle: Mapping[str, Any]) -> Table:
    left_out = ", ".join(f"{name} ({count})" for name, count in aisle["left_out"].items())
    return Table(
        title="Aisle prediction",
        header=["embedding", "encoder", "macro F1", "recall, low support", "recall, others"],
        rows=[
            [
                row["embedding"],
                row["encoder"],
                _spread(row["macro_f1"]),
                _spread(row["recall_low_support"]),
                _spread(row["recall_other"]),
            ]
            for row in aisle["rows"]
        ],
        note=f"{len(aisle['classes'])} aisles, {aisle['products']:,} products, "
        f"{aisle['test_products']:,} of them to test on. Low support: aisles with fewer products "
        "than the median aisle. Always the largest aisle: macro F1 "
        f"{_spread(aisle['majority_macro_f1'])}."
        + (f" Left out, with fewer than 5 products: {left_out}." if left_out else ""),
    )


def _relevance_table(relevance: Mapping[str, Any]) -> Table:
    counts = relevance["pairs"]
    total = sum(counts.values())
    shares = ", ".join(f"{grade} {count / total:.0%}" for grade, count in counts.items())
    return Table(
        title="Relevance prediction",
        header=["features", "encoder", "macro F1", *(f"recall {grade}" for grade in counts)],
        rows=[
            [
                row["features"],
                row["encoder"],
                _spread(row["macro_f1"]),
                *(_spread(row["recall"].get(grade)) for grade in counts),
            ]
            for row in relevance["rows"]
        ],
        note=f"{total:,} pairs of {relevance['queries']:,} held-out queries ({shares}), "
        f"{relevance['test_pairs']:,} of them to test on; no query is in both parts. Half of the "
        "IR pairs are dropped in training. Concatenated is the paper's form; the other one, beyond "
        "the paper, also has the elementwise product and the cosine. Always the most frequent "
        f"grade: macro F1 {_spread(relevance['majority_macro_f1'])}.",
    )


def _difference_table(task: str, document: Mapping[str, Any]) -> Table:
    return Table(
        title=f"{task.capitalize()} prediction, paired differences",
        header=["difference", "macro F1"],
        rows=[
            [row["of"], _spread(row["macro_f1"], signed=True)]
            for row in document[task]["differences"]
        ],
        note=f"Mean and standard deviation of the differences over {document['seeds']} seeds.",
    )


def _cosine_table(cosines: Mapping[str, Mapping[str, Any]]) -> Table:
    figures = ("auc_hr_ir", "auc_hr_mr", "auc_mr_ir", "overlap_hr_ir")
    return Table(
        title="Cosine of query and product",
        header=[
            *("encoder", "median IR", "median MR", "median HR"),
            *("AUC HR/IR", "AUC HR/MR", "AUC MR/IR", "overlap HR/IR"),
        ],
        rows=[
            [
                encoder,
                *(_number(median) for median in found["median"].values()),
                *(_number(found[name]) for name in figures),
            ]
            for encoder, found in cosines.items()
        ],
        note="AUC HR/IR: how often a highly relevant pair has a higher cosine than an irrelevant "
        "one. Overlap: area under both densities, 0 where they are apart.",
    )


def _spread(value: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """Return mean and, of several seeds, standard deviation."""
    if value is None:
        return _NOTHING
    mean = f"{value['mean']:+.3f}" if signed else f"{value['mean']:.3f}"
    return mean if value["std"] is None else f"{mean} ± {value['std']:.3f}"


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.3f}"
