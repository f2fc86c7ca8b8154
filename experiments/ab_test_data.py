"""What an A/B test showed to whom and what came of it, summed by user.

Exposures are the lines that the service logs (`serving.exposure_log`), as JSON lines or Parquet
files of the same columns. Outcomes are Parquet: ``request_id``, ``product_id``, ``clicked`` and,
where they are known, ``converted`` and ``revenue``; products that nothing came of may be left out.

DuckDB reads both as streams and keeps what it joins in a scratch file, so that memory does not grow
with the logs; 56 bytes a user do.

Dimensions: ``U`` users.
"""

import datetime as dt
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from features import columns
from features.data_table import text
from features.dataset import reading
from features.errors import BadInputError
from features.parquet import missing_column, parquet_files
from serving.ab_routing import BUCKETS

if TYPE_CHECKING:
    import duckdb

_MEMORY_LIMIT = "2GB"
_FIELDS = ("request_id", "user_id", "bucket", "model", "time", "candidates")
_OUTCOMES = (columns.REQUEST_ID, columns.PRODUCT_ID, columns.CLICKED)
_OPTIONAL = {"converted": "BOOLEAN", "revenue": "DOUBLE"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observations:
    """The users of a test who met one bucket only, and how much was read.

    Attributes:
        treated: bool ``[U]``.
        totals: float64 ``[U]`` each: ``requests``, ``impressions``, ``clicks`` and, where the
            outcomes tell them, ``conversions`` and ``revenue``.
        counts: ``exposures`` read, of them ``repeated`` (of a request that is there already),
            ``outside`` (of no bucket) and ``torn`` lines; ``users_in_both`` buckets; ``outcomes``
            that tell of a click, a conversion or revenue, of them ``outcomes_not_shown`` and
            ``conversions_without_click``.
        models: fingerprints of the exported rankers that served each bucket.
        period: times of the first and the last exposure of the test, ISO 8601 in UTC.
    """

    treated: npt.NDArray[np.bool_]
    totals: Mapping[str, npt.NDArray[np.float64]]
    counts: Mapping[str, int]
    models: Mapping[str, list[str]]
    period: tuple[str, str]


def read_observations(
    exposures: Path, outcomes: Path, scratch: Path, *, shown: int | None = None
) -> Observations:
    """Join exposures and outcomes.

    Of exposures with one request id, as retries leave behind, the first counts. A product counts
    once a request. Users who met both buckets are left out.

    Args:
        exposures: a file, or a folder of ``.jsonl`` and ``.parquet`` files.
        outcomes: a Parquet file or a folder of such files.
        scratch: a folder to work in; it is removed, with its parent where that was not there.
        shown: how many of the ranked candidates the user saw; all where ``None``.

    Raises:
        BadInputError: a file is missing or broken, or a rule of the above does not hold.
    """
    with _engine(scratch) as connection:
        with reading(exposures):
            torn = _load_exposures(connection, exposures, shown)
            _check_exposures(connection)
            _choose_exposures(connection)
        with reading(outcomes):
            optional = _load_outcomes(connection, outcomes)
            _match_outcomes(connection)
        return Observations(
            **_users(connection, optional),
            counts=_counts(connection) | {"torn": torn},
            models=_models(connection),
            period=_period(connection),
        )


@contextmanager
def _engine(scratch: Path) -> Iterator["duckdb.DuckDBPyConnection"]:
    import duckdb

    made = not scratch.parent.exists()
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": _MEMORY_LIMIT,
        "temp_directory": str(scratch / "spilled"),
        "threads": 2,
    }
    try:
        with duckdb.connect(str(scratch / "ab_test.duckdb"), config=config) as connection:
            connection.execute("SET TimeZone = 'UTC'")
            yield connection
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if made:
            scratch.parent.rmdir()


def _load_exposures(connection: "duckdb.DuckDBPyConnection", path: Path, shown: int | None) -> int:
    """Make the table ``exposures`` of all lines, and return how many were torn."""
    files = _exposure_files(path)
    tables = [f for f in files if f.suffix == ".parquet"]
    logs = [f for f in files if f.suffix != ".parquet"]
    parts = []
    if tables:
        parts.append(_select_tables(tables))
    if logs:
        parts.append(_select_logs(logs))
    seen = "candidates" if shown is None else f"candidates[:{int(shown)}]"
    connection.execute(
        f"CREATE TABLE exposures AS SELECT * REPLACE ({seen} AS candidates) "
        f"FROM ({' UNION ALL '.join(parts)})"
    )
    broken = connection.execute(
        "SELECT file, count(*) FROM exposures WHERE broken GROUP BY file ORDER BY file"
    ).fetchall()
    for file, count in broken:
        if count > 1 or _ends_whole(Path(file)):
            raise BadInputError(f"{file}: {count} lines are not JSON objects")
    connection.execute("DELETE FROM exposures WHERE broken")
    return len(broken)


def _exposure_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise BadInputError(f"{path}: no such file or folder of exposures")
    suffixes = (".jsonl", ".parquet")
    files = sorted(p for p in path.rglob("*") if p.suffix in suffixes and p.name[0] not in "._")
    if not files:
        raise BadInputError(f"{path}: the folder holds no exposures (.jsonl or .parquet files)")
    return files


def _select_logs(files: list[Path]) -> str:
    kinds = dict.fromkeys(_FIELDS, "VARCHAR")
    structure = json.dumps({**kinds, "user_id": "BIGINT", "candidates": ["BIGINT"]})
    return f"""
        SELECT filename AS file, fields IS NULL AS broken, fields.request_id, fields.user_id,
            fields.bucket, fields.model, try_cast(fields.time AS TIMESTAMPTZ) AS time,
            fields.candidates
        FROM (
            SELECT filename, json_transform(json, {text(structure)}) AS fields
            FROM read_ndjson_objects([{_list(files)}], ignore_errors = true, filename = true)
        )
    """


def _select_tables(files: list[Path]) -> str:
    for file in files:
        names = _column_names(file)
        for name in _FIELDS:
            if name not in names:
                raise missing_column(file, name, names)
    return f"""
        SELECT filename AS file, false AS broken, request_id::VARCHAR AS request_id,
            user_id::BIGINT AS user_id, bucket::VARCHAR AS bucket, model::VARCHAR AS model,
            try_cast(time AS TIMESTAMPTZ) AS time, candidates::BIGINT[] AS candidates
        FROM read_parquet([{_list(files)}], filename = true, union_by_name = true)
    """


def _column_names(file: Path) -> list[str]:
    try:
        return list(pq.read_schema(file).names)
    except (pa.ArrowException, OSError) as error:
        raise BadInputError(f"{file}: not a readable Parquet file: {error}") from error


def _list(files: list[Path]) -> str:
    return ", ".join(text(str(file)) for file in files)


def _ends_whole(file: Path) -> bool:
    """Whether a file ends with a line's end; one whose writer was killed may not."""
    with file.open("rb") as content:
        content.seek(-1, 2)
        return content.read(1) == b"\n"


def _check_exposures(connection: "duckdb.DuckDBPyConnection") -> None:
    buckets = ", ".join(map(text, BUCKETS))
    rules = {
        "request_id IS NULL": "an exposure has no 'request_id'",
        "time IS NULL": "exposure {}: 'time' is missing or is no time",
        "candidates IS NULL OR list_count(candidates) < len(candidates)": (
            "exposure {}: 'candidates' is no list of product ids"
        ),
        f"bucket NOT IN ({buckets})": f"exposure {{}}: 'bucket' is neither of {buckets}",
        "bucket IS NOT NULL AND user_id IS NULL": "exposure {} has a bucket and no 'user_id'",
    }
    for broken, sentence in rules.items():
        _refuse(connection, f"SELECT file, request_id FROM exposures WHERE {broken}", sentence)
    _refuse(
        connection,
        "SELECT min(file), request_id FROM exposures GROUP BY request_id "
        "HAVING min(user_id) <> max(user_id)",
        "exposure {}: its 'request_id' is there again with another 'user_id'",
    )


def _refuse(connection: "duckdb.DuckDBPyConnection", query: str, sentence: str) -> None:
    """Raise if the query, of a file and what names a row, finds any."""
    found = connection.execute(f"{query} LIMIT 1").fetchone()
    if found is not None:
        raise BadInputError(f"{found[0]}: {sentence.format(text(str(found[1])))}")


def _choose_exposures(connection: "duckdb.DuckDBPyConnection") -> None:
    """Make ``shown``: one exposure a request, with whether it counts."""
    connection.execute(
        """
        CREATE TABLE users_in_both AS
        SELECT user_id FROM exposures WHERE bucket IS NOT NULL
        GROUP BY user_id HAVING min(bucket) <> max(bucket);

        CREATE TABLE repeated AS
        SELECT position FROM (
            SELECT
                exposures.rowid AS position,
                row_number() OVER (PARTITION BY request_id ORDER BY time, exposures.rowid) AS place
            FROM exposures
            SEMI JOIN (
                SELECT request_id FROM exposures GROUP BY request_id HAVING count(*) > 1
            ) USING (request_id)
        ) WHERE place > 1;

        CREATE VIEW shown AS
        SELECT *, bucket IS NOT NULL AND user_id NOT IN (FROM users_in_both) AS counts
        FROM exposures WHERE exposures.rowid NOT IN (FROM repeated);
        """
    )
    if connection.execute("SELECT 1 FROM shown WHERE counts LIMIT 1").fetchone() is None:
        raise BadInputError("the exposures hold no user who met one bucket only")


def _load_outcomes(connection: "duckdb.DuckDBPyConnection", path: Path) -> list[str]:
    """Make ``outcomes`` of the rows that tell of anything; return the optional columns found."""
    files = parquet_files(path)
    names = _column_names(files[0])
    for file in files:
        for name in _OUTCOMES:
            if name not in (here := _column_names(file)):
                raise missing_column(file, name, here)
    optional = [name for name in _OPTIONAL if name in names]
    source = f"read_parquet([{_list(files)}], filename = true)"
    for name in _OUTCOMES:
        _refuse(
            connection,
            f"SELECT filename, {name} FROM {source} WHERE {name} IS NULL",
            f"column '{name}' is null",
        )
    if "revenue" in optional:
        _refuse(
            connection,
            f"SELECT filename, revenue FROM {source} WHERE NOT isfinite(revenue::DOUBLE)",
            "column 'revenue' holds {}, not a finite number",
        )
    reads = [
        f"coalesce({name}::{kind}, 0::{kind}) AS {name}"
        if name in optional
        else f"0::{kind} AS {name}"
        for name, kind in _OPTIONAL.items()
    ]
    connection.execute(
        f"""
        CREATE TABLE outcomes AS FROM (
            SELECT filename AS file, request_id::VARCHAR AS request_id,
                product_id::BIGINT AS product_id, clicked::BOOLEAN AS clicked, {", ".join(reads)}
            FROM {source}
        ) WHERE clicked OR converted OR revenue <> 0
        """
    )
    _refuse(
        connection,
        "SELECT min(file), request_id || ', ' || product_id FROM outcomes "
        "GROUP BY request_id, product_id HAVING count(*) > 1",
        "request and product {} have several outcomes",
    )
    return optional


def _match_outcomes(connection: "duckdb.DuckDBPyConnection") -> None:
    connection.execute(
        """
        CREATE TABLE matched AS
        SELECT outcomes.* EXCLUDE (file), user_id, counts
        FROM outcomes JOIN shown USING (request_id)
        WHERE list_contains(candidates, product_id)
        """
    )


def _users(connection: "duckdb.DuckDBPyConnection", optional: list[str]) -> dict[str, Any]:
    found = connection.execute(
        """
        SELECT treated, requests, impressions, coalesce(clicks, 0) AS clicks,
            coalesce(conversions, 0) AS converted, coalesce(revenue, 0) AS revenue
        FROM (
            SELECT user_id, any_value(bucket) = 'treatment' AS treated, count(*) AS requests,
                sum(list_unique(candidates)) AS impressions
            FROM shown WHERE counts GROUP BY user_id
        ) LEFT JOIN (
            SELECT user_id, count_if(clicked) AS clicks,
                count_if(converted AND clicked) AS conversions, sum(revenue) AS revenue
            FROM matched WHERE counts GROUP BY user_id
        ) USING (user_id)
        ORDER BY user_id
        """
    ).fetchnumpy()
    told = {"requests": "requests", "impressions": "impressions", "clicks": "clicks"}
    told |= {"conversions": "converted"} if "converted" in optional else {}
    told |= {"revenue": "revenue"} if "revenue" in optional else {}
    return {
        "treated": np.asarray(found["treated"], np.bool_),
        "totals": {name: np.asarray(found[column], np.float64) for name, column in told.items()},
    }


def _counts(connection: "duckdb.DuckDBPyConnection") -> dict[str, int]:
    queries = {
        "exposures": "SELECT count(*) FROM exposures",
        "repeated": "SELECT count(*) FROM repeated",
        "outside": "SELECT count(*) FROM exposures WHERE bucket IS NULL",
        "users_in_both": "SELECT count(*) FROM users_in_both",
        "outcomes": "SELECT count(*) FROM outcomes",
        "outcomes_not_shown": (
            "SELECT (SELECT count(*) FROM outcomes) - (SELECT count(*) FROM matched)"
        ),
        "conversions_without_click": (
            "SELECT count(*) FROM matched WHERE counts AND converted AND NOT clicked"
        ),
    }
    counts = {}
    for name, query in queries.items():
        row = connection.execute(query).fetchone()
        assert row is not None
        counts[name] = int(row[0])
    return counts


def _models(connection: "duckdb.DuckDBPyConnection") -> dict[str, list[str]]:
    models: dict[str, list[str]] = {bucket: [] for bucket in BUCKETS}
    query = (
        "SELECT DISTINCT bucket, model FROM shown WHERE counts AND model IS NOT NULL ORDER BY ALL"
    )
    for bucket, model in connection.execute(query).fetchall():
        models[bucket].append(model)
    return models


def _period(connection: "duckdb.DuckDBPyConnection") -> tuple[str, str]:
    row = connection.execute(
        "SELECT epoch_us(min(time)), epoch_us(max(time)) FROM shown WHERE counts"
    ).fetchone()
    assert row is not None
    first, last = (dt.datetime.fromtimestamp(moment / 1e6, dt.UTC).isoformat() for moment in row)
    return first, last
