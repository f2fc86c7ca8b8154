"""Spark, where it is installed: a session of our own, and what goes wrong said in one sentence.

Spark needs pyspark (the extra ``spark``) and Java 17 or newer.
"""

import errno
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features.errors import BadInputError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_JAVA = (
    "Spark needs Java 17 or newer: install it, for example the package openjdk-17-jre-headless, "
    "or let JAVA_HOME name it"
)
_MEMORY = "4g"  # of a driver that is also the executor; Spark's own default is 1g

# What makes Spark's SQL the one that DuckDB speaks too, and its Parquet reader as literal.
_DIALECT = {
    "spark.sql.ansi.enabled": "true",
    "spark.sql.ansi.doubleQuotedIdentifiers": "true",
    "spark.sql.caseSensitive": "true",
    "spark.sql.files.ignoreCorruptFiles": "false",
    "spark.sql.files.ignoreMissingFiles": "false",
    "spark.sql.legacy.parquet.nanosAsLong": "true",  # it reads no nanoseconds otherwise
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.timestampType": "TIMESTAMP_NTZ",
}

# Faults of the input among the conditions that Spark names.
_INPUT_FAULTS = ("ARITHMETIC_OVERFLOW", "CAST_", "FAILED_READ_FILE", "NUMERIC_VALUE", "PARQUET_")


@contextmanager
def spark_session(master: str | None = None) -> Iterator["SparkSession"]:
    """Yield a Spark session, stopped at the end if it was started here.

    Args:
        master: Spark's master URL. Where ``None``, what ``spark-submit`` or ``spark-defaults.conf``
            says; by default this machine (``local[*]``), with ``SPARK_DRIVER_MEMORY`` (4g).

    Raises:
        BadInputError: pyspark or Java is missing, or Spark does not start.
    """
    if find_spec("pyspark") is None:
        raise BadInputError(
            "Spark is not installed; install it with: pip install 'dashclip-ranker[spark]'"
        )
    _meet_pandas()
    from pyspark.sql import SparkSession

    found = SparkSession.getActiveSession()
    if found is not None:
        yield found
        return
    home = os.environ.get("JAVA_HOME")
    if shutil.which("java", path=str(Path(home) / "bin") if home else None) is None:
        raise BadInputError(_JAVA)
    session = _start(master)
    try:
        yield session
    finally:
        session.stop()


def _meet_pandas() -> None:
    """Let pyspark look for pandas, which nothing here needs of it, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "PySpark does not yet fully support", FutureWarning)
        import pyspark.testing.utils  # noqa: F401


def _start(master: str | None) -> "SparkSession":
    from pyspark.errors import PySparkException
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.appName("dashclip-ranker")
    settings = {
        "spark.driver.memory": os.environ.get("SPARK_DRIVER_MEMORY", _MEMORY),
        "spark.log.level": "FATAL",  # what fails is raised here
        "spark.ui.showConsoleProgress": "false",
    }
    if master is None or master.startswith("local"):
        settings["spark.executorEnv.PYTHONPATH"] = str(Path(__file__).absolute().parents[1])
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    if master is not None:
        settings["spark.master"] = master
    for key, value in settings.items():
        builder = builder.config(key, value)
    try:
        return builder.getOrCreate()
    except PySparkException as error:
        if error.getCondition() == "JAVA_GATEWAY_EXITED":
            raise BadInputError(_JAVA) from error
        raise BadInputError(f"Spark does not start: {_first_line(error)}") from error
    except Exception as error:  # py4j's, with the whole trace of Java as its text
        raise BadInputError(f"Spark does not start: {_first_line(error)}") from error


def common_dialect(session: "SparkSession") -> "SparkSession":
    """Return a session beside ``session``, of the same application, that speaks the common SQL."""
    beside = session.newSession()
    for key, value in _DIALECT.items():
        beside.conf.set(key, value)
    return beside


def activate(session: "SparkSession") -> None:
    """Make ``session`` the active one of this thread."""
    # Spark offers this only as what making a table does besides.
    session.createDataFrame([], "nothing INT")


class Rows:
    """What a query gave, as DuckDB offers it."""

    def __init__(self, rows: list[tuple[Any, ...]]) -> None:
        self._rows = rows

    def fetchone(self) -> tuple[Any, ...] | None:
        """Return the first row, or None."""
        return self._rows[0] if self._rows else None

    def fetchall(self) -> list[tuple[Any, ...]]:
        """Return all rows."""
        return self._rows


class SparkConnection:
    """Takes SQL as a DuckDB connection does; for queries whose answer is a few rows.

    Args:
        session: see `common_dialect`.
        folder: of the data, named in messages.
    """

    def __init__(self, session: "SparkSession", folder: Path) -> None:
        self.session = session
        self.folder = folder

    def execute(self, query: str) -> Rows:
        """Run a query.

        Raises:
            BadInputError: a file is damaged, or a value does not fit its type.
        """
        with reading(self.folder):
            return Rows([tuple(row) for row in self.session.sql(query).collect()])


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turn what Spark says of damaged files or values into a `BadInputError`, a full disk into
    an `OSError`."""  # noqa: D205, D209
    from pyspark.errors import PySparkException

    try:
        yield
    except Exception as error:
        # What Spark has no class for in Python comes as py4j's own.
        if not isinstance(error, PySparkException) and not hasattr(error, "java_exception"):
            raise
        trace = str(error)
        if "No space left on device" in trace:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder)) from error
        condition = error.getCondition() if isinstance(error, PySparkException) else None
        if condition is None:
            named = re.search(r"\[([A-Z_]+)", trace)
            condition = named.group(1) if named else ""
        if not condition.startswith(_INPUT_FAULTS):
            raise
        raise BadInputError(f"{folder}: cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
