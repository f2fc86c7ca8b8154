"""How relevant products are to queries: reading the labels and holding queries out.

``relevance.parquet`` holds one row a judgement:

==============  =============================================================================
``query``       text; never null nor blank
``product_id``  an id of the catalog
``label``       0 irrelevant (IR), 1 moderately relevant (MR), 2 highly relevant (HR)
``source``      ``human``, ``llm`` or ``derived``
``split``       ``train`` or ``test``, the same for all rows of a query; optional
==============  =============================================================================

A folder that ``label-relevance label`` wrote holds such rows too, without a split, in files
``part-*.parquet``; other files of the folder do not count.

Legend: ``P`` judged pairs, ``Q`` distinct queries, ``R`` rows as read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embeddings.catalog import RELEVANCE, Catalog, check_type, open_parquet
from features import columns
from features.errors import BadInputError
from features.files import atomic_file
from features.id_map import hash_strings
from features.parquet import is_text, parquet_files

IRRELEVANT, MODERATE, HIGH = 0, 1, 2

SPLIT = "split"
TRAIN, TEST = "train", "test"
SOURCES = ("human", "llm", "derived")
"""Where labels come from, the most trusted first."""
Chosen = Literal["all", "human", "llm"]
"""Whose labels are asked for."""

TRAINING_QUERIES = "training_queries.parquet"
"""The file of a model folder that tells which queries the model was trained on."""

_HASH = "hash"
_LABEL_FILES = "part-*.parquet"
_NAMES = (columns.QUERY, columns.PRODUCT_ID, columns.LABEL, columns.SOURCE)
_SPLITS = (TRAIN, TEST)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Relevance:
    """Judged pairs of query and product, each pair once, by query and then by product.

    Attributes:
        queries: [Q] distinct texts, sorted; a part of the pairs keeps them all, so that the
            positions stay valid. Some may have no pair.
        query: [P] int32, position in ``queries``.
        product: [P] int64, row of the catalog (not the id).
        label: [P] int8, `IRRELEVANT`, `MODERATE` or `HIGH`.
        published_test: [Q] bool, whether the dataset itself holds the query out; ``None`` where it
            publishes no split.
    """

    queries: list[str]
    query: np.ndarray
    product: np.ndarray
    label: np.ndarray
    published_test: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.query)

    def take(self, pairs: np.ndarray) -> "Relevance":
        """Return some of the pairs, given by a mask ([P] bool) or by positions (int)."""
        return replace(
            self, query=self.query[pairs], product=self.product[pairs], label=self.label[pairs]
        )

    def judged_queries(self) -> list[str]:
        """Return the texts of the queries that have a pair here, sorted."""
        return [self.queries[query] for query in np.unique(self.query)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RelevanceRows:
    """The rows of ``relevance.parquet`` as they stand there: a pair may have several.

    Attributes:
        queries: [Q] distinct texts, sorted.
        query: [R] int32, position in ``queries``.
        product: [R] int64, row of the catalog (not the id).
        label: [R] int8, `IRRELEVANT`, `MODERATE` or `HIGH`.
        source: [R] int8, position in `SOURCES`.
        published_test: [Q] bool, as in `Relevance`.
        products: how many the catalog has.
    """

    queries: list[str]
    query: np.ndarray
    product: np.ndarray
    label: np.ndarray
    source: np.ndarray
    published_test: np.ndarray | None
    products: int

    def __len__(self) -> int:
        return len(self.query)

    def of_source(self, source: str) -> "RelevanceRows":
        """Return the rows of one of `SOURCES`; ``queries`` stay."""
        rows = self.source == SOURCES.index(source)
        return replace(
            self,
            query=self.query[rows],
            product=self.product[rows],
            label=self.label[rows],
            source=self.source[rows],
        )

    def merged(self) -> Relevance:
        """Return each pair once, with one label; `read_relevance` says which."""
        key = self.query.astype(np.int64) * self.products + self.product
        key, label = _merge(key, self.label, self.source)
        return Relevance(
            queries=self.queries,
            query=(key // self.products).astype(np.int32),
            product=key % self.products,
            label=label,
            published_test=self.published_test,
        )


def read_relevance(
    folder: Path, catalog: Catalog, *, labels: Path | None = None, source: Chosen = "all"
) -> Relevance:
    """Read ``folder/relevance.parquet``, a file or a folder of files.

    A pair that is judged several times gets one label: that of the most trusted source (human,
    then llm, then derived), and of several from that source their mean, rounded half up.

    Args:
        folder: dataset folder.
        catalog: of the dataset.
        labels: folder of ``label-relevance label``, whose rows are read beside the dataset's; it
            may stand in for them where the dataset has none. A query that the dataset does not
            publish as held out stays in its training set.
        source: whose labels count. ``queries`` are those of all rows nonetheless, so that which of
            them are held out does not depend on it.

    Raises:
        BadInputError: a file or a column is missing, a value is null or outside what the module
            says, a product is not in the catalog, a query is in both splits, or there is no pair.
    """
    path = folder / RELEVANCE
    own = None
    if labels is None or path.exists():
        own = _read_own(path, catalog)
    more = [] if labels is None else label_files(labels)
    rows = _rows(path, own, [_read_file(file, catalog, _NAMES) for file in more], catalog)
    if source != "all":
        rows = rows.of_source(source)
    if not len(rows):
        raise BadInputError(f"{labels or path}: there is no label of source '{source}'")
    return rows.merged()


def read_relevance_rows(folder: Path, catalog: Catalog) -> RelevanceRows:
    """Read ``folder/relevance.parquet`` and merge nothing.

    Raises:
        BadInputError: as `read_relevance` does.
    """
    path = folder / RELEVANCE
    return _rows(path, _read_own(path, catalog), [], catalog)


def _rows(
    path: Path, own: pa.Table | None, others: list[pa.Table], catalog: Catalog
) -> RelevanceRows:
    """Return the rows of tables of `_read_file`, of which ``own`` may have a split."""
    read = [] if own is None else [own.select(_NAMES)]
    table = pa.concat_tables(read + others)
    queries, query = _number_queries(table.column(columns.QUERY))
    product, label, by = (table.column(name).to_numpy() for name in _NAMES[1:])
    test = None
    if own is not None and SPLIT in own.column_names:
        test = _published_test(path, queries, query[: len(own)], own.column(SPLIT).to_numpy())
    return RelevanceRows(
        queries=queries,
        query=query,
        product=product,
        label=label,
        source=by,
        published_test=test,
        products=len(catalog),
    )


def label_files(folder: Path) -> list[Path]:
    """Return the files of labels in a folder of ``label-relevance label``, in their order.

    Raises:
        BadInputError: there is none.
    """
    found = sorted(folder.glob(_LABEL_FILES))
    if not found:
        raise BadInputError(
            f"{folder}: holds no {_LABEL_FILES}; name a folder that `label-relevance label` wrote"
        )
    return found


def _read_own(path: Path, catalog: Catalog) -> pa.Table:
    """Return the checked rows of the dataset itself, see `_read_file`; at least one."""
    if not path.exists():
        raise BadInputError(f"{path}: no such file; it holds the relevance labels")
    read = [_read_file(file, catalog, (*_NAMES, SPLIT)) for file in parquet_files(path)]
    if len({SPLIT in table.column_names for table in read}) == 2:
        raise BadInputError(f"{path}: column '{SPLIT}' stands in some of its files only")
    table = pa.concat_tables(read)
    if not len(table):
        raise BadInputError(f"{path}: the table is empty")
    return table


def _read_file(path: Path, catalog: Catalog, wanted: Sequence[str]) -> pa.Table:
    """Return the checked rows of one file, all but the queries as numbers.

    Products become rows of the catalog (int64), sources and splits positions in `SOURCES` and
    ``_SPLITS`` (int8). The split may be missing.
    """
    with open_parquet(path, _NAMES) as file:
        names = [name for name in wanted if name != SPLIT or name in file.schema_arrow.names]
        for name in names:
            if name in (columns.PRODUCT_ID, columns.LABEL):
                check_type(path, file, name, pa.types.is_integer, "an integer")
            else:
                check_type(path, file, name, is_text, "text")
        return _numbered(path, file.read(names), catalog)


def _numbered(path: Path, table: pa.Table, catalog: Catalog) -> pa.Table:
    query = table.column(columns.QUERY).cast(pa.large_string())
    blank = pc.equal(pc.utf8_trim_whitespace(query), "").fill_null(True)
    _refuse(path, columns.QUERY, blank, query, "text that is not blank")
    checked = {
        columns.QUERY: query,
        columns.PRODUCT_ID: _rows_of(path, table.column(columns.PRODUCT_ID), catalog),
        columns.LABEL: _one_of(path, columns.LABEL, table, pa.array([0, 1, 2])),
        columns.SOURCE: _one_of(path, columns.SOURCE, table, pa.array(SOURCES)),
    }
    if SPLIT in table.column_names:
        checked[SPLIT] = _one_of(path, SPLIT, table, pa.array(_SPLITS))
    return pa.table(checked)


def _one_of(path: Path, name: str, table: pa.Table, allowed: pa.Array) -> pa.ChunkedArray:
    """Return the position (int8) of each value of a column in ``allowed``, which holds them all."""
    values = table.column(name)
    positions = pc.index_in(values.cast(allowed.type), value_set=allowed)
    *most, last = allowed.to_pylist()
    expected = f"{', '.join(map(str, most))} or {last}"
    _refuse(path, name, positions.is_null(), values, expected)
    return positions.cast(pa.int8())


def _rows_of(path: Path, ids: pa.ChunkedArray, catalog: Catalog) -> pa.ChunkedArray:
    """Return the rows (int64) of products in the catalog, which holds them all."""
    _refuse(path, columns.PRODUCT_ID, ids.is_null(), ids, "an integer")
    rows = pc.index_in(ids.cast(pa.int64()), value_set=catalog.product_ids)
    if rows.null_count:
        unknown = ids.filter(rows.is_null())
        row = pc.index(rows.is_null(), True).as_py() + 1
        raise BadInputError(
            f"{path}: column '{columns.PRODUCT_ID}' names {len(pc.unique(unknown)):,} products "
            f"that {catalog.path} does not hold, the first is {unknown[0]} in row {row}"
        )
    return rows.cast(pa.int64())


def _refuse(
    path: Path, name: str, wrong: pa.ChunkedArray, values: pa.ChunkedArray, expected: str
) -> None:
    """Raise `BadInputError` that names the first row of ``wrong`` and its value, if any is."""
    row = pc.index(wrong, True).as_py()
    if row >= 0:
        value = values[row].as_py()
        found = "null" if value is None else repr(value)
        raise BadInputError(
            f"{path}: column '{name}', row {row + 1}: is {found}, expected {expected}"
        )


def _number_queries(texts: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """Return the distinct texts, sorted, and the position ([R] int32) of each row's in them."""
    found = texts.dictionary_encode().combine_chunks()
    order = pc.sort_indices(found.dictionary).to_numpy()
    position = np.empty(len(order), np.int32)
    position[order] = np.arange(len(order), dtype=np.int32)
    queries = found.dictionary.take(pa.array(order)).to_pylist()
    return queries, position[found.indices.to_numpy()]


def _published_test(
    path: Path, queries: list[str], query: np.ndarray, split: np.ndarray
) -> np.ndarray:
    """Return whether each query ([Q] bool) is in the dataset's own held-out set."""
    test, train = (
        np.bincount(query[split == _SPLITS.index(side)], minlength=len(queries)) > 0
        for side in (TEST, TRAIN)
    )
    both = np.flatnonzero(test & train)
    if len(both):
        raise _in_both_sets(path, queries[both[0]])
    return test


def _in_both_sets(path: Path, query: str) -> BadInputError:
    return BadInputError(f"{path}: query {query!r} is in the training and in the held-out set")


def _merge(key: np.ndarray, label: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each key once, ascending, with the label of its most trusted source.

    Args:
        key: [R] int64, of a pair.
        label: [R] int8.
        source: [R] int8, the lower the more trusted.
    """
    order = np.argsort(key * len(SOURCES) + source)
    key, label, source = key[order], label[order], source[order]
    first = np.concatenate([[True], key[1:] != key[:-1]])
    if first.all():
        return key, label
    pair = np.cumsum(first) - 1
    trusted = source == source[first][pair]
    count = np.bincount(pair[trusted])
    total = np.bincount(pair[trusted], weights=label[trusted]).astype(np.int64)
    return key[first], ((2 * total + count) // (2 * count)).astype(np.int8)


def split_queries(
    relevance: Relevance, *, held_out: float = 0.2, seed: int = 0
) -> tuple[Relevance, Relevance]:
    """Return the pairs to train on and those of held-out queries; no query is in both.

    Where the dataset publishes a split, that one counts. Elsewhere a hash of the query's text
    decides, so that a query falls on the same side in any dataset.

    Args:
        relevance: the pairs.
        held_out: the share of queries to hold out, between 0 and 1.
        seed: another one draws other queries.

    Raises:
        BadInputError: ``held_out`` is not between 0 and 1.
    """
    of_test = held_out_queries(relevance, held_out=held_out, seed=seed)[relevance.query]
    return relevance.take(~of_test), relevance.take(of_test)


def held_out_queries(relevance: Relevance, *, held_out: float = 0.2, seed: int = 0) -> np.ndarray:
    """Return which of ``relevance.queries`` `split_queries` holds out, [Q] bool.

    Raises:
        BadInputError: ``held_out`` is not between 0 and 1.
    """
    if not 0 < held_out < 1:
        raise BadInputError(f"the share of held-out queries lies between 0 and 1, got {held_out}")
    if relevance.published_test is not None:
        return relevance.published_test
    return hash_fraction(query_hashes(relevance.queries), seed) < held_out


def hash_fraction(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Return a number from 0 to below 1 for each int64 hash: a draw of its own for each seed."""
    mixed = _mix(hashes.view(np.uint64) ^ _mix(np.array([seed], np.int64).view(np.uint64)))
    return (mixed >> np.uint64(11)) / 2.0**53


def _mix(values: np.ndarray) -> np.ndarray:
    """Return SplitMix64's output function (Steele and others 2014) of uint64 values."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def query_hashes(queries: Sequence[str]) -> np.ndarray:
    """Return a hash of each query's text, [Q] int64, the same in any run."""
    return hash_strings(pa.array(queries, pa.large_string()))


def write_training_queries(model_folder: Path, queries: Sequence[str]) -> None:
    """Note in a model's folder which queries the model was trained on, as hashes.

    `unseen` reads it; a model that was trained on none has an empty list.
    """
    hashes = pa.table({_HASH: np.unique(query_hashes(queries))})
    with atomic_file(model_folder / TRAINING_QUERIES) as scratch:
        pq.write_table(hashes, scratch)


def unseen(relevance: Relevance, model_folder: Path) -> Relevance:
    """Return the pairs of the queries that a model was not trained on.

    Raises:
        BadInputError: the folder does not tell what the model was trained on, or it was trained on
            a query that the dataset's own split holds out.
    """
    path = model_folder / TRAINING_QUERIES
    if not path.is_file():
        raise BadInputError(f"{path}: no such file; it tells which queries a model was trained on")
    with open_parquet(path, [_HASH]) as file:
        check_type(path, file, _HASH, pa.types.is_int64, "int64")
        trained_on = file.read([_HASH]).column(0).to_numpy()
    seen = np.isin(query_hashes(relevance.queries), trained_on)
    if relevance.published_test is not None:
        both = np.flatnonzero(seen & relevance.published_test)
        if len(both):
            raise _in_both_sets(path, relevance.queries[both[0]])
    return relevance.take(~seen[relevance.query])
