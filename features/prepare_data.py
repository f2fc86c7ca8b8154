"""``prepare-data``: build a dataset folder from a named public source.

Builders are functions ``build(output: Path, *, source: Path | None) -> None`` that packages offer
under the entry-point group ``dashclip.datasets``; each writes a dataset folder's files into
``output``, an existing empty folder.
"""

import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated

import tyro

from features import columns
from features.console import print_table, run_command, say, stdout
from features.errors import BadInputError
from features.files import atomic_folder
from features.schema import DatasetSchema

GROUP = "dashclip.datasets"
SUMMARY = "summary.json"


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
    """What a dataset folder holds, as ``summary.json`` and the printed table say it."""

    name: str
    products: int
    purchases: int
    judgements: int
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
        return Summary(**json.loads((output / SUMMARY).read_text(encoding="utf-8")))
    say(f"building {name} in {output}")
    with atomic_folder(output) as scratch:
        builder.load()(scratch, source=source)
        summary = summarise(scratch)
        (scratch / SUMMARY).write_text(json.dumps(asdict(summary), indent=2) + "\n", "utf-8")
    return summary


def summarise(folder: Path) -> Summary:
    """Return the counts, span and size of the dataset ``folder``.

    Raises:
        BadInputError: its ``dataset.toml`` is missing or wrong.
    """
    import duckdb

    schema = DatasetSchema.load(folder)

    def ask(name: str, expressions: str) -> tuple:
        path = folder / f"{name}.parquet"
        files = str(path / "*.parquet" if path.is_dir() else path)
        row = connection.execute(f"SELECT {expressions} FROM read_parquet(?)", [files]).fetchone()
        assert row is not None
        return row

    with duckdb.connect(config={"threads": 2}) as connection:
        rows, requests, clicks, first, last = ask(
            "impressions",
            f"count(*), count(DISTINCT {columns.REQUEST_ID}), "
            f"count(*) FILTER ({columns.CLICKED}), "
            f"min({columns.REQUESTED_AT}), max({columns.REQUESTED_AT})",
        )
        (products,), (purchases,) = ask("catalog", "count(*)"), ask("purchases", "count(*)")
        judged = (folder / "relevance.parquet").exists()
        judgements = ask("relevance", "count(*)")[0] if judged else 0
    return Summary(
        name=schema.name,
        products=products,
        purchases=purchases,
        judgements=judgements,
        impressions=rows,
        requests=requests,
        clicks=clicks,
        click_rate=clicks / rows if rows else 0.0,
        first_request="" if first is None else first.isoformat(),
        last_request="" if last is None else last.isoformat(),
        bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        caveat=schema.caveat,
    )


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
        ("impressions", f"{summary.impressions:,}"),
        ("requests", f"{summary.requests:,}"),
        ("clicked", f"{summary.clicks:,} ({summary.click_rate:.3%})"),
        ("first request", summary.first_request),
        ("last request", summary.last_request),
        ("products", f"{summary.products:,}"),
        ("purchases", f"{summary.purchases:,}"),
        ("graded query-product pairs", f"{summary.judgements:,}"),
        ("size", f"{summary.bytes / 1e6:.1f} MB"),
    ]
    print_table(summary.name, ("what", "how much"), rows)
    if summary.caveat:
        stdout.print(summary.caveat, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
