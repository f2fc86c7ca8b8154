"""From impressions, one row a candidate, to request records, one row a search."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from features import columns


def split_requests(
    impressions: pa.Table, request_columns: Sequence[str]
) -> tuple[pa.Table, pa.Array]:
    """Return one row a request, and where each request's candidates begin.

    Args:
        impressions: [C] rows whose requests lie together.
        request_columns: columns that have one value a request, besides ``request_id``.

    Returns:
        ``request_id`` and ``request_columns`` of each request ([B] rows), and offsets ([B + 1]
        int32) into ``impressions``.
    """
    ids = impressions[columns.REQUEST_ID].to_numpy()
    starts = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]])[: len(ids)])
    requests = impressions.select([columns.REQUEST_ID, *request_columns]).take(starts)
    return requests, pa.array(np.append(starts, len(ids)), pa.int32())


def nest(column: pa.ChunkedArray, offsets: pa.Array) -> pa.ListArray:
    """Return the values of a candidate column as one list a request."""
    flat = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    return pa.ListArray.from_arrays(offsets, flat)
