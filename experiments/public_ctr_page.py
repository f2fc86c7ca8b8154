"""The Markdown page of a public CTR dataset's result."""

from typing import Any

_METRICS = ("auc", "log_loss")


def public_page(document: dict[str, Any]) -> str:
    """Return ``public.md`` for the content of ``public.json``."""
    parts = [
        f"# {document['dataset']}: {document['model']}\n",
        _means(document),
        _comparison(document["reference"]),
        "## Seeds\n",
        _seeds(document["seeds"]),
        "## Data\n",
        _data(document["data"]),
        "## Settings\n",
        _settings(document["settings"]),
        f"Versions: {', '.join(f'{k} {v}' for k, v in document['versions'].items())}.\n",
    ]
    return "\n".join(part for part in parts if part)


def _table(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]
    return "\n".join(lines) + "\n"


def _means(document: dict[str, Any]) -> str:
    seeds = len(document["seeds"])
    rows = [[f"here, mean of {seeds} seed{'s' * (seeds > 1)}", *_cells(document["metrics"])]]
    if reference := document["reference"]:
        rows.append([f"BARS, mean of {reference['runs']} runs", *_cells(reference["metrics"])])
        if not reference["differences"]:
            rows.append(["difference", *_gaps(document["metrics"], reference["metrics"])])
    return _table(["Test rows", "AUC", "log loss"], rows)


def _gaps(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [f"{ours[f'{m}_mean'] - theirs[f'{m}_mean']:+.5f}" for m in _METRICS]


def _cells(metrics: dict[str, Any]) -> list[str]:
    cells = []
    for metric in _METRICS:
        mean, deviation = metrics[f"{metric}_mean"], metrics[f"{metric}_std"]
        cells.append(f"{mean:.5f}" + ("" if deviation is None else f" ± {deviation:.5f}"))
    return cells


def _comparison(reference: dict[str, Any] | None) -> str:
    if reference is None:
        return "± is the standard deviation over the seeds.\n"
    text = (
        "± is the standard deviation over seeds or runs. BARS's figures are those of "
        f"{reference['name']} ({reference['source']}); its leaderboard prints the best run, the "
        "mean is what compares with a mean.\n"
    )
    if reference["differences"]:
        text += "\nThey are not comparable here: " + "; ".join(reference["differences"]) + ".\n"
    return text


def _seeds(seeds: list[dict[str, Any]]) -> str:
    header = ["Seed", "AUC", "log loss", "validation AUC", "best epoch", "epochs", "rows/s"]
    rows = [
        [
            str(one["seed"]),
            *(f"{one[name]:.5f}" for name in ("auc", "log_loss", "valid_auc")),
            str(one["best_epoch"]),
            str(one["epochs"]),
            f"{one['rows_per_second']:,.0f}",
        ]
        for one in seeds
    ]
    return _table(header, rows)


def _data(data: dict[str, Any]) -> str:
    rows = [
        [split, f"{data['rows'][split]:,}", f"{data['positives'][split]:,}"]
        for split in data["rows"]
    ]
    return (
        _table(["Split", "rows", "positives"], rows)
        + f"\n{data['categorical']} categorical and {data['numeric']} numeric fields, "
        + f"{data['table_rows']:,} rows in the embedding table. "
        + f"Fingerprint of the files: `{data['fingerprint']}`.\n"
    )


def _settings(settings: dict[str, Any]) -> str:
    lines = [f"{name} = {value}" for name, value in settings.items()]
    return "```\n" + "\n".join(lines) + "\n```\n"
