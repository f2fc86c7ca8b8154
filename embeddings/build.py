"""From a dataset folder to its embedding tables, ``product.parquet`` and ``query.parquet``.

Legend: ``N`` rows, ``D`` embedding dimension.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from embeddings.catalog import Catalog
from embeddings.contents import Share
from embeddings.encoder import Encoder
from embeddings.encoding import (
    PARTS,
    PRODUCT_TABLE,
    QUERY_TABLE,
    SUMMARY,
    Work,
    encode_calls,
    open_work,
    read_parts,
)
from embeddings.images import ImageFaults
from embeddings.tables import CONTENT_TYPE, EmbeddingTable, write_table
from embeddings.vector_store import VectorStore
from features.console import say
from features.files import write_text


def build_tables(
    data: Path, output: Path, encoder: Encoder | None = None, *, max_broken_images: float = 0.1
) -> None:
    """Encode the catalog and the queries of a dataset folder into embedding tables.

    Writes ``product.parquet``, ``query.parquet`` (float16) and ``summary.json`` into ``output``.
    Tables that are there already stay until the new ones are whole. They are kept if encoder,
    catalog and queries are the same; if the encoder is, what they hold of products and queries
    that did not change is not encoded again.

    A run that was stopped leaves its work in ``output``; the same command again goes on with it
    and ends with the tables that one run would have given, byte for byte.

    Products without title and image, or without title where the encoder reads no images, have no
    row: a ranker takes them for unknown. Broken images count as missing.

    Args:
        data: the dataset folder; of it, the catalog, the impressions and the relevance labels.
        output: the folder to write.
        encoder: the packaged MiniLM if ``None``.
        max_broken_images: the largest share of broken images that is put up with.

    Raises:
        BadInputError: an input is missing or broken, more images are broken than allowed, or
            ``output`` holds something else.
    """
    faults = ImageFaults(max_broken_images)
    work = open_work(data, output, encoder)
    if work is not None:
        _finish(work, faults)


def build_tables_together(
    data: Path, output: Path, encoder: Encoder | None = None, *, max_broken_images: float = 0.1
) -> None:
    """Do as `build_tables` does, with all processes that torchrun started.

    Each makes its share of the encoder's calls and saves the vectors in ``output``, which all must
    see; the first process then puts the tables together. The calls are those of one process, and so
    is every byte of the tables; a run that was stopped goes on with any number of processes. Too
    many broken images are told of at the end.
    """
    from embeddings import distributed

    faults = ImageFaults(max_broken_images)
    work = open_work(data, output, encoder)
    if work is None:
        return
    if distributed.world() == 1:
        _finish(work, faults)
        return
    group = distributed.patient_group()
    started = time.perf_counter()
    encode_calls(work, Share(number=distributed.rank(), of=distributed.world()), None)
    work.store.save()
    encoded = distributed.count(work.store.added, group)  # nobody goes on before all are done
    if distributed.rank() == 0:
        read_parts(work.store)
        _finish(work, faults, encoded=encoded, started=started)


def encode_share(data: Path, output: Path, encoder: Encoder | None, share: Share) -> int:
    """Make a share of the calls of the encoder, whose vectors `build_tables` finds in ``output``.

    Where all shares were made, in any processes and at any time, it finds everything encoded but
    titles of products whose image is broken.

    Args:
        data: the dataset folder.
        output: the folder of the tables.
        encoder: the packaged MiniLM if ``None``.
        share: which calls.

    Returns:
        How many contents were encoded.

    Raises:
        BadInputError: as `build_tables` does, but for the share of broken images.
    """
    work = open_work(data, output, encoder)
    if work is None:
        return 0
    encode_calls(work, share, None)
    work.store.save()
    return work.store.added


def _finish(
    work: Work, faults: ImageFaults, *, encoded: int | None = None, started: float | None = None
) -> None:
    """Encode what the store lacks and put the tables in place.

    Args:
        work: what there is to do.
        faults: counts broken images.
        encoded: contents that all processes have encoded, if there are several.
        started: when they began, by `time.perf_counter`.
    """
    catalog, encoder, store = work.catalog, work.encoder, work.store
    started = started or time.perf_counter()
    before = encoded - store.added if encoded is not None else 0
    product_keys, texts = encode_calls(work, Share(), faults)
    encoded = before + store.added
    seconds = time.perf_counter() - started
    product_ids = catalog.product_ids.filter(pa.array([key is not None for key in product_keys]))
    tables = {
        PRODUCT_TABLE: _table(product_ids, product_keys, store, encoder),
        QUERY_TABLE: _table(pa.array(work.queries, pa.string()), list(texts), store, encoder),
    }
    counts = {
        **_catalog_counts(catalog, len(product_ids)),
        "broken_images": faults.broken,
        "queries": len(work.queries),
        "encoded": encoded,
        "reused": len({*product_keys, *texts} - {None}) - encoded,
        "seconds": round(seconds, 3),
        "encoded_per_second": round(encoded / seconds, 1),
    }
    _put(work.output, tables, {**work.origin, "dimension": encoder.dim, **counts})
    say(_sentence(work.output, counts))


def _catalog_counts(catalog: Catalog, encoded: int) -> dict[str, int]:
    return {
        "products": encoded,
        "products_without_title": catalog.titles.null_count,
        "products_left_out": len(catalog) - encoded,
        "distinct_titles": pc.count_distinct(catalog.titles).as_py(),
    }


def _table(
    ids: pa.Array, keys: Sequence[bytes | None], store: VectorStore, encoder: Encoder
) -> EmbeddingTable:
    """Return the table of those ``keys`` that are not None."""
    known = [key for key in keys if key is not None]
    return EmbeddingTable(
        ids=ids,
        embedding=store.take(known),
        fingerprint=encoder.fingerprint,
        normalized=encoder.normalized,
        content=pa.array(known, CONTENT_TYPE),
    )


def _put(output: Path, tables: Mapping[str, EmbeddingTable], summary: dict[str, Any]) -> None:
    """Put new tables, once all are whole, in the place of the old ones.

    The summary, which vouches for the tables, is away while they change; the parts go last.
    """
    parts = output / PARTS
    for name, table in tables.items():
        write_table(parts / name, table)
    (output / SUMMARY).unlink(missing_ok=True)
    for name in tables:
        (parts / name).replace(output / name)
    write_text(output / SUMMARY, json.dumps(summary, indent=2) + "\n")
    shutil.rmtree(parts)


def _sentence(output: Path, counts: dict[str, Any]) -> str:
    broken = counts["broken_images"]
    return (
        f"{output}: {counts['products']:,} products "
        f"({counts['products_left_out']:,} without anything to encode left out"
        f"{f', {broken:,} broken images' if broken else ''}) and {counts['queries']:,} queries; "
        f"{counts['encoded']:,} contents encoded in {counts['seconds']:.0f} s "
        f"({counts['encoded_per_second']:,.0f}/s), {counts['reused']:,} reused"
    )
