"""A dataset folder: finding its files, checking them, reading them with one set of types.

What is checked, before anything is computed from the data (each a `BadInputError`):

* files and columns are there and readable, with the types of the contract; timestamps either all
  carry a time zone (they are then read as UTC) or none does;
* keys are not null, times lie between 1971 and 2100 (outside is a wrong unit: seconds read as
  microseconds land in 1970), dense features are finite;
* product ids are unique in the catalog, a request shows a product once, and everything that
  belongs to a request (user, query, time, request features) has one value in it.

Rows may come in any order: requests are sorted by time and purchases are cut by time wherever they
stand, so "timestamps out of order" can only mean a request whose rows disagree on its time.
Impressions of products that the catalog does not hold are allowed and counted.
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from features import columns
from features.data_table import DataTable, quote
from features.errors import BadInputError
from features.history import HISTORY_SCHEMA
from features.parquet import is_text, missing_column, parquet_files
from features.schema import DatasetSchema, Feature

if TYPE_CHECKING:
    import duckdb

CATALOG = "catalog.parquet"
IMPRESSIONS = "impressions.parquet"
PURCHASES = "purchases.parquet"

EARLIEST, LATEST = "1971-01-01", "2100-01-01"
_FLOAT32_MAX = 3.4028234663852886e38


def _is_number(found: pa.DataType) -> bool:
    types = pa.types
    number = types.is_integer(found) or types.is_floating(found) or types.is_decimal(found)
    return number or types.is_boolean(found)


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of column: what it is called, which Arrow types it takes, how and as what it is read.

    ``read`` is an SQL expression with ``{}`` for the column.
    """

    name: str
    accepts: Callable[[pa.DataType], bool]
    read: str
    type: pa.DataType


_INTEGER = _Kind("an integer", pa.types.is_integer, "{}::BIGINT", pa.int64())
_TEXT = _Kind("text", is_text, "{}::STRING", pa.string())
_TIME = _Kind("a timestamp", pa.types.is_timestamp, "{}::TIMESTAMP", pa.timestamp("us"))
# DuckDB reads a time zone without its ICU extension, which wheels do not carry, only as an instant.
_INSTANT = replace(_TIME, read="make_timestamp(epoch_us({}::TIMESTAMPTZ))")
_TRUTH = _Kind("a boolean", pa.types.is_boolean, "{}::BOOLEAN", pa.bool_())
# NaN is a missing value. A comparison with NaN would do, were it not decided by the file's minimum
# and maximum, which leave NaN out.
_NUMBER = _Kind(
    "a number", _is_number, "CASE WHEN NOT isnan({0}::FLOAT) THEN {0}::FLOAT END", pa.float32()
)
_SPARSE = _Kind("an integer or text", lambda t: pa.types.is_integer(t) or is_text(t), "", None)

# Keys that are compared with each other at a time: memory does not grow with the table.
_KEYS_AT_A_TIME = 1 << 23

_CATALOG_KINDS = {columns.PRODUCT_ID: _INTEGER, columns.TITLE: _TEXT}
_PURCHASE_KINDS = {
    columns.USER_ID: _INTEGER,
    columns.PRODUCT_ID: _INTEGER,
    columns.PURCHASED_AT: _TIME,
}
_IMPRESSION_KINDS = {
    columns.REQUEST_ID: _INTEGER,
    columns.USER_ID: _INTEGER,
    columns.REQUESTED_AT: _TIME,
    columns.QUERY: _TEXT,
    columns.PRODUCT_ID: _INTEGER,
    columns.CLICKED: _TRUTH,
}


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset folder whose files and column types were checked."""

    folder: Path
    schema: DatasetSchema
    catalog: DataTable
    purchases: DataTable
    impressions: DataTable

    @classmethod
    def open(cls, folder: Path) -> "Dataset":
        """Open ``folder`` and check its files, columns and types; reads metadata only.

        Raises:
            BadInputError: a file or column is missing, unreadable or of a wrong type.
        """
        if not folder.is_dir():
            raise BadInputError(f"{folder}: no such dataset folder")
        schema = DatasetSchema.load(folder)
        if not (folder / IMPRESSIONS).exists():
            raise BadInputError(
                f"{folder / IMPRESSIONS}: no such file; a ranker learns from impressions, which a "
                "dataset of products and graded queries alone does not have"
            )
        dataset = cls(
            folder=folder,
            schema=schema,
            catalog=_open_table(folder / CATALOG, _CATALOG_KINDS),
            purchases=_open_table(folder / PURCHASES, _PURCHASE_KINDS),
            impressions=_open_table(folder / IMPRESSIONS, _impression_kinds(folder, schema)),
        )
        _check_time_zones(
            (dataset.purchases, columns.PURCHASED_AT), (dataset.impressions, columns.REQUESTED_AT)
        )
        return dataset

    @property
    def request_columns(self) -> tuple[str, ...]:
        """Columns of the impressions that have one value a request, besides ``request_id``."""
        names = (columns.USER_ID, columns.REQUESTED_AT, columns.QUERY)
        return names + tuple(f.name for f in self.schema.features if f.level == "request")

    @property
    def candidate_columns(self) -> tuple[str, ...]:
        """Columns of the impressions that differ within a request."""
        names = (columns.PRODUCT_ID, columns.CLICKED)
        return names + tuple(f.name for f in self.schema.features if f.level == "candidate")

    def check(self, connection: "duckdb.DuckDBPyConnection") -> None:
        """Check the contents, as the module says; reads the files a few times.

        Raises:
            BadInputError: the first rule that is broken, with the file, column and row or value.
        """
        with reading(self.folder):
            _check_rows(connection, self.catalog, _null_rules(_CATALOG_KINDS))
            check_purchases(connection, self.purchases)
            rules = [*_null_rules(_IMPRESSION_KINDS), _time_rule(self.impressions, "requested_at")]
            rules += [_finite_rule(f) for f in self.schema.features if f.kind == "dense"]
            _check_rows(connection, self.impressions, rules)
            for table in (self.catalog, self.impressions):
                if not connection.execute(f"SELECT 1 FROM {table.raw} LIMIT 1").fetchone():
                    raise BadInputError(f"{table.path}: the table is empty")
            _check_unique(connection, self.catalog, (columns.PRODUCT_ID,))
            _check_unique(connection, self.impressions, (columns.REQUEST_ID, columns.PRODUCT_ID))
            _check_requests(connection, self)


def open_purchases(path: Path) -> DataTable:
    """Open purchases that stand by themselves and check their columns; reads metadata only.

    Args:
        path: a file of the columns of ``purchases.parquet``, or a folder of such files.

    Raises:
        BadInputError: a file or column is missing, unreadable or of a wrong type.
    """
    table = _open_table(path, _PURCHASE_KINDS)
    _check_time_zones((table, columns.PURCHASED_AT))
    return table


def check_purchases(connection: "duckdb.DuckDBPyConnection", purchases: DataTable) -> None:
    """Check the contents of purchases, as the module says.

    Raises:
        BadInputError: the first rule that is broken, with the file, column and row or value.
    """
    rules = [*_null_rules(_PURCHASE_KINDS), _time_rule(purchases, columns.PURCHASED_AT)]
    _check_rows(connection, purchases, rules)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turn what the query engine says of damaged files or values into a `BadInputError`."""
    import duckdb

    try:
        yield
    except duckdb.Error as error:
        # Damaged pages come as the bare base class; other programming errors are our own.
        blamed = (duckdb.DataError, duckdb.OperationalError, duckdb.InvalidInputException)
        if type(error) is not duckdb.Error and not isinstance(error, blamed):
            raise
        message = str(error).splitlines()[0]
        if "No space left" in message or "max_temp_directory_size" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(folder)) from error
        raise BadInputError(f"{folder}: cannot be read: {message}") from error


def _impression_kinds(folder: Path, schema: DatasetSchema) -> dict[str, _Kind]:
    kinds = dict(_IMPRESSION_KINDS)
    for feature in schema.features:
        if feature.name in kinds or feature.name in HISTORY_SCHEMA.names:
            raise BadInputError(
                f"{folder / 'dataset.toml'}: feature '{feature.name}' has the name of a column "
                "that the contract fixes"
            )
        kinds[feature.name] = _SPARSE if feature.kind == "sparse" else _NUMBER
    return kinds


def _open_table(path: Path, kinds: dict[str, _Kind]) -> DataTable:
    files = tuple(parquet_files(path))
    types: dict[str, pa.DataType] = {}
    for file in files:
        for name, found in _column_types(file, kinds).items():
            first = types.setdefault(name, found)
            if is_text(first) != is_text(found):
                raise BadInputError(f"{file}: column '{name}' is {found}, in {files[0]} {first}")
    kinds = {name: _resolve(kind, types[name]) for name, kind in kinds.items()}
    return DataTable(
        path=path,
        files=files,
        types={name: kind.type for name, kind in kinds.items()},
        reads={name: kind.read.format(quote(name)) for name, kind in kinds.items()},
    )


def _resolve(kind: _Kind, found: pa.DataType) -> _Kind:
    """Return the kind that reads a column of type ``found``."""
    if kind is _SPARSE:
        return _TEXT if is_text(found) else _INTEGER
    if kind is _TIME and found.tz is not None:
        return _INSTANT
    return kind


def _column_types(file: Path, kinds: dict[str, _Kind]) -> dict[str, pa.DataType]:
    """Return the types of the columns of ``kinds`` in one file, or say what is wrong with them."""
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise BadInputError(f"{file}: not a readable Parquet file: {error}") from error
    types = {}
    for name, kind in kinds.items():
        if name not in schema.names:
            raise missing_column(file, name, schema.names)
        found = schema.field(name).type
        if pa.types.is_dictionary(found):
            found = found.value_type
        if not kind.accepts(found):
            raise BadInputError(f"{file}: column '{name}' is {found}, expected {kind.name}")
        types[name] = found
    return types


def _check_time_zones(*timestamps: tuple[DataTable, str]) -> None:
    """Raise where some timestamps, columns of tables, carry a time zone and others do not."""
    zones: dict[bool, str] = {}
    for table, column in timestamps:
        for file in table.files:
            zone = pq.read_schema(file).field(column).type.tz
            zones.setdefault(zone is not None, f"{file}: column '{column}'")
    if len(zones) == 2:
        raise BadInputError(
            f"mixed time zone: {zones[True]} has a time zone and {zones[False]} has none"
        )


@dataclass(frozen=True, slots=True)
class _Rule:
    """A condition (SQL) that no row may meet, and what is said of one that does.

    ``shown`` is the SQL of the value that the sentence names.
    """

    column: str
    broken: str
    sentence: str
    shown: str = "NULL"


def _null_rules(kinds: dict[str, _Kind]) -> list[_Rule]:
    return [_Rule(name, f"{quote(name)} IS NULL", "is null") for name in kinds]


def _time_rule(table: DataTable, name: str) -> _Rule:
    read = table.reads[name]
    outside = f"NOT ({read} >= DATE '{EARLIEST}' AND {read} < DATE '{LATEST}')"
    sentence = f"is {{}}, not in [{EARLIEST}, {LATEST}); check the unit of the timestamps"
    return _Rule(name, outside, sentence, f"{read}::STRING")


def _finite_rule(feature: Feature) -> _Rule:
    value = f"{quote(feature.name)}::DOUBLE"
    infinite = f"NOT isnan({value}) AND abs({value}) > {_FLOAT32_MAX!r}"
    return _Rule(feature.name, infinite, "is {}, not a finite 32-bit number", value)


def _check_rows(
    connection: "duckdb.DuckDBPyConnection", table: DataTable, rules: list[_Rule]
) -> None:
    """Raise for the first rule that a row of ``table`` breaks, with the first such row."""
    counts = ", ".join(f"count_if({rule.broken})" for rule in rules)
    broken = connection.execute(f"SELECT {counts} FROM {table.raw}").fetchone()
    assert broken is not None
    for rule, count in zip(rules, broken, strict=True):
        if count:
            row = connection.execute(
                f"SELECT filename, file_row_number, {rule.shown} FROM {table.located} "
                f"WHERE {rule.broken} ORDER BY filename, file_row_number LIMIT 1"
            ).fetchone()
            assert row is not None
            file, number, value = row
            raise BadInputError(
                f"{table.named(file)}: column '{rule.column}', row {number + 1}: "
                + rule.sentence.format(value)
            )


def _check_unique(
    connection: "duckdb.DuckDBPyConnection", table: DataTable, names: tuple[str, ...]
) -> None:
    """Raise where two rows have the same values of ``names``, the first of them an integer."""
    listed = ", ".join(quote(name) for name in names)
    counted = connection.execute(f"SELECT count(*) FROM {table.raw}").fetchone()
    assert counted is not None
    parts = counted[0] // _KEYS_AT_A_TIME + 1
    repeated = []
    for part in range(parts):
        twice = connection.execute(
            f"SELECT {listed}, count(*) FROM {table.raw} "
            f"WHERE abs({quote(names[0])} % {parts}) = {part} "
            f"GROUP BY {listed} HAVING count(*) > 1 ORDER BY {listed} LIMIT 1"
        ).fetchone()
        if twice is not None:
            repeated.append(tuple(twice))
    if repeated:
        *values, count = min(repeated)
        what = ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))
        raise BadInputError(f"{table.path}: {what} stands in {count} rows, expected one")


def _check_requests(connection: "duckdb.DuckDBPyConnection", dataset: Dataset) -> None:
    """Raise where the rows of one request disagree on what belongs to the request.

    One hash of all those columns is compared first: it costs a fraction of comparing each.
    """
    digest = dataset.impressions.digest(dataset.request_columns)
    rows = dataset.impressions.select(columns.REQUEST_ID, *dataset.request_columns)
    found = connection.execute(
        f"SELECT request_id FROM (SELECT request_id, {digest} AS digest FROM ({rows})) "
        "GROUP BY request_id HAVING min(digest) <> max(digest) ORDER BY request_id LIMIT 1"
    ).fetchone()
    if found is None:
        return
    for name in dataset.request_columns:
        values = connection.execute(
            f"SELECT DISTINCT {quote(name)} FROM ({rows}) WHERE request_id = {found[0]} "
            "ORDER BY 1 NULLS LAST LIMIT 2"
        ).fetchall()
        if len(values) > 1:
            raise BadInputError(
                f"{dataset.impressions.path}: column '{name}' has several values in request "
                f"{found[0]}: {values[0][0]} and {values[1][0]}; it must have one"
            )
