"""Writing a generated dataset in parallel, by files that depend on nothing but their number."""

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.tables import EmbeddingTable, write_table
from experiments.datasets.writing import products, write_catalog, write_schema
from experiments.synthetic_parts import (
    impressions,
    number_of_groups,
    number_of_users,
    product_ids,
    purchases,
    query_texts,
)
from experiments.synthetic_truth import TRUTH, reachable
from experiments.synthetic_world import WEEKS, SyntheticConfig, schema, world
from features.dataset import IMPRESSIONS, PURCHASES
from features.errors import BadInputError
from features.files import atomic_file, write_text

SUMMARY = "truth.json"
TABLES = "tables"

_CLAIM = "generator.json"
_CATALOG_ROWS = 65_536
# Dictionaries of ids are no smaller than the ids, and larger than what follows from the row before.
_ENCODINGS = {"request_id": "DELTA_BINARY_PACKED", "product_id": "BYTE_STREAM_SPLIT"}

Part = tuple[int, int]


def generate(
    output: Path,
    config: SyntheticConfig,
    *,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int | float]:
    """Write a generated dataset, or what of it is missing.

    Args:
        output: folder of the dataset.
        config: what decides its content.
        processes: how many write; one is this one.
        progress: called with the number of files that are done and their total.

    Returns:
        The content of ``truth.json``: counts, and the metrics `reachable` in the evaluated week.

    Raises:
        BadInputError: ``output`` holds something else, or ``processes`` is below 1.
    """
    if processes < 1:
        raise BadInputError(f"processes must be 1 or more, got {processes}")
    _claim(output, config)
    summary = output / SUMMARY
    if summary.exists():
        return dict(json.loads(summary.read_text(encoding="utf-8")))
    # Week 0 stands for the purchases. A group's weeks follow each other: its purchases are kept.
    groups = range(number_of_groups(config))
    parts = [(week, group) for group in groups for week in range(WEEKS + 1)]
    for done, _ in enumerate(_run(partial(_write_part, output, config), parts, processes), 1):
        if progress is not None:
            progress(done, len(parts))
    _write_catalog(output, config)
    _write_tables(output, config)
    write_schema(output, schema())
    found = _summary(output, config)
    write_text(summary, json.dumps(found, indent=2) + "\n")
    return found


def part_name(week: int, group: int) -> str:
    """Return the name of a file of impressions, and of that of their probabilities."""
    return f"week-{week:02d}-group-{group:05d}.parquet"


def _claim(output: Path, config: SyntheticConfig) -> None:
    """Make the folder this dataset's, or find that it is already.

    Raises:
        BadInputError: it holds something else.
    """
    claim = output / _CLAIM
    text = json.dumps(asdict(config), indent=2) + "\n"
    if claim.is_file():
        if claim.read_text(encoding="utf-8") != text:
            raise BadInputError(
                f"{claim}: the folder holds a dataset of other options; choose another --output"
            )
        return
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise BadInputError(f"{output}: exists and is not a generated dataset; name another folder")
    output.mkdir(parents=True, exist_ok=True)
    write_text(claim, text)


def _run(write: Callable[[Part], None], parts: Sequence[Part], processes: int) -> Iterator[None]:
    """Write the parts, in this process or in several others, and yield after each."""
    if processes == 1:
        yield from map(write, parts)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(write, part) for part in parts]
        try:
            for finished in as_completed(running):
                yield finished.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_part(output: Path, config: SyntheticConfig, part: Part) -> None:
    """Write the purchases of a group of users (week 0), or its impressions of a week."""
    week, group = part
    if week == 0:
        target = output / PURCHASES / f"group-{group:05d}.parquet"
        if not target.exists():
            with atomic_file(target) as scratch:
                pq.write_table(purchases(config, group), scratch, compression="zstd")
        return
    name = part_name(week, group)
    target = output / IMPRESSIONS / name
    if not target.exists():
        # Left from the inner to the outer: the probabilities are there before the impressions.
        with atomic_file(target) as rows, atomic_file(output / TRUTH / name) as truth:
            _write_impressions(rows, truth, impressions(config, week, group))


def _write_impressions(
    rows: Path, truth: Path, pieces: Iterator[tuple[pa.Table, np.ndarray]]
) -> None:
    """Write impressions and their probabilities, each piece a row group."""
    row_writer = truth_writer = None
    try:
        for table, probability in pieces:
            probabilities = pa.table({"probability": probability})
            if row_writer is None or truth_writer is None:
                plain = [name for name in table.column_names if name not in _ENCODINGS]
                row_writer = _writer(rows, table.schema, plain, _ENCODINGS)
                encodings = {"probability": "BYTE_STREAM_SPLIT"}
                truth_writer = _writer(truth, probabilities.schema, [], encodings)
            row_writer.write_table(table)
            truth_writer.write_table(probabilities)
    finally:
        for writer in (row_writer, truth_writer):
            if writer is not None:
                writer.close()


def _writer(
    path: Path, columns: pa.Schema, dictionaries: list[str], encodings: dict[str, str]
) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path,
        columns,
        compression="zstd",
        compression_level=1,
        use_dictionary=dictionaries,
        column_encoding=encodings,
    )


def _write_catalog(output: Path, config: SyntheticConfig) -> None:
    """Write ``catalog.parquet``: a title and an aisle for each product."""
    categories = world(config).categories

    def pieces() -> Iterator[pa.Table]:
        for first in range(0, config.products, _CATALOG_ROWS):
            rows = np.arange(first, min(first + _CATALOG_ROWS, config.products))
            titles = [f"product {row}" for row in rows]
            aisles = [f"category {row % categories}" for row in rows]
            yield products(product_ids(rows), titles, aisles=aisles)

    write_catalog(output, pieces())


def _write_tables(output: Path, config: SyntheticConfig) -> None:
    """Write the latent vectors of products and queries as embedding tables."""
    made = world(config)
    drawn = (config.products, config.dimension, config.seed)
    fingerprint = hashlib.sha256(f"synthetic {drawn}".encode()).hexdigest()
    ids = {
        "product": pa.array(product_ids(np.arange(config.products)), pa.int64()),
        "query": query_texts(made),
    }
    vectors = {"product": made.products, "query": made.queries}
    for name in ids:
        table = EmbeddingTable(
            ids=ids[name], embedding=vectors[name], fingerprint=fingerprint, normalized=True
        )
        write_table(output / TABLES / f"{name}.parquet", table)


def _summary(output: Path, config: SyntheticConfig) -> dict[str, int | float]:
    """Return the content of ``truth.json``."""
    rows = {
        name: sum(pq.read_metadata(file).num_rows for file in (output / name).iterdir())
        for name in (IMPRESSIONS, PURCHASES)
    }
    stored = sum(file.stat().st_size for file in output.rglob("*.parquet"))
    return {
        "impressions": rows[IMPRESSIONS],
        "purchases": rows[PURCHASES],
        "users": number_of_users(config),
        "products": config.products,
        "bytes": stored,
        "bytes_per_impression": stored / rows[IMPRESSIONS],
        **reachable(output, WEEKS).document(),
    }
