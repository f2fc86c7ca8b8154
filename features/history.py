"""The purchase-history window: which products a user bought before a request, point in time.

A request of user ``u`` at time ``t`` sees the purchases of ``u`` in ``[t - window, t)``::

        older        t - 84 days                     t
    ──────┼─────────────●━━━━━━━━━━━━━━━━━━━━━━━━━━━━○───────► time
       left out      included                     left out (the request's own basket)

Most recent first, ties by ascending product id, repeats kept, at most ``cap`` of the most recent.
Beside each product stands how long before the request it was bought, in whole days of 24 hours:
0 for the last 24 hours, 84 only for a purchase exactly at the window's beginning.

NOTE[DIFF]: the paper speaks of the list of product ids bought; it does not say whether one bought
twice counts twice in the mean. Here it does.
"""

import datetime as dt
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from features import columns

if TYPE_CHECKING:
    import duckdb

# The columns of a history in the records. An age is capped at what int16 holds, 89 years.
HISTORY_SCHEMA = pa.schema(
    {
        columns.PURCHASE_HISTORY: pa.list_(pa.int64()),
        columns.PURCHASE_AGE_DAYS: pa.list_(pa.int16()),
    }
)
OLDEST_DAYS = 2**15 - 1
DAY_US = 24 * 60 * 60 * 1_000_000

# Requests of one user at one instant (one basket) share a history, so it is built once for them.
_HISTORIES = """
SELECT user_id, requested_at, {lists}
FROM (SELECT DISTINCT user_id, requested_at FROM requests) JOIN purchases USING (user_id)
WHERE purchased_at >= requested_at - INTERVAL {days} DAY AND purchased_at < requested_at
{bounds}
GROUP BY user_id, requested_at
"""

_LISTS = """
list(product_id ORDER BY purchased_at DESC, product_id)[:{cap}] AS products,
list(purchased_at ORDER BY purchased_at DESC)[:{cap}] AS times
"""

# They say nothing new: they let the scan skip purchases of other times.
_BOUNDS = """
AND purchased_at >= TIMESTAMP '{first}' - INTERVAL {days} DAY AND purchased_at < TIMESTAMP '{last}'
"""

_OF_REQUESTS = """
SELECT
    coalesce(products, []) AS purchase_history,
    coalesce([
        least((epoch_us(requested_at) - epoch_us(bought)) // {day_us}, {oldest})::SMALLINT
        FOR bought IN times
    ], []) AS purchase_age_days,
FROM requests LEFT JOIN ({histories}) USING (user_id, requested_at)
ORDER BY requested_at, request_id
"""


def histories_sql(lists: str, *, window_days: int, bounds: str = "") -> str:
    """Return the SQL of the window, which DuckDB and Spark both speak.

    It reads ``requests`` (``user_id``, ``requested_at``) and ``purchases`` (``user_id``,
    ``product_id``, ``purchased_at``), and gives one row of ``user_id`` and ``requested_at`` a
    history that is not empty.

    Args:
        lists: what is selected of the purchases of a history besides, in an engine's own words.
        window_days: length of the window in days of 24 hours.
        bounds: further conditions, ``AND ...``.
    """
    return _HISTORIES.format(lists=lists, days=window_days, bounds=bounds)


def purchase_histories(
    connection: "duckdb.DuckDBPyConnection", requests: pa.Table, *, window_days: int, cap: int
) -> pa.Table:
    """Return the purchase history of each request, and the ages of its purchases.

    Args:
        connection: holds a table ``purchases`` with ``user_id``, ``product_id`` (int64) and
            ``purchased_at`` (timestamp, microseconds), in any order.
        requests: ``[B]`` rows of ``request_id``, ``user_id`` and ``requested_at`` (timestamp,
            microseconds), ordered by ``(requested_at, request_id)``.
        window_days: length of the window in days of 24 hours.
        cap: the most products in one history.

    Returns:
        ``[B]`` rows of `HISTORY_SCHEMA`, in the order of ``requests``: lists of product ids and,
        of the same lengths, of whole days between purchase and request; empty where the user
        bought nothing in the window.
    """
    if requests.num_rows == 0:
        return HISTORY_SCHEMA.empty_table()
    times = pc.min_max(requests[columns.REQUESTED_AT])
    bounds = _BOUNDS.format(
        days=window_days, first=_literal(times["min"]), last=_literal(times["max"])
    )
    histories = histories_sql(_LISTS.format(cap=cap), window_days=window_days, bounds=bounds)
    sql = _OF_REQUESTS.format(histories=histories, day_us=DAY_US, oldest=OLDEST_DAYS)
    keys = [columns.REQUEST_ID, columns.USER_ID, columns.REQUESTED_AT]
    connection.register("requests", requests.select(keys))
    try:
        found = pa.table(connection.sql(sql))
    finally:
        connection.unregister("requests")
    return found.cast(HISTORY_SCHEMA)


def _literal(time: pa.Scalar) -> str:
    moment: dt.datetime = time.as_py()
    return moment.isoformat(sep=" ", timespec="microseconds")
