"""What is told of labels: how they are distributed, what they cover, how far humans disagree.

Everything is counted by DuckDB, out of core.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from embeddings.catalog import IMPRESSIONS, RELEVANCE, Catalog
from embeddings.labeling import scores
from embeddings.labeling.grades import LABELS
from embeddings.labeling.label_files import PROBABILITY, part_paths
from embeddings.labeling.sql import INTEGER, PAIR, TEXT, Kind, engine, select, select_files
from features import columns
from features.dataset import reading

if TYPE_CHECKING:
    import duckdb

PAPER = (0.69, 0.205, 0.099)
"""Shares of the labels 0, 1 and 2 of the paper's 32 million pairs (Section 2.2)."""

BINS = 20
_FLOAT: Kind = (pa.types.is_floating, "a number", "FLOAT")
_TOP_QUERIES = 20
_READ = 6  # pairs of each kind in the sample
_NEAR_END = 200  # of so many at an end of the order they are drawn
_DISAGREEMENTS = 12


class LabelTables:
    """Labels, human labels and impressions of a dataset as tables of a DuckDB.

    ``model``: query, product_id, label, probability. ``human``: query, product_id, label, the mean
    of the pair's judgements, rounded half up. ``shown``: query, product_id, impressions.
    ``searched``: query, searches.
    """

    def __init__(self, connection: "duckdb.DuckDBPyConnection", *, impressions: bool) -> None:
        self._connection = connection
        self.impressions = impressions

    @classmethod
    @contextmanager
    def open(
        cls, labels: Path, data: Path, catalog: Catalog, scratch: Path
    ) -> Iterator["LabelTables"]:
        """Yield the tables of a folder of labels and a dataset folder.

        Raises:
            BadInputError: a file or column cannot be read.
        """
        kinds = {**PAIR, columns.LABEL: INTEGER}
        model = select_files(part_paths(labels), {**kinds, PROBABILITY: _FLOAT})
        with engine(scratch) as connection, reading(data):
            connection.execute(f"CREATE TABLE model AS {model}")
            human = "SELECT NULL::VARCHAR AS query, NULL::BIGINT AS product_id, 0 AS label LIMIT 0"
            if (data / RELEVANCE).exists():
                given = select(data / RELEVANCE, {**kinds, columns.SOURCE: TEXT})
                human = (
                    "SELECT query, product_id, floor(avg(label) + 0.5)::BIGINT AS label "
                    f"FROM ({given}) WHERE source = 'human' GROUP BY query, product_id"
                )
            connection.execute(f"CREATE TABLE human AS {human}")
            titles = {columns.PRODUCT_ID: catalog.product_ids, columns.TITLE: catalog.titles}
            connection.register("catalog", pa.table(titles))
            impressions = (data / IMPRESSIONS).exists()
            if impressions:
                shown = select(data / IMPRESSIONS, {**PAIR, columns.REQUEST_ID: INTEGER})
                connection.execute(
                    "CREATE TABLE shown AS SELECT query, product_id, count(*) AS impressions "
                    f"FROM ({shown}) GROUP BY query, product_id"
                )
                connection.execute(
                    "CREATE TABLE searched AS SELECT query, count(DISTINCT request_id) AS "
                    f"searches FROM ({shown}) GROUP BY query"
                )
            yield cls(connection, impressions=impressions)

    def distribution(self) -> dict[str, Any]:
        """Return counts of the labels, of the model and of humans, and histograms of probability.

        Returns:
            ``model`` and ``human``: number by label's name, the latter ``None`` where there are no
            human labels; ``histogram``: by label's name the number of labels in each of `BINS`
            equal bins of their probability, ``None`` where the grader does not tell any;
            ``queries``, ``products``: how many are labelled.
        """
        queries, products = self._row(
            "SELECT count(DISTINCT query), count(DISTINCT product_id) FROM model"
        )
        bins = self._rows(
            f"SELECT label, least(floor(probability * {BINS}), {BINS - 1})::INTEGER, count(*) "
            "FROM model WHERE probability IS NOT NULL GROUP BY ALL"
        )
        histogram = np.zeros((len(LABELS), BINS), np.int64)
        for label, place, count in bins:
            histogram[label, place] = count
        human = self._counts("human")
        return {
            "model": self._counts("model"),
            "human": human if any(human.values()) else None,
            "histogram": dict(zip(LABELS, histogram.tolist(), strict=True)) if bins else None,
            "queries": queries,
            "products": products,
        }

    def coverage(self) -> dict[str, Any] | None:
        """Return the shares of searches and impressions that are labelled; ``None`` without any.

        Returns:
            ``searches`` and ``impressions``, each ``total`` and the shares ``human``, ``model``,
            ``both`` and ``any``: of searches whose query has a label, and of impressions whose
            query and product have one.
        """
        if not self.impressions:
            return None
        flags = (
            "SELECT sum({n}), sum({n}) FILTER (h), sum({n}) FILTER (m), "
            "sum({n}) FILTER (h AND m), sum({n}) FILTER (h OR m) FROM ({rows})"
        )
        of_queries = (
            "SELECT searches, query IN (SELECT query FROM human) AS h, "
            "query IN (SELECT query FROM model) AS m FROM searched"
        )
        of_pairs = (
            "SELECT impressions, human.query IS NOT NULL AS h, model.query IS NOT NULL AS m "
            "FROM shown LEFT JOIN human USING (query, product_id) "
            "LEFT JOIN model USING (query, product_id)"
        )
        found = {}
        for n, rows in (("searches", of_queries), ("impressions", of_pairs)):
            total, *parts = self._row(flags.format(n=n, rows=rows))
            shares = [float(part or 0) / float(total) for part in parts]
            names = ("human", "model", "both", "any")
            found[n] = {"total": int(total), **dict(zip(names, shares, strict=True))}
        return found

    def disagreement(self) -> dict[str, Any] | None:
        """Return how model and humans agree on the pairs that both labelled; ``None`` without any.

        Returns:
            ``pairs``, ``confusion`` ([3][3] counts, humans' label first), ``accuracy``,
            ``macro_f1``, ``kappa``, ``quadratic_kappa`` (``None`` where chance alone agrees fully).
        """
        counts = self._rows(
            "SELECT human.label, model.label, count(*) FROM model "
            "JOIN human USING (query, product_id) GROUP BY ALL"
        )
        if not counts:
            return None
        table = np.zeros((len(LABELS), len(LABELS) + 1), np.int64)
        for human, model, count in counts:
            table[human, model] = count
        found = scores.figures(table)
        figures = {
            name: None if np.isnan(found[name]) else float(found[name]) for name in scores.INTERVALS
        }
        confusion = table[:, : len(LABELS)].tolist()
        return {"pairs": int(table.sum()), "confusion": confusion, **figures}

    def frequent_queries(self) -> list[dict[str, Any]] | None:
        """Return the most frequent queries with how many of their pairs have which label."""
        if not self.impressions:
            return None
        rows = self._rows(
            f"""
            SELECT query, any_value(searches), count(*), count(model.label),
                count_if(model.label = 0), count_if(model.label = 1), count_if(model.label = 2)
            FROM (SELECT * FROM searched ORDER BY searches DESC, query LIMIT {_TOP_QUERIES})
            JOIN shown USING (query) LEFT JOIN model USING (query, product_id)
            GROUP BY query ORDER BY any_value(searches) DESC, query
            """
        )
        return [
            {
                "query": query,
                "searches": searches,
                "pairs": pairs,
                "labelled": labelled,
                "labels": dict(zip(LABELS, labels, strict=True)),
            }
            for query, searches, pairs, labelled, *labels in rows
        ]

    def sample(self, seed: int) -> dict[str, list[dict[str, Any]]]:
        """Return pairs to read, by what they are.

        Of each label those of which the grader is most and least sure, each drawn from the
        ``200`` at that end, or any where it does not tell; and pairs on which humans disagree,
        those by two labels first.

        Args:
            seed: another one draws others.
        """
        found = {}
        told = self._row("SELECT count(probability) FROM model")[0]
        for label, name in enumerate(LABELS):
            where = f"WHERE model.label = {label}"
            ends = (("most sure", "DESC"), ("least sure", "ASC")) if told else (("any", ""),)
            for end, order in ends:
                by = f"ORDER BY probability {order} NULLS LAST, {_draw(seed)}" if order else ""
                limit = f"LIMIT {_NEAR_END}" if order else ""
                found[f"{name}, {end}"] = self._pairs(
                    f"{where} {by} {limit}", f"ORDER BY {_draw(seed)} LIMIT {_READ}"
                )
        found["humans disagree"] = self._pairs(
            "WHERE human.label <> model.label",
            f"ORDER BY abs(human - label) DESC, {_draw(seed)} LIMIT {_DISAGREEMENTS}",
        )
        return {name: pairs for name, pairs in found.items() if pairs}

    def _pairs(self, among: str, then: str) -> list[dict[str, Any]]:
        rows = self._rows(
            "SELECT query, title, label, probability, human FROM ("
            "SELECT query, product_id, model.label, probability, human.label AS human FROM model "
            f"LEFT JOIN human USING (query, product_id) {among}) "
            f"LEFT JOIN catalog USING (product_id) {then}"
        )
        names = ("query", "title", "label", "probability", "human")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def _counts(self, table: str) -> dict[str, int]:
        found = dict(self._rows(f"SELECT label, count(*) FROM {table} GROUP BY label"))
        return {name: found.get(label, 0) for label, name in enumerate(LABELS)}

    def _rows(self, sql: str) -> list[tuple[Any, ...]]:
        return self._connection.execute(sql).fetchall()

    def _row(self, sql: str) -> tuple[Any, ...]:
        return self._rows(sql)[0]


def _draw(seed: int) -> str:
    """Return SQL of an order that looks random and is the same each time."""
    return f"md5(query || '\\t' || product_id || '\\t{seed}'), query, product_id"
