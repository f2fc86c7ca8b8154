"""``build-features``: from a dataset folder to request records."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from features.console import print_table, progress_bar, run_command
from features.errors import BadInputError

if TYPE_CHECKING:
    from features.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Build request records from a dataset folder.

    One record per search: its purchase history, point in time, and its candidates. A build that
    was stopped carries on where it was.

    Attributes:
        data: dataset folder.
        output: folder of the records; DATA/requests by default.
        window_days: how many days a purchase history reaches back.
        history_cap: the most products in a purchase history.
        engine: what computes them, with the same result: DuckDB on this machine, or Spark, which
            needs the extra `spark` and Java 17.
        master: Spark's master URL; what spark-defaults.conf says if not given, else local[*].
            DATA and OUTPUT must lie where the driver and all executors see them under one name.
    """

    data: Path
    output: Path | None = None
    window_days: int = 84
    history_cap: int = 1000
    engine: Literal["duckdb", "spark"] = "duckdb"
    master: str | None = None


def main() -> int:
    """Run the command and return its exit status."""
    return run_command(Options, _build, prog="build-features")


def _build(options: Options) -> None:
    from features.requests import build_requests

    engine = _engine(options)
    with progress_bar() as bar:
        task = bar.add_task("weeks", total=None)
        manifest = build_requests(
            options.data,
            options.output or options.data / "requests",
            window_days=options.window_days,
            history_cap=options.history_cap,
            engine=engine,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    rows = [
        [str(week), f"{c.requests:,}", f"{c.rows:,}", f"{c.positives:,}"]
        for week, c in manifest.weeks.items()
    ]
    print_table(
        f"{manifest.dataset}: request records in {manifest.folder}",
        ["week", "requests", "impressions", "clicks"],
        rows,
    )


def _engine(options: Options) -> "Engine":
    if options.engine == "spark":
        from features.spark_engine import SparkEngine

        return SparkEngine(master=options.master)
    if options.master is not None:
        raise BadInputError("--master is Spark's; give --engine spark with it")
    from features.duckdb_engine import DuckDbEngine

    return DuckDbEngine()


if __name__ == "__main__":
    sys.exit(main())
