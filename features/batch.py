"""Request records as tensors, read in a reproducible order ahead of their use.

A batch is request-level tensors, candidate-level tensors and the candidates of each request.
Dimensions: ``B`` requests, ``C`` candidates of all of them, ``H`` purchases of all histories,
``S`` sparse and ``D`` dense features of one level::

    lengths            [3,          2]               B = 2
    product            [17, 20, 31, 20, 44]          C = 5
    history_lengths    [2,      0]
    history            [31, 17]                      H = 2
    history_age        [0,  12]
"""

import queue
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from features import columns
from features.errors import BadInputError
from features.id_map import MISSING_ID, hash_strings
from features.schema import DatasetSchema, Level

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestBatch:
    """B requests in raw ids and raw values.

    Attributes:
        lengths: [B] int64, candidates of each request.
        query: [B] int64, `hash_strings` of the query.
        history: [H] int64 product ids, most recent first within a request.
        history_age: [H] int16, whole days of 24 hours between the purchase and the request.
        history_lengths: [B] int64.
        request_sparse: [S, B] int64 ids.
        request_dense: [D, B] float32, NaN where missing.
        product: [C] int64 product ids.
        candidate_sparse: [S, C] int64 ids.
        candidate_dense: [D, C] float32, NaN where missing.
        clicked: [C] float32 of 0 and 1; empty where unknown.
        weight: [B] float32, what each request counts in training.
    """

    lengths: Tensor
    query: Tensor
    history: Tensor
    history_age: Tensor
    history_lengths: Tensor
    request_sparse: Tensor
    request_dense: Tensor
    product: Tensor
    candidate_sparse: Tensor
    candidate_dense: Tensor
    clicked: Tensor
    weight: Tensor

    @classmethod
    def from_records(cls, records: pa.Table, schema: DatasetSchema) -> "RequestBatch":
        """Make a batch of request records (one row a request).

        Without a column ``clicked`` that is unknown; without one ``purchase_history`` every
        history is empty; without one ``purchase_age_days`` every purchase has age 0.

        Raises:
            BadInputError: a request has more or fewer ages than purchases.
        """
        history, age = _history(records)
        products = records[columns.PRODUCT_ID]
        clicked = np.zeros(0, np.float32)
        if columns.CLICKED in records.column_names:
            clicked = dense_values(_flatten(records[columns.CLICKED]))
        request = level_features(records, schema, "request")
        candidate = level_features(records, schema, "candidate")
        return cls(
            lengths=_lengths(products),
            query=_tensor(sparse_ids(records[columns.QUERY])),
            history=_tensor(sparse_ids(_flatten(history))),
            history_age=_tensor(age),
            history_lengths=_lengths(history),
            request_sparse=_tensor(request[0]),
            request_dense=_tensor(request[1]),
            product=_tensor(sparse_ids(_flatten(products))),
            candidate_sparse=_tensor(candidate[0]),
            candidate_dense=_tensor(candidate[1]),
            clicked=_tensor(clicked),
            weight=_weight(records),
        )


def _weight(records: pa.Table) -> Tensor:
    """Return what each request counts in training: 1 where the records do not say."""
    if columns.WEIGHT not in records.column_names:
        return torch.ones(len(records))
    return _tensor(dense_values(records[columns.WEIGHT]))


def _history(records: pa.Table) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Return the purchase histories and the ages (int16, [H]) of what they hold."""
    if columns.PURCHASE_HISTORY not in records.column_names:
        nothing = pa.chunked_array([pa.nulls(len(records), pa.list_(pa.int64()))])
        return nothing, np.zeros(0, np.int16)
    history = records[columns.PURCHASE_HISTORY]
    lengths = _lengths(history)
    if columns.PURCHASE_AGE_DAYS not in records.column_names:
        return history, np.zeros(int(lengths.sum()), np.int16)
    ages = records[columns.PURCHASE_AGE_DAYS]
    wrong = (_lengths(ages) != lengths).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise BadInputError(
            f"request records: row {row + 1} has {int(_lengths(ages)[row])} values in column "
            f"'{columns.PURCHASE_AGE_DAYS}' and {int(lengths[row])} in '{columns.PURCHASE_HISTORY}'"
        )
    return history, _flatten(ages).cast(pa.int16()).to_numpy(zero_copy_only=False)


def level_features(
    records: pa.Table, schema: DatasetSchema, level: Level
) -> tuple[np.ndarray, np.ndarray]:
    """Return raw ids [S, N] int64 and values [D, N] float32 of one level's features.

    N is the number of records for ``request``, of their candidates for ``candidate``.
    """
    flat = {
        f.name: _flatten(records[f.name]) if level == "candidate" else records[f.name]
        for f in schema.features
        if f.level == level
    }
    number = len(records)
    if level == "candidate":
        number = len(_flatten(records[columns.PRODUCT_ID]))
    ids = [sparse_ids(flat[name]) for name in schema.names("sparse", level)]
    values = [dense_values(flat[name]) for name in schema.names("dense", level)]
    return (
        np.stack(ids) if ids else np.zeros((0, number), np.int64),
        np.stack(values) if values else np.zeros((0, number), np.float32),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkShare:
    """What one of several processes reads of a chunk.

    Attributes:
        records: the requests of its row groups.
        owner: [n] int64, of each of the chunk's n requests the process that reads it.
    """

    records: pa.Table
    owner: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordFiles:
    """Files of request records, addressed by row group."""

    units: tuple[tuple[Path, int], ...]

    @classmethod
    def open(cls, paths: Iterable[Path]) -> "RecordFiles":
        """List the row groups of ``paths`` in order."""
        return cls(
            units=tuple(
                (path, group)
                for path in paths
                for group in range(pq.read_metadata(path).num_row_groups)
            )
        )

    def chunks(
        self,
        groups: int,
        *,
        seed: int | None = None,
        epoch: int = 0,
        skip: int = 0,
        leave_out: Collection[str] = (),
    ) -> Iterator[pa.Table]:
        """Yield tables of ``groups`` row groups each, from the ``skip``-th on.

        With a seed the row groups are drawn in an order that depends on seed and epoch alone, and
        the requests of a chunk should be put in `request_order`; without one the order is the
        files'. Columns named in ``leave_out`` are not read; with the purchase history its ages are
        left out too.
        """
        shares = self.shares(
            groups, rank=0, world=1, seed=seed, epoch=epoch, skip=skip, leave_out=leave_out
        )
        return (share.records for share in shares)

    def shares(
        self,
        groups: int,
        *,
        rank: int,
        world: int,
        seed: int | None = None,
        epoch: int = 0,
        skip: int = 0,
        leave_out: Collection[str] = (),
    ) -> Iterator[ChunkShare]:
        """Yield what process ``rank`` of ``world`` reads of each of the `chunks`.

        The row groups of a chunk go to the processes in turn, so that a chunk holds the same
        requests whatever their number.
        """
        if columns.PURCHASE_HISTORY in leave_out:
            leave_out = {*leave_out, columns.PURCHASE_AGE_DAYS}
        order = np.arange(len(self.units))
        if seed is not None:
            order = np.random.default_rng([seed, epoch]).permutation(order)
        with ExitStack() as stack:
            files: dict[Path, pq.ParquetFile] = {}
            for path, _ in self.units:
                if path not in files:
                    files[path] = stack.enter_context(_open(path))
            for start in range(skip * groups, len(order), groups):
                chosen = [self.units[i] for i in order[start : start + groups]]
                sizes = [files[p].metadata.row_group(g).num_rows for p, g in chosen]
                tables = [_read(files[p], g, leave_out) for p, g in chosen[rank::world]]
                path, group = chosen[0]
                yield ChunkShare(
                    records=pa.concat_tables(tables)
                    if tables
                    else _read(files[path], group, leave_out).slice(0, 0),
                    owner=np.repeat(np.arange(len(chosen)) % world, sizes),
                )


def request_order(requests: int, *, seed: int, epoch: int, chunk: int) -> np.ndarray:
    """Return the order (int64, [requests]) of the requests of a shuffled chunk."""
    return np.random.default_rng([seed, epoch, chunk]).permutation(requests)


def _open(path: Path) -> pq.ParquetFile:
    """Open a file so that text stays in the dictionaries it is stored in."""
    text = [
        f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        for field in pq.read_schema(path)
        if pa.types.is_string(getattr(field.type, "value_type", field.type))
    ]
    return pq.ParquetFile(path, read_dictionary=text)


def _read(file: pq.ParquetFile, group: int, leave_out: Collection[str]) -> pa.Table:
    names = [name for name in file.schema_arrow.names if name not in leave_out]
    return file.read_row_group(group, columns=names, use_threads=False)


def prefetch(
    items: Iterable[Item], work: Callable[[Item], Result], depth: int = 1
) -> Iterator[Result]:
    """Yield ``work(item)`` in order; up to ``depth`` results are made ahead in a worker thread.

    The worker's torch operations use one thread, so that they share the cores with the consumer's.
    An exception in the worker is raised here. The worker ends when the consumer stops early.
    """
    results: queue.Queue[tuple[bool, object]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(done: bool, value: object) -> None:
        while not stopped.is_set():
            try:
                results.put((done, value), timeout=0.1)
                return
            except queue.Full:
                continue

    def produce() -> None:
        torch.set_num_threads(1)
        started.set()
        try:
            for item in items:
                put(False, work(item))
                if stopped.is_set():
                    return
            put(True, None)
        except BaseException as error:
            put(True, error)

    threads = torch.get_num_threads()
    started = threading.Event()
    worker = threading.Thread(target=produce, name="prefetch", daemon=True)
    worker.start()
    started.wait()
    torch.set_num_threads(threads)  # torch also remembers the worker's number for new threads
    try:
        while True:
            done, value = results.get()
            if done:
                if isinstance(value, BaseException):
                    raise value
                return
            yield value  # type: ignore[misc]
    finally:
        stopped.set()
        worker.join()


def sparse_ids(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return the raw ids (int64, [N]) of a column of integers or strings.

    Strings are hashed once each; nulls become `MISSING_ID`.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64()).fill_null(MISSING_ID).to_numpy(zero_copy_only=False)
    if not pa.types.is_dictionary(column.type):
        column = pc.dictionary_encode(column)
    words = column.dictionary
    ids = sparse_ids(words) if pa.types.is_integer(words.type) else hash_strings(words)
    places = column.indices.fill_null(len(ids)).to_numpy(zero_copy_only=False)
    return np.append(ids, MISSING_ID)[places]


def dense_values(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return a numeric or bool column as float32 [N], NaN where null."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column.cast(pa.float32()).fill_null(float("nan")).to_numpy(zero_copy_only=False)


def _flatten(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks().flatten()


def _lengths(column: pa.ChunkedArray) -> Tensor:
    lengths = pc.list_value_length(column.combine_chunks()).cast(pa.int64()).fill_null(0)
    return _tensor(lengths.to_numpy(zero_copy_only=False))


def _tensor(values: np.ndarray) -> Tensor:
    """Return ``values`` as a tensor; those that lie in Arrow's memory, which is read-only, copied.

    A tensor cannot be read-only: torch warns of one that shares such memory.
    """
    return torch.from_numpy(values if values.flags.writeable else values.copy())
