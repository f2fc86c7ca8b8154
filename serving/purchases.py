"""Purchases read in the order in which a history shows them, in bounded memory.

Sorted by user, then most recent first, ties by ascending product id: the purchases of one user in
one window are then a slice that is a history as `features.history` defines it.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.dataset import DataTable, check_purchases, open_purchases, reading

if TYPE_CHECKING:
    import duckdb

_MEMORY_LIMIT = "1GB"  # of the sort, which spills to disk beyond it

_SQL = """
SELECT user_id, product_id, epoch_us(purchased_at) AS time_us
FROM ({purchases})
ORDER BY user_id, time_us DESC, product_id
"""


class PurchaseBlock(NamedTuple):
    """N purchases that follow each other; a user's may go on in the next block.

    Attributes:
        users: [N] int64 user ids, ascending.
        product_ids: [N] int64.
        times: [N] int64 microseconds since 1970, of UTC where the file says so.
    """

    users: npt.NDArray[np.int64]
    product_ids: npt.NDArray[np.int64]
    times: npt.NDArray[np.int64]

    def firsts(self) -> npt.NDArray[np.int64]:
        """Return where in the block, which is not empty, each of its users begins."""
        return np.flatnonzero(np.append(True, self.users[1:] != self.users[:-1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class SortedPurchases:
    """Checked purchases that are read once, block after block.

    Attributes:
        purchases: how many there are.
        connection: engine that sorts them.
        table: where they stand.
    """

    purchases: int
    connection: "duckdb.DuckDBPyConnection"
    table: DataTable

    def blocks(self) -> Iterator[PurchaseBlock]:
        """Yield all purchases in order, a bounded number at a time."""
        sql = _SQL.format(purchases=self.table.select())
        with reading(self.table.path):
            for batch in pa.RecordBatchReader.from_stream(self.connection.sql(sql)):
                yield PurchaseBlock(*(_numbers(batch[name]) for name in batch.schema.names))


@contextmanager
def open_sorted(path: Path) -> Iterator[SortedPurchases]:
    """Check the purchases at ``path`` and yield what reads them in order.

    Args:
        path: a Parquet file of ``user_id``, ``product_id`` and ``purchased_at``, or a folder of
            them; rows in any order.

    Raises:
        BadInputError: there is no such file, or a rule of `features.dataset` is broken.
    """
    import duckdb

    table = open_purchases(path)
    with tempfile.TemporaryDirectory(prefix="purchases-") as scratch:
        config: dict[str, str | bool | int | float | list[str]] = {
            "memory_limit": _MEMORY_LIMIT,
            "temp_directory": scratch,
        }
        with duckdb.connect(config=config) as connection:
            with reading(path), connection.cursor() as cursor:
                check_purchases(cursor, table)
                [(counted,)] = cursor.execute(f"SELECT count(*) FROM {table.raw}").fetchall()
            yield SortedPurchases(purchases=counted, connection=connection, table=table)


def _numbers(column: pa.Array) -> npt.NDArray[np.int64]:
    return column.to_numpy(zero_copy_only=False)
