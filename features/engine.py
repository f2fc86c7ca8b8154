"""What a query engine offers to those who build request records.

The checks of a dataset and the plan of a build are SQL that DuckDB and Spark both speak: names in
double quotes, casts as ``::``, ``STRING`` for text, ``TIMESTAMP`` without a time zone, orders that
say where nulls go. What one of them says in words of its own stands with that engine
(`features.duckdb_engine`, `features.spark_engine`) and in `features.data_table`.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from features.dataset import Dataset
from features.manifest import WeekCounts
from features.schema import Weeks

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be built.

    Attributes:
        output: folder of the records.
        window_days: a history reaches this many days of 24 hours back from the request.
        history_cap: the most products in a history.
        calendar: says which week a time lies in.
        weeks: the counts of each week that has requests, ascending.
    """

    output: Path
    window_days: int
    history_cap: int
    calendar: Weeks
    weeks: dict[int, WeekCounts]


class Session(Protocol):
    """A dataset opened in an engine.

    Attributes:
        dataset: with tables as the connection reads them.
        connection: takes the SQL that the engines share: ``execute(sql)`` and then ``fetchone()``
            or ``fetchall()``.
    """

    @property
    def dataset(self) -> Dataset: ...  # noqa: D102
    @property
    def connection(self) -> Any: ...  # noqa: D102

    def prepare(self, plan: Plan) -> None:
        """Do what comes before the first week and writes nothing that stays."""
        ...

    def write(self, weeks: Iterable[int]) -> Generator[int]:
        """Write the records of some weeks, each file whole or not at all.

        Yields:
            Each week once it is written, in any order.
        """
        ...


class Engine(Protocol):
    """Opens datasets."""

    def open(self, dataset: Dataset, output: Path) -> AbstractContextManager[Session]:
        """Return the session in which the records of ``dataset`` are built into ``output``."""
        ...
