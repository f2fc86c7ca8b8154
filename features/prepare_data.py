"""``prepare-data``: build a dataset folder from a named public source.

Builders are functions ``build(output: Path, *, source: Path | None) -> None`` that packages offer
under the entry-point group ``dashclip.datasets``; each writes a dataset folder's files into
``output``, an existing empty folder.
"""

import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from features import columns
from features.console import print_table, run_command, say, stdout
from features.errors import BadInputError
from features.files import atomic_folder
from features.schema import DatasetSchema

if TYPE_CHECKING:
    import duckdb

GROUP = "dashclip.datasets"
SUMMARY = "summary.json"

_LABELS = ("irrelevant", "moderately", "highly")  # in the order of the labels
_AGGREGATES: dict[str, dict[str, tuple[str, str]]] = {  # by table and name: column and SQL
    "catalog": {
        "products": (columns.PRODUCT_ID, "count(*)"),
        "products_with_aisle": (columns.AISLE, f"count({columns.AISLE})"),
        "products_with_image": (columns.IMAGE, f"count({columns.IMAGE})"),
    },
    "purchases": {"purchases": (columns.PRODUCT_ID, "count(*)")},
    "relevance": {
        "judgements": (columns.LABEL, "count(*)"),
        "judged_queries": (columns.QUERY, f"count(DISTINCT {columns.QUERY})"),
        **{
            name: (columns.LABEL, f"count(*) FILTER ({columns.LABEL} = {label})")
            for label, name in enumerate(_LABELS)
        },
    },
    "impressions": {
        "impressions": (columns.REQUEST_ID, "count(*)"),
        "requests": (columns.REQUEST_ID, f"count(DISTINCT {columns.REQUEST_ID})"),
        "clicks": (columns.CLICKED, f"count(*) FILTER ({columns.CLICKED})"),
        "first_request": (columns.REQUESTED_AT, f"min({columns.REQUESTED_AT})"),
        "last_request": (columns.REQUESTED_AT, f"max({columns.REQUESTED_AT})"),
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Build a dataset folder from a named public source."""

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = None
    """The dataset's name; --list shows the names."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """The folder to write; it appears whole or not at all."""
    source: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """A folder with the source's own files, where they are not the installed ones."""
    list: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show the names of the datasets and stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a dataset folder holds, as ``summary.json`` and the printed table say it.

    A dataset without impressions or purchases has 0 of them and no times.

    Attributes:
        judgements: graded pairs of a query and a product.
        judged_queries: distinct queries among them.
        labels: how many of them are irrelevant, moderately and highly relevant.
    """

    name: str
    products: int
    products_with_aisle: int
    products_with_image: int
    purchases: int
    judgements: int
    judged_queries: int
    labels: list[int]
    impressions: int
    requests: int
    clicks: int
    click_rate: float
    first_request: str
    last_request: str
    bytes: int
    caveat: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(Options, prepare, prog="prepare-data", arguments=arguments)


def prepare(options: Options) -> None:
    """Do what ``options`` say.

    Raises:
        BadInputError: no or an unknown name, no output folder, one that holds something else, or
            a source that the builder refuses.
    """
    if options.list:
        for name in sorted(_datasets()):
            stdout.print(name, highlight=False)
        return
    if options.name is None or options.output is None:
        raise BadInputError(
            "name a dataset and a folder: prepare-data NAME --output DIR, or --list"
        )
    if options.source is not None and not options.source.is_dir():
        raise BadInputError(f"{options.source}: no such folder")
    _show(ensure_dataset(options.name, options.output, source=options.source))


def ensure_dataset(name: str, output: Path, *, source: Path | None = None) -> Summary:
    """Build the dataset ``name`` in the folder ``output`` if it is not there already.

    Raises:
        BadInputError: the name is unknown, the folder holds something else, or the builder
            refuses the source.
    """
    builder = _find(name, _datasets())
    if _stands(name, output):
        say(f"{output}: {name} is there already")
        return _read_summary(output)
    say(f"building {name} in {output}")
    with atomic_folder(output) as scratch:
        builder.load()(scratch, source=source)
        summary = summarise(scratch)
        (scratch / SUMMARY).write_text(json.dumps(asdict(summary), indent=2) + "\n", "utf-8")
    return summary


def summarise(folder: Path) -> Summary:
    """Return the counts, span and size of the dataset ``folder``.

    Raises:
        BadInputError: its ``dataset.toml`` is missing or wrong, or it has no catalog.
    """
    import duckdb

    schema = DatasetSchema.load(folder)
    if not (folder / "catalog.parquet").exists():
        raise BadInputError(f"{folder / 'catalog.parquet'}: no such file; a dataset has products")
    found: dict[str, Any] = {}
    with duckdb.connect(config={"threads": 2}) as connection:
        for table, aggregates in _AGGREGATES.items():
            found |= _ask(connection, folder / f"{table}.parquet", aggregates)
    for name in ("first_request", "last_request"):
        found[name] = found[name].isoformat() if found[name] else ""
    found["labels"] = [found.pop(label) for label in _LABELS]
    return Summary(
        name=schema.name,
        click_rate=found["clicks"] / found["impressions"] if found["impressions"] else 0.0,
        bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        caveat=schema.caveat,
        **found,
    )


def _ask(
    connection: "duckdb.DuckDBPyConnection", path: Path, aggregates: dict[str, tuple[str, str]]
) -> dict[str, Any]:
    """Return aggregates of a table by name: 0 where it, or the column, is not there."""
    nothing: dict[str, Any] = dict.fromkeys(aggregates, 0)
    if not path.exists():
        return nothing
    files = [str(path / "*.parquet" if path.is_dir() else path)]
    described = connection.execute("DESCRIBE FROM read_parquet(?)", files).fetchall()
    there = {row[0] for row in described}
    asked = {name: sql for name, (column, sql) in aggregates.items() if column in there}
    row = connection.execute(
        f"SELECT {', '.join(['count(*)', *asked.values()])} FROM read_parquet(?)", files
    ).fetchone()
    assert row is not None
    return nothing | dict(zip(asked, row[1:], strict=True))


def _read_summary(output: Path) -> Summary:
    """Return the summary of a standing dataset; an older version's is made anew."""
    content = json.loads((output / SUMMARY).read_text(encoding="utf-8"))
    if set(content) == {field.name for field in fields(Summary)}:
        return Summary(**content)
    return summarise(output)


def _datasets() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _find(name: str, known: dict[str, EntryPoint]) -> EntryPoint:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"
        raise BadInputError(f"no dataset is named '{name}'; {hint}")
    return known[name]


def _stands(name: str, output: Path) -> bool:
    """Tell whether ``output`` holds the whole dataset already.

    Raises:
        BadInputError: it is a file, or a folder with anything else in it.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if (output / SUMMARY).is_file() and DatasetSchema.load(output).name == name:
        return True
    raise BadInputError(f"{output}: exists and is not the dataset '{name}'; name another folder")


def _show(summary: Summary) -> None:
    rows = [
        ("products", f"{summary.products:,}"),
        ("products with an aisle", f"{summary.products_with_aisle:,}"),
        ("products with an image", f"{summary.products_with_image:,}"),
    ]
    if summary.purchases:
        rows.append(("purchases", f"{summary.purchases:,}"))
    if summary.impressions:
        rows += [
            ("impressions", f"{summary.impressions:,}"),
            ("requests", f"{summary.requests:,}"),
            ("clicked", f"{summary.clicks:,} ({summary.click_rate:.3%})"),
            ("first request", summary.first_request),
            ("last request", summary.last_request),
        ]
    if summary.judgements:
        rows += [
            ("graded query-product pairs", f"{summary.judgements:,}"),
            ("graded queries", f"{summary.judged_queries:,}"),
        ]
        for name, count in zip(_LABELS, summary.labels, strict=True):
            relevant = name if name == "irrelevant" else f"{name} relevant"
            rows.append((relevant, f"{count:,} ({count / summary.judgements:.1%})"))
    rows.append(("size", f"{summary.bytes / 1e6:.1f} MB"))
    print_table(summary.name, ("what", "how much"), rows)
    if summary.caveat:
        stdout.print(summary.caveat, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
