"""Request records by Spark: the same as DuckDB's, on as many machines as its master has.

All requests are made in one job, whatever their number, and nothing but counts comes back to the
driver::

    impressions ── by request_id ──► requests with their candidates ──┐
                └─ users and times ─┐                                 ├─► by week ──► one file each
    purchases ───── by user_id ─────┴─► purchase histories ───────────┘
"""

import time
import uuid
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from features import columns
from features.data_table import quote
from features.dataset import Dataset
from features.engine import Plan
from features.history import DAY_US, OLDEST_DAYS, histories_sql
from features.manifest import UNFINISHED, week_path
from features.record_files import ROW_GROUP, record_schema
from features.spark import SparkConnection, activate, common_dialect, reading, spark_session
from features.spark_tables import spark_dataset

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_SECONDS_A_LOOK = 0.2

_LISTS = """
slice(array_sort(array_agg(struct(
    unix_micros(requested_at::TIMESTAMP_LTZ) - unix_micros(purchased_at::TIMESTAMP_LTZ) AS elapsed,
    product_id
))), 1, {cap}) AS bought
"""

# What belongs to a request is taken from its first candidate.
_RECORDS = """
SELECT
    request_id, request.*,
    coalesce(bought.product_id, array()) AS purchase_history,
    coalesce(
        transform(bought.elapsed, elapsed -> least(elapsed DIV {day_us}, {oldest})::SMALLINT),
        array()
    ) AS purchase_age_days,
    candidates,
    {week} AS week
FROM (
    SELECT
        request_id,
        min_by(struct({request}), product_id) AS request,
        array_sort(array_agg(struct({candidate}))) AS candidates
    FROM requests GROUP BY request_id
) LEFT JOIN ({histories}) AS histories
ON request.user_id = histories.user_id AND request.requested_at = histories.requested_at
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparkEngine:
    """The engine of many machines. It implements `features.engine.Engine`.

    Dataset and output lie where the driver and all executors see them under one name.

    Attributes:
        master: Spark's master URL; see `features.spark.spark_session`.
    """

    master: str | None = None

    @contextmanager
    def open(self, dataset: Dataset, output: Path) -> "Iterator[_Session]":
        """Yield a session of Spark's application, which is started if need be."""
        with spark_session(self.master) as found:
            spark = common_dialect(found)
            with reading(dataset.folder):
                opened = spark_dataset(spark, dataset)
            connection = SparkConnection(spark, dataset.folder)
            try:
                yield _Session(dataset=opened, connection=connection, _spark=spark)
            finally:
                activate(found)


@dataclass(slots=True, kw_only=True)
class _Session:
    dataset: Dataset
    connection: SparkConnection
    _spark: "SparkSession"
    _plan: Plan = field(init=False)

    def prepare(self, plan: Plan) -> None:
        from features.spark_writer import RequestRecords

        self._plan = plan
        self._spark.dataSource.register(RequestRecords)
        self._spark.sql(self.dataset.purchases.select()).createOrReplaceTempView("purchases")

    def write(self, weeks: Iterable[int]) -> Generator[int]:
        """Write all ``weeks`` in one job, looking for their files while it runs."""
        waiting = list(weeks)
        if not waiting:
            return
        records = self._records(waiting)
        job = f"request records {uuid.uuid4()}"
        with ThreadPoolExecutor(1) as pool, reading(self.dataset.folder):
            running = pool.submit(self._run, records, job)
            try:
                while waiting:
                    done = running.done()
                    for week in [week for week in waiting if self._path(week).exists()]:
                        waiting.remove(week)
                        yield week
                    if done:
                        running.result()
                        assert not waiting, waiting
                    time.sleep(_SECONDS_A_LOOK if waiting else 0)
                running.result()
            except BaseException:
                self._spark.sparkContext.cancelJobGroup(job)
                raise

    def _run(self, records: "DataFrame", job: str) -> None:
        from features import spark_writer

        activate(self._spark)  # Spark looks for sinks in this thread's session
        self._spark.sparkContext.setJobGroup(job, "request records", interruptOnCancel=True)
        schema = spark_writer.schema_option(record_schema(self.dataset))
        writer = records.write.format(spark_writer.FORMAT).mode("append")
        folder = self._plan.output.absolute()
        options = {
            spark_writer.FOLDER: str(folder),
            spark_writer.NOTE: (folder / UNFINISHED).read_text(encoding="utf-8"),
            spark_writer.SCHEMA: schema,
        }
        writer.options(**options).save()

    def _records(self, weeks: list[int]) -> "DataFrame":
        """Return the records of ``weeks``, each a partition of its own, in order."""
        from pyspark.sql.functions import expr

        spark, dataset, plan = self._spark, self.dataset, self._plan
        spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", str(4 * ROW_GROUP))
        listed = ", ".join(map(str, weeks))
        week = f"floor(datediff({{}}, DATE '{plan.calendar.first_day}') / 7)::INT + 1"
        of_row, of_request = week.format("requested_at"), week.format("request.requested_at")
        rows = f"SELECT * FROM ({dataset.impressions.select()}) WHERE {of_row} IN ({listed})"
        spark.sql(rows).createOrReplaceTempView("requests")
        lists = _LISTS.format(cap=plan.history_cap)
        records = spark.sql(
            _RECORDS.format(
                day_us=DAY_US,
                oldest=OLDEST_DAYS,
                week=of_request,
                request=", ".join(map(quote, dataset.request_columns)),
                candidate=", ".join(map(quote, dataset.candidate_columns)),
                histories=histories_sql(lists, window_days=plan.window_days),
            )
        )
        place = expr(f"(array_position(array({listed}), week) - 1)::INT")
        parted = records.repartitionById(len(weeks), place).sortWithinPartitions(
            columns.REQUESTED_AT, columns.REQUEST_ID
        )
        names = [name for name in parted.columns if name != "candidates"]
        nested = [f"candidates.{quote(n)} AS {quote(n)}" for n in dataset.candidate_columns]
        return parted.selectExpr(*map(quote, names), *nested)

    def _path(self, week: int) -> Path:
        return week_path(self._plan.output, week)
