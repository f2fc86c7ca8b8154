"""``label-relevance report``: what labels are, as a page, as JSON and as a table."""

import json
from pathlib import Path
from typing import Any

from embeddings.catalog import read_catalog
from embeddings.labeling.label import FIGURES
from embeddings.labeling.label_files import part_paths, summary
from embeddings.labeling.options import Report
from embeddings.labeling.report_data import LabelTables
from features.console import print_table, say
from features.errors import BadInputError
from features.files import write_text

JSON = "report.json"
PAGE = "report.html"


def run(options: Report, command: str) -> None:
    """Describe labels and show the most of it.

    Raises:
        BadInputError: as `report` does.
    """
    from embeddings.labeling.report_page import tables

    content = report(options, command)
    for table in tables(content):
        print_table(table.title, table.header, table.rows)
    say(f"{options.output / PAGE} shows all of it, and pairs to read")


def report(options: Report, command: str = "") -> dict[str, Any]:
    """Write ``report.json`` and ``report.html``; returns the content of the former.

    Args:
        options: the labels, the dataset and where to write.
        command: the command line, for the record.

    Raises:
        BadInputError: there are no labels, or a file cannot be read.
    """
    from embeddings.labeling.report_page import page

    part_paths(options.labels)
    catalog = read_catalog(options.data)
    with LabelTables.open(options.labels, options.data, catalog, options.output) as tables:
        content = {
            "command": command,
            "folder": str(options.labels),
            "data": str(options.data),
            "labelling": _labelling(options.labels),
            **summary(options.labels),
            "distribution": tables.distribution(),
            "coverage": tables.coverage(),
            "disagreement": tables.disagreement(),
            "frequent_queries": tables.frequent_queries(),
            "sample": tables.sample(options.seed),
        }
    if not content["labelled"]:
        raise BadInputError(f"{options.labels}: its files hold no label")
    write_text(options.output / JSON, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_text(options.output / PAGE, page(content))
    return content


def _labelling(labels: Path) -> dict[str, Any] | None:
    """Return what the labels' own record tells; ``None`` where labelling has not come to an end."""
    path = labels / FIGURES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
