"""Score tables of impressions with a bundle, through the code path that training uses."""

from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa

from features import columns
from features.batch import RequestBatch
from features.errors import BadInputError
from features.history import HISTORY_SCHEMA, purchase_histories
from features.records import nest, split_requests
from ranking.bundle import Bundle

_KEYS = (columns.REQUEST_ID, columns.QUERY, columns.PRODUCT_ID)
_HISTORY_KEYS = (columns.USER_ID, columns.REQUESTED_AT)
_POSITION = "__position__"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """A bundle that scores pandas or Arrow tables.

    Attributes:
        bundle: the trained ranker.
    """

    bundle: Bundle

    @classmethod
    def open(cls, folder: Path | str) -> "Scorer":
        """Load the bundle in ``folder``.

        Raises:
            BadInputError: there is none, or it is damaged.
        """
        return cls(bundle=Bundle.open(Path(folder)))

    def score(
        self,
        impressions: pa.Table | pd.DataFrame,
        purchases: pa.Table | pd.DataFrame | None = None,
    ) -> np.ndarray:
        """Return the probability of a click on each impression.

        Args:
            impressions: [C] rows in any order, with the columns of ``impressions.parquet``
                (``clicked`` is not read).
            purchases: rows of ``purchases.parquet``, of which each request reads its user's last
                days before its time; without them every history is empty.

        Returns:
            [C] float32, in the order of the rows.

        Raises:
            BadInputError: a column is missing.
        """
        table = _arrow(impressions)
        bought = None if purchases is None else _arrow(purchases)
        self._check(table, bought)
        table = table.append_column(_POSITION, pa.array(np.arange(len(table))))
        table = table.sort_by(columns.REQUEST_ID).combine_chunks()
        records = self._records(table, bought)
        batch = RequestBatch.from_records(records, self.bundle.schema)
        scores = np.empty(len(table), np.float32)
        scores[table[_POSITION].to_numpy()] = self.bundle.ranker.score(batch).numpy()
        return scores

    def _check(self, table: pa.Table, purchases: pa.Table | None) -> None:
        needed = [*_KEYS, *(feature.name for feature in self.bundle.schema.features)]
        if purchases is not None:
            needed += _HISTORY_KEYS
            for name in (columns.USER_ID, columns.PRODUCT_ID, columns.PURCHASED_AT):
                if name not in purchases.column_names:
                    raise BadInputError(f"purchases: column '{name}' is missing")
        for name in needed:
            if name not in table.column_names:
                raise BadInputError(f"impressions: column '{name}' is missing")

    def _records(self, table: pa.Table, purchases: pa.Table | None) -> pa.Table:
        features = self.bundle.schema.features
        request = [columns.QUERY, *(f.name for f in features if f.level == "request")]
        if purchases is not None:
            request += _HISTORY_KEYS
        requests, offsets = split_requests(table, request)
        arrays = {name: requests[name] for name in requests.column_names}
        histories = self._histories(requests, purchases)
        arrays |= {name: histories[name] for name in histories.column_names}
        for name in (columns.PRODUCT_ID, *(f.name for f in features if f.level == "candidate")):
            arrays[name] = nest(table[name], offsets)
        return pa.table(arrays)

    def _histories(self, requests: pa.Table, purchases: pa.Table | None) -> pa.Table:
        if purchases is None or len(requests) == 0:
            nothing: list[list[int]] = [[]] * len(requests)
            return pa.table([nothing] * len(HISTORY_SCHEMA), schema=HISTORY_SCHEMA)
        order = [(columns.REQUESTED_AT, "ascending"), (columns.REQUEST_ID, "ascending")]
        numbered = requests.append_column(_POSITION, pa.array(np.arange(len(requests))))
        by_time = numbered.sort_by(order)
        moment = pa.timestamp("us")
        place = by_time.schema.get_field_index(columns.REQUESTED_AT)
        times = by_time[columns.REQUESTED_AT].cast(moment, safe=False)
        by_time = by_time.set_column(place, columns.REQUESTED_AT, times)
        with duckdb.connect(config={"threads": 1}) as connection:
            connection.register("bought", purchases)
            connection.execute(
                f"CREATE TABLE purchases AS SELECT {columns.USER_ID}::BIGINT AS user_id, "
                f"{columns.PRODUCT_ID}::BIGINT AS product_id, "
                f"{columns.PURCHASED_AT}::TIMESTAMP AS purchased_at FROM bought"
            )
            histories = purchase_histories(
                connection,
                by_time,
                window_days=self.bundle.window_days,
                cap=self.bundle.history_cap,
            )
        back = np.argsort(by_time[_POSITION].to_numpy())
        return histories.take(pa.array(back))


def _arrow(table: pa.Table | pd.DataFrame) -> pa.Table:
    if isinstance(table, pd.DataFrame):
        return pa.Table.from_pandas(table, preserve_index=False)
    return table
