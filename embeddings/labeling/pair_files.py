"""The pairs to label: chosen once, kept beside the labels, and read a chunk at a time.

They are chosen out of core by DuckDB, which merges repetitions and leaves out what cannot be
graded. What was chosen stays in the output folder, so that a run that goes on sees the same.

Legend: ``P`` pairs.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embeddings.catalog import IMPRESSIONS, RELEVANCE, Catalog, open_parquet
from embeddings.labeling.sql import INTEGER, PAIR, TEXT, engine, select
from features import columns
from features.data_table import text
from features.dataset import reading
from features.errors import BadInputError
from features.files import atomic_file

if TYPE_CHECKING:
    import duckdb

CHOSEN = "_pairs.parquet"
"""The file in an output folder. Its name begins so that readers of the folder pass it over."""

CHUNK_PAIRS = 1 << 16
"""About how many pairs a chunk has: a row group of `CHOSEN`, and a part of the labels."""

BLANK, UNKNOWN, UNTITLED = "blank query", "product unknown", "product without a title"
LABELLED, REPEATED = "human label", "repeated"

_LEFT_OUT = "left_out"

# Why a pair is left out; null where it is not.
_JUDGED = rf"""
CREATE VIEW judged AS
SELECT
    asked.*,
    CASE
        WHEN NOT regexp_matches(coalesce(asked.query, ''), '[^\s\p{{Z}}]') THEN '{BLANK}'
        WHEN titled IS NULL THEN '{UNKNOWN}'
        WHEN NOT titled THEN '{UNTITLED}'
        WHEN human.query IS NOT NULL THEN '{LABELLED}'
    END AS reason
FROM asked
LEFT JOIN catalog ON asked.product_id = catalog.product_id
LEFT JOIN human ON asked.query = human.query AND asked.product_id = human.product_id
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The pairs that a run labels, in order, each once.

    Attributes:
        path: of the Parquet file: ``query``, ``product_id``.
        pairs: how many.
        left_out: how many were left out, by reason: rows of a file of pairs, or distinct pairs of
            the impressions.
    """

    path: Path
    pairs: int
    left_out: dict[str, int]

    def chunks(self, limit: int | None = None) -> list[int]:
        """Return how many pairs each chunk has, of the first ``limit`` pairs."""
        with open_parquet(self.path) as file:
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        sizes = np.array([group.num_rows for group in groups])
        left = (self.pairs if limit is None else limit) - (np.cumsum(sizes) - sizes)
        return [int(size) for size in np.minimum(sizes, left) if size > 0]

    def read(self, chunk: int, pairs: int) -> pa.Table:
        """Return the first ``pairs`` pairs of a chunk: ``query`` and ``product_id``."""
        with open_parquet(self.path) as file:
            return file.read_row_group(chunk).slice(0, pairs)


def open_selection(output: Path) -> Selection | None:
    """Return the pairs that were chosen for an output folder, ``None`` where none were yet."""
    path = output / CHOSEN
    if not path.is_file():
        return None
    with open_parquet(path, list(PAIR)) as file:
        left_out = json.loads(file.metadata.metadata[_LEFT_OUT.encode()])
        return Selection(path=path, pairs=file.metadata.num_rows, left_out=left_out)


def select_given(pairs: Path, catalog: Catalog, output: Path) -> Selection:
    """Choose the pairs of a Parquet file or folder, in its order, a repeated one at its first row.

    Args:
        pairs: ``query`` and ``product_id``.
        catalog: products that it does not hold, or without a title, are left out.
        output: folder that keeps the choice.

    Raises:
        BadInputError: a file or column cannot be read, or no pair is left.
    """
    rows = f"SELECT *, row_number() OVER () AS place FROM ({select(pairs, PAIR)})"
    with _choosing(output, catalog) as connection, reading(pairs):
        connection.execute(
            "CREATE TABLE asked AS SELECT query, product_id, min(place) AS place, "
            f"count(*) AS times FROM ({rows}) GROUP BY query, product_id"
        )
        chosen = "SELECT query, product_id FROM judged WHERE reason IS NULL ORDER BY place"
        return _keep(connection, chosen, output, pairs, rows=True)


def select_unlabelled(data: Path, catalog: Catalog, output: Path) -> Selection:
    """Choose the pairs that searches of a dataset showed and no human labelled.

    Those of the most frequent queries come first, and of one query's those shown most often.

    Args:
        data: dataset folder with impressions.
        catalog: its products; pairs of others, or without a title, are left out.
        output: folder that keeps the choice.

    Raises:
        BadInputError: there are no impressions, a file or column cannot be read, or no pair is
            left.
    """
    impressions, relevance = data / IMPRESSIONS, data / RELEVANCE
    if not impressions.exists():
        raise BadInputError(f"{impressions}: no such file; name the pairs to label with --pairs")
    shown = select(impressions, {**PAIR, columns.REQUEST_ID: INTEGER})
    with _choosing(output, catalog) as connection, reading(data):
        if relevance.exists():
            labels = select(relevance, {**PAIR, columns.SOURCE: TEXT})
            connection.execute(
                "INSERT INTO human SELECT DISTINCT query, product_id "
                f"FROM ({labels}) WHERE source = 'human'"
            )
        connection.execute(
            "CREATE TABLE asked AS SELECT query, product_id, count(*) AS times "
            f"FROM ({shown}) GROUP BY query, product_id"
        )
        searched = f"SELECT query, count(DISTINCT request_id) AS n FROM ({shown}) GROUP BY query"
        chosen = (
            f"SELECT query, product_id FROM judged JOIN ({searched}) USING (query) "
            "WHERE reason IS NULL ORDER BY n DESC, query, times DESC, product_id"
        )
        return _keep(connection, chosen, output, impressions, rows=False)


class Titles:
    """The titles of a catalog's products by their id."""

    def __init__(self, catalog: Catalog) -> None:
        ids = catalog.product_ids.to_numpy()
        self._order = np.argsort(ids)
        self._ids = ids[self._order]
        self._titles = catalog.titles

    def of(self, product_ids: np.ndarray) -> list[str]:
        """Return the titles of [P] int64 ids, all of which are in the catalog and have one."""
        rows = self._order[np.searchsorted(self._ids, product_ids)]
        return self._titles.take(pa.array(rows)).to_pylist()


@contextmanager
def _choosing(output: Path, catalog: Catalog) -> "Iterator[duckdb.DuckDBPyConnection]":
    """Yield a DuckDB with the tables ``catalog`` and ``human``, the latter empty."""
    titled = pa.table({"product_id": catalog.product_ids, "titled": pc.is_valid(catalog.titles)})
    with engine(output) as connection:
        connection.register("catalog", titled)
        connection.execute("CREATE TABLE human (query VARCHAR, product_id BIGINT)")
        yield connection


def _keep(
    connection: "duckdb.DuckDBPyConnection", chosen: str, output: Path, source: Path, *, rows: bool
) -> Selection:
    """Write what ``chosen`` selects of the view ``judged``, and count what it leaves out.

    Args:
        connection: it has the tables ``asked`` and ``human``.
        chosen: SQL.
        output: folder.
        source: what the pairs are of.
        rows: count the rows that were asked, not distinct pairs.
    """
    connection.execute(_JUDGED)
    found = connection.execute(
        "SELECT reason, count(*), sum(times)::BIGINT FROM judged GROUP BY reason ORDER BY reason"
    ).fetchall()
    counts = {reason: (pairs, times) for reason, pairs, times in found}
    pairs, times = counts.pop(None, (0, 0))
    left_out = {reason: count[1 if rows else 0] for reason, count in counts.items()}
    if rows and times > pairs:
        left_out[REPEATED] = times - pairs
    if not pairs:
        why = ", ".join(f"{reason}: {count:,}" for reason, count in left_out.items())
        raise BadInputError(f"{source}: holds no pair to label ({why or 'it is empty'})")
    path = output / CHOSEN
    with atomic_file(path) as scratch:
        connection.execute(
            f"COPY ({chosen}) TO {text(str(scratch))} (FORMAT parquet, COMPRESSION zstd, "
            f"ROW_GROUP_SIZE {CHUNK_PAIRS}, "
            f"KV_METADATA {{{_LEFT_OUT}: {text(json.dumps(left_out))}}})"
        )
    return Selection(path=path, pairs=pairs, left_out=left_out)
