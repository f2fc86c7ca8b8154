"""Request records: one row per search, with its purchase history and its candidates.

Built by DuckDB from a dataset folder, a week at a time, into a folder of Parquet files::

    request_id  user_id  requested_at  query  purchase_history  purchase_age_days
    7           3        2017-10-23 …  soup   [81, 12, 81]      [0, 6, 40]
        <request features>  product_id  clicked        <candidate features>
        …                   [5, 9, 40]  [no, yes, no]  [.., .., ..]

Rows are ordered by ``(requested_at, request_id)``, candidates by ``product_id``. All that belongs
to the user or the query stands once a request: it is stored, read and computed once.
"""

import datetime as dt
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from features import columns
from features.dataset import EARLIEST, LATEST, Dataset, DataTable, reading, text
from features.errors import BadInputError
from features.files import atomic_file, fingerprint, write_text
from features.history import HISTORY_SCHEMA, purchase_histories
from features.manifest import (
    FORMAT,
    MANIFEST,
    OtherFormatError,
    RequestsManifest,
    WeekCounts,
    week_path,
)
from features.records import nest, split_requests
from features.schema import Weeks

if TYPE_CHECKING:
    import duckdb

ROW_GROUP = 1024
_UNFINISHED = ".unfinished.json"
_SCRATCH = ".scratch"

# One slice of a week is held in memory by each worker.
_SLICE_ROWS = 1 << 20
_SLICE_REQUESTS = 1 << 16
_WORKERS = 2
_MEMORY_LIMIT = "4GB"

# Impressions are sorted first where reading them week by week would read each row more often.
_READ_AT_MOST = 3

Progress = Callable[[int, int], None]


def build_requests(
    dataset: Path,
    output: Path,
    *,
    window_days: int = 84,
    history_cap: int = 1000,
    progress: Progress | None = None,
) -> RequestsManifest:
    """Build the request records of a dataset folder.

    Nothing is computed from a purchase at or after its request. The same inputs and options give
    the same bytes; a build that was killed carries on with the weeks that are missing, and one
    that is complete is left as it is. Other inputs or options, and records of another format,
    replace what ``output`` holds.

    Args:
        dataset: folder with ``impressions.parquet``, ``purchases.parquet``, ``catalog.parquet``
            and ``dataset.toml``.
        output: folder of the records.
        window_days: a history reaches this many days of 24 hours back from the request.
        history_cap: the most products in a history, the most recent ones.
        progress: called with the number of weeks that are done and their total.

    Raises:
        BadInputError: the dataset breaks a rule of `features.dataset`, or an option is below 1;
            nothing was written then.
    """
    for name, value in (("window_days", window_days), ("history_cap", history_cap)):
        if value < 1:
            raise BadInputError(f"{name} must be 1 or more, got {value}")
    if output.exists() and not output.is_dir():
        raise BadInputError(f"{output}: is a file, expected a folder for the request records")
    opened = Dataset.open(dataset)
    key: dict[str, Any] = {
        "format": FORMAT,
        "dataset": opened.schema.name,
        "fingerprint": _fingerprint(opened),
        "window_days": window_days,
        "history_cap": history_cap,
    }
    finished = _finished(output, key)
    if finished is not None:
        return finished
    with _engine(output) as connection:
        opened.check(connection)
        with reading(dataset):
            build = _prepare(connection, opened, output, window_days, history_cap)
            unknown = _count_unknown(connection, opened)
            _make_room(output, key)
            build.run(progress)
    manifest = RequestsManifest(folder=output, weeks=build.weeks, unknown_products=unknown, **key)
    manifest.save()
    (output / _UNFINISHED).unlink()
    return manifest


def _finished(output: Path, key: dict[str, Any]) -> RequestsManifest | None:
    """Return the manifest of ``output`` if it holds all records of the build ``key``."""
    if not (output / MANIFEST).exists():
        return None
    try:
        manifest = RequestsManifest.load(output)
    except OtherFormatError:
        return None
    same = all(getattr(manifest, name) == value for name, value in key.items())
    whole = all(manifest.path(week).is_file() for week in manifest.weeks)
    return manifest if same and whole else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Build:
    """What the workers share; ``impressions`` is SQL that a span of time is read from cheaply."""

    connection: "duckdb.DuckDBPyConnection"
    dataset: Dataset
    impressions: str
    output: Path
    window_days: int
    history_cap: int
    calendar: Weeks
    weeks: dict[int, WeekCounts]

    def run(self, progress: Progress | None) -> None:
        """Write the weeks that are missing, several at a time."""
        missing = [week for week in self.weeks if not week_path(self.output, week).exists()]
        done = len(self.weeks) - len(missing)
        with ThreadPoolExecutor(_WORKERS) as pool:
            running = [pool.submit(self.write_week, week) for week in missing]
            try:
                for finished in as_completed(running):
                    finished.result()
                    done += 1
                    if progress is not None:
                        progress(done, len(self.weeks))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def write_week(self, week: int) -> None:
        """Write the records of one week, slice by slice, in row groups of `ROW_GROUP` requests."""
        counts = self.weeks[week]
        slices = max(counts.rows // _SLICE_ROWS, counts.requests // _SLICE_REQUESTS) + 1
        start, end = self.calendar.start(week), self.calendar.start(week + 1)
        times = [start + (end - start) / slices * i for i in range(slices)] + [end]
        schema = _record_schema(self.dataset)
        pending = schema.empty_table()
        with (
            self.connection.cursor() as cursor,
            atomic_file(week_path(self.output, week)) as scratch,
            record_writer(scratch, schema) as writer,
        ):
            for first, last in pairwise(times):
                pending = pa.concat_tables([pending, self._records(cursor, first, last)])
                whole = pending.num_rows - pending.num_rows % ROW_GROUP
                if whole:
                    writer.write_table(pending.slice(0, whole), row_group_size=ROW_GROUP)
                pending = pending.slice(whole)
            writer.write_table(pending, row_group_size=ROW_GROUP)

    def _records(
        self, cursor: "duckdb.DuckDBPyConnection", first: dt.datetime, last: dt.datetime
    ) -> pa.Table:
        """Return the records of the requests in ``[first, last)``."""
        rows = pa.table(
            cursor.sql(
                f"SELECT * FROM ({self.impressions}) "
                f"WHERE requested_at >= TIMESTAMP '{first}' AND requested_at < TIMESTAMP '{last}' "
                "ORDER BY requested_at, request_id, product_id"
            )
        ).combine_chunks()
        requests, offsets = split_requests(rows, self.dataset.request_columns)
        histories = purchase_histories(
            cursor, requests, window_days=self.window_days, cap=self.history_cap
        )
        arrays = {name: requests[name] for name in requests.column_names}
        arrays |= {name: histories[name] for name in HISTORY_SCHEMA.names}
        for name in self.dataset.candidate_columns:
            arrays[name] = nest(rows[name], offsets)
        schema = _record_schema(self.dataset)
        return pa.table([arrays[name] for name in schema.names], schema=schema)


def _prepare(
    connection: "duckdb.DuckDBPyConnection",
    dataset: Dataset,
    output: Path,
    window_days: int,
    history_cap: int,
) -> _Build:
    calendar, weeks = _plan(connection, dataset)
    connection.execute(
        f"CREATE TABLE purchases AS {dataset.purchases.select()} ORDER BY purchased_at"
    )
    return _Build(
        connection=connection,
        dataset=dataset,
        impressions=_by_time(connection, dataset.impressions),
        output=output,
        window_days=window_days,
        history_cap=history_cap,
        calendar=calendar,
        weeks=weeks,
    )


def _record_schema(dataset: Dataset) -> pa.Schema:
    """Return the columns of the records, in the order of the format."""
    types = dataset.impressions.types
    user, time, query, *features = dataset.request_columns
    return pa.schema(
        [(name, types[name]) for name in (columns.REQUEST_ID, user, time, query)]
        + list(HISTORY_SCHEMA)
        + [(name, types[name]) for name in features]
        + [(name, pa.list_(types[name])) for name in dataset.candidate_columns]
    )


def record_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Return a writer of request records."""
    # Dictionaries pay for text only: encoding ids and floats with them takes longer and saves
    # little before zstd.
    text = [
        f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        for field in schema
        if pa.types.is_string(getattr(field.type, "value_type", field.type))
    ]
    return pq.ParquetWriter(
        path, schema, compression="zstd", compression_level=1, use_dictionary=text
    )


def _fingerprint(dataset: Dataset) -> str:
    tables = (dataset.catalog, dataset.purchases, dataset.impressions)
    return fingerprint(dataset.folder / "dataset.toml", *(table.path for table in tables))


@contextmanager
def _engine(output: Path) -> Iterator["duckdb.DuckDBPyConnection"]:
    """Yield a DuckDB that spills into ``output``, and leave no trace of it there."""
    import duckdb

    made = not output.exists()
    scratch = output / _SCRATCH
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": _MEMORY_LIMIT,
        "preserve_insertion_order": False,
        "temp_directory": str(scratch),
        "threads": os.cpu_count() or 1,
    }
    try:
        with duckdb.connect(config=config) as connection:
            yield connection
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if made and output.exists() and not any(output.iterdir()):
            output.rmdir()


def _plan(
    connection: "duckdb.DuckDBPyConnection", dataset: Dataset
) -> tuple[Weeks, dict[int, WeekCounts]]:
    """Return the calendar and the counts of each week that has requests."""
    calendar = dataset.schema.weeks
    impressions = f"({dataset.impressions.select('request_id', 'requested_at', 'clicked')})"
    if calendar is None:
        first = connection.execute(f"SELECT min(requested_at)::DATE FROM {impressions}").fetchone()
        assert first is not None
        calendar = Weeks(first_day=first[0], evaluate=1)
    # A request has one time (it was checked), so it lies in one week.
    rows = connection.execute(
        f"""
        SELECT
            floor(date_diff('day', DATE '{calendar.first_day}', requested_at::DATE) / 7)::INT + 1
                AS week,
            count(DISTINCT request_id), count(*), count_if(clicked), min(requested_at)
        FROM {impressions} GROUP BY week ORDER BY week
        """
    ).fetchall()
    if rows[0][0] < 1:
        raise BadInputError(
            f"{dataset.impressions.path}: column 'requested_at' holds {rows[0][4]}, before the "
            f"first day of week 1 in dataset.toml, {calendar.first_day}"
        )
    weeks = {w: WeekCounts(requests=n, rows=r, positives=p) for w, n, r, p, _ in rows}
    return calendar, weeks


def _by_time(connection: "duckdb.DuckDBPyConnection", table: DataTable) -> str:
    """Return SQL of the impressions that can be read week by week, sorting them once if need be.

    Files in the order of time are read where they are: their row groups say which times they hold.
    """
    files = ", ".join(text(str(file)) for file in table.files)
    row = connection.execute(
        f"""
        SELECT sum(row_group_num_rows * (1 + date_diff('day', lowest, highest) / 7))
            / sum(row_group_num_rows)
        FROM (
            SELECT
                row_group_num_rows,
                coalesce(stats_min_value, '{EARLIEST}')::TIMESTAMP AS lowest,
                coalesce(stats_max_value, '{LATEST}')::TIMESTAMP AS highest,
            FROM parquet_metadata([{files}]) WHERE path_in_schema = '{columns.REQUESTED_AT}'
        )
        """
    ).fetchone()
    assert row is not None
    if row[0] <= _READ_AT_MOST:
        return table.select()
    connection.execute(f"CREATE TABLE impressions AS {table.select()} ORDER BY requested_at")
    return "FROM impressions"


def _count_unknown(connection: "duckdb.DuckDBPyConnection", dataset: Dataset) -> int:
    """Return the number of impressions whose product the catalog does not hold."""
    row = connection.execute(
        f"SELECT count(*) FROM ({dataset.impressions.select(columns.PRODUCT_ID)}) "
        f"ANTI JOIN ({dataset.catalog.select(columns.PRODUCT_ID)}) USING (product_id)"
    ).fetchone()
    assert row is not None
    return int(row[0])


def _make_room(output: Path, key: dict[str, Any]) -> None:
    """Remove what another build left in ``output``, and note which build is under way."""
    note = output / _UNFINISHED
    text = json.dumps(key, indent=2) + "\n"
    for leftover in output.glob(".week-*.partial-*"):
        leftover.unlink()
    if not note.is_file() or note.read_text(encoding="utf-8") != text:
        for stale in (note, output / MANIFEST, *output.glob("week-*.parquet")):
            stale.unlink(missing_ok=True)
        write_text(note, text)
