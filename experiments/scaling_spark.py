"""Features on Spark against DuckDB: the same request records, and how long each takes.

Each engine is the real command in a process of its own, with all that it starts with::

    python -m experiments.scaling_spark --data data/complete-journey --output runs/spark

The records are compared column by column: every row group of every week must hold the same values
in the same order under the same schema.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from experiments.load_checks import Part, equals, holds
from experiments.scaling_results import ScalingConfig, figure, run_python
from features.console import print_table, run_command, say
from features.files import write_text
from features.manifest import MANIFEST, RequestsManifest

FIGURES = "spark.json"
ENGINES = {"duckdb": (), "spark": ("--engine", "spark")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Build the request records of a dataset with DuckDB and with Spark, and compare them."""

    data: Path
    """Dataset folder."""
    output: Path
    """Folder that receives spark.json and both records; these are made anew."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison and return its exit status."""
    return run_command(Options, _run, prog="experiments.scaling_spark", arguments=arguments)


def _run(options: Options) -> None:
    figures = compare_engines(options.data, options.output)
    rows = [
        [name, f"{found['seconds']:,.1f}", f"{found['rows_per_second']:,.0f}"]
        for name, found in figures["engines"].items()
    ]
    print_table(f"request records of {figures['dataset']}", ["", "seconds", "impressions/s"], rows)
    found = f"{figures['different']} of" if figures["different"] else "all of"
    what = "differ" if figures["different"] else "are the same"
    say(
        f"{found} {figures['compared']:,} columns in {figures['weeks']} weeks, "
        f"{figures['requests']:,} requests, {figures['impressions']:,} impressions: {what}"
    )


def compare_engines(data: Path, output: Path) -> dict[str, Any]:
    """Build the records of ``data`` with each engine; returns the figures, writes ``spark.json``.

    Returns:
        ``engines``: by name seconds of the whole command and impressions/s; ``compared`` columns
        of row groups, of which ``different`` differ; ``same_manifest``; ``same_bytes``: weeks whose
        files are equal; what the dataset holds.

    Raises:
        BadInputError: a build failed.
    """
    built: dict[str, RequestsManifest] = {}
    engines = {}
    for name, arguments in ENGINES.items():
        say(f"building the records of {data} with {name}")
        records = output / name
        shutil.rmtree(records, ignore_errors=True)
        command = ["-m", "features.cli", "--data", str(data), "--output", str(records)]
        ended = run_python([*command, *arguments])
        built[name] = RequestsManifest.load(records)
        rows = sum(week.rows for week in built[name].weeks.values())
        engines[name] = {
            "seconds": round(ended.seconds, 2),
            "rows_per_second": round(rows / ended.seconds, 1),
        }
    figures = {
        "dataset": built["duckdb"].dataset,
        "cores": os.cpu_count(),
        "weeks": len(built["duckdb"].weeks),
        "requests": sum(week.requests for week in built["duckdb"].weeks.values()),
        "impressions": rows,
        "engines": engines,
        **compare_records(built["duckdb"], built["spark"]),
    }
    write_text(output / FIGURES, json.dumps(figures, indent=2) + "\n")
    return figures


def compare_records(expected: RequestsManifest, found: RequestsManifest) -> dict[str, Any]:
    """Compare two builds; see `compare_engines` for what is returned.

    A week that only one of them holds, or whose schema or row groups differ, counts as one column
    that differs.
    """
    compared = different = same_bytes = 0
    for week in sorted({*expected.weeks, *found.weeks}):
        if week not in expected.weeks or week not in found.weeks:
            different += 1
            continue
        paths = expected.path(week), found.path(week)
        pairs = _compare_week(*paths)
        compared += len(pairs)
        different += pairs.count(False)
        same_bytes += paths[0].read_bytes() == paths[1].read_bytes()
    manifests = [(build.folder / MANIFEST).read_bytes() for build in (expected, found)]
    return {
        "compared": compared,
        "different": different,
        "same_manifest": manifests[0] == manifests[1],
        "same_bytes": same_bytes,
    }


def _compare_week(expected: Path, found: Path) -> list[bool]:
    """Return for each column of each row group whether both files hold the same."""
    with pq.ParquetFile(expected) as one, pq.ParquetFile(found) as other:
        if one.schema_arrow != other.schema_arrow or one.num_row_groups != other.num_row_groups:
            return [False]
        same = []
        for group in range(one.num_row_groups):
            tables = one.read_row_group(group), other.read_row_group(group)
            same += [tables[0][name].equals(tables[1][name]) for name in one.schema_arrow.names]
        return same


def measure(config: ScalingConfig) -> Part:
    """Compare the engines, for ``scaling.json``."""
    figures = compare_engines(config.data, config.output / "spark")
    engines = figures["engines"]
    checks = (
        figure("seconds of DuckDB", engines["duckdb"]["seconds"]),
        figure("seconds of Spark", engines["spark"]["seconds"]),
        figure("columns of row groups compared", figures["compared"]),
        equals("columns that differ", figures["different"], 0),
        holds("the same manifest", figures["same_manifest"]),
    )
    return Part(checks=checks, figures=figures)


if __name__ == "__main__":
    sys.exit(main())
