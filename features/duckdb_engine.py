"""Request records by DuckDB: on one machine, a week at a time, spilling to disk."""

import datetime as dt
import os
import shutil
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from features import columns
from features.data_table import DataTable, text
from features.dataset import EARLIEST, LATEST, Dataset
from features.engine import Plan
from features.history import HISTORY_SCHEMA, purchase_histories
from features.manifest import week_path
from features.record_files import record_schema, week_writer
from features.records import nest, split_requests

if TYPE_CHECKING:
    import duckdb

_SCRATCH = ".scratch"

# One slice of a week is held in memory by each worker.
_SLICE_ROWS = 1 << 20
_SLICE_REQUESTS = 1 << 16
_WORKERS = 2
_MEMORY_LIMIT = "4GB"

# Impressions are sorted first where reading them week by week would read each row more often.
_READ_AT_MOST = 3


class DuckDbEngine:
    """The engine of one machine. It implements `features.engine.Engine`."""

    @contextmanager
    def open(self, dataset: Dataset, output: Path) -> "Iterator[_Session]":
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
                yield _Session(dataset=dataset, connection=connection)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            if made and output.exists() and not any(output.iterdir()):
                output.rmdir()


@dataclass(slots=True, kw_only=True)
class _Session:
    """What the workers share; ``_impressions`` is SQL that a span of time is read from cheaply."""

    dataset: Dataset
    connection: "duckdb.DuckDBPyConnection"
    _impressions: str = field(default="", init=False)
    _plan: Plan = field(init=False)

    def prepare(self, plan: Plan) -> None:
        self._plan = plan
        self.connection.execute(
            f"CREATE TABLE purchases AS {self.dataset.purchases.select()} ORDER BY purchased_at"
        )
        self._impressions = _by_time(self.connection, self.dataset.impressions)

    def write(self, weeks: Iterable[int]) -> Generator[int]:
        """Write weeks, several at a time."""
        with ThreadPoolExecutor(_WORKERS) as pool:
            running = [pool.submit(self._write_week, week) for week in weeks]
            try:
                for finished in as_completed(running):
                    yield finished.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _write_week(self, week: int) -> int:
        """Write the records of one week slice by slice; return the week."""
        counts, calendar = self._plan.weeks[week], self._plan.calendar
        slices = max(counts.rows // _SLICE_ROWS, counts.requests // _SLICE_REQUESTS) + 1
        start, end = calendar.start(week), calendar.start(week + 1)
        times = [start + (end - start) / slices * i for i in range(slices)] + [end]
        path, schema = week_path(self._plan.output, week), record_schema(self.dataset)
        with self.connection.cursor() as cursor, week_writer(path, schema) as take:
            for first, last in pairwise(times):
                take(self._records(cursor, first, last))
        return week

    def _records(
        self, cursor: "duckdb.DuckDBPyConnection", first: dt.datetime, last: dt.datetime
    ) -> pa.Table:
        """Return the records of the requests in ``[first, last)``."""
        rows = pa.table(
            cursor.sql(
                f"SELECT * FROM ({self._impressions}) "
                f"WHERE requested_at >= TIMESTAMP '{first}' AND requested_at < TIMESTAMP '{last}' "
                "ORDER BY requested_at, request_id, product_id"
            )
        ).combine_chunks()
        requests, offsets = split_requests(rows, self.dataset.request_columns)
        histories = purchase_histories(
            cursor, requests, window_days=self._plan.window_days, cap=self._plan.history_cap
        )
        arrays = {name: requests[name] for name in requests.column_names}
        arrays |= {name: histories[name] for name in HISTORY_SCHEMA.names}
        for name in self.dataset.candidate_columns:
            arrays[name] = nest(rows[name], offsets)
        schema = record_schema(self.dataset)
        return pa.table([arrays[name] for name in schema.names], schema=schema)


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
