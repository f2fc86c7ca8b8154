"""From a dataset folder to its embedding tables, ``product.parquet`` and ``query.parquet``.

Legend: ``N`` rows, ``D`` embedding dimension.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.progress import Progress, TextColumn

from embeddings.catalog import Catalog, read_catalog, read_queries
from embeddings.contents import PRODUCT, CatalogReading
from embeddings.encoder import Encoder
from embeddings.images import ImageFaults
from embeddings.open_encoder import open_encoder
from embeddings.tables import CONTENT_TYPE, EmbeddingTable, write_table
from embeddings.vector_store import VectorStore, content_key
from features.console import progress_bar, say
from features.errors import BadInputError
from features.files import fingerprint, write_text

PRODUCT_TABLE = "product.parquet"
QUERY_TABLE = "query.parquet"
SUMMARY = "summary.json"

_QUERY = "query"
_PARTS = ".parts"
_TEXTS_AT_ONCE = 2048


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
    catalog, queries = read_catalog(data), read_queries(data)
    encoder = encoder or open_encoder(None)
    faults = ImageFaults(max_broken_images)
    origin = {
        "encoder_fingerprint": encoder.fingerprint,
        "dataset_fingerprint": _dataset_fingerprint(catalog, queries),
    }
    if _holds(output, origin):
        shutil.rmtree(output / _PARTS, ignore_errors=True)
        say(f"{output}: holds these embedding tables already; nothing to do")
        return
    store = _found_vectors(output, encoder)
    started = time.perf_counter()
    with progress_bar(TextColumn("{task.fields[rate]}")) as bar:
        product_keys = _encode_products(catalog, encoder, store, faults, bar)
        texts = {content_key(_QUERY, query): query for query in queries}
        _encode_texts(texts, encoder.encode_queries, store, bar, "queries")
    seconds = time.perf_counter() - started
    product_ids = catalog.product_ids.filter(pa.array([key is not None for key in product_keys]))
    tables = {
        PRODUCT_TABLE: _table(product_ids, product_keys, store, encoder),
        QUERY_TABLE: _table(pa.array(queries, pa.string()), list(texts), store, encoder),
    }
    counts = {
        **_catalog_counts(catalog, len(product_ids)),
        "broken_images": faults.broken,
        "queries": len(queries),
        "encoded": store.added,
        "reused": len({*product_keys, *texts} - {None}) - store.added,
        "seconds": round(seconds, 3),
        "encoded_per_second": round(store.added / seconds, 1),
    }
    _put(output, tables, {**origin, "dimension": encoder.dim, **counts})
    say(_sentence(output, counts))


def _catalog_counts(catalog: Catalog, encoded: int) -> dict[str, int]:
    return {
        "products": encoded,
        "products_without_title": catalog.titles.null_count,
        "products_left_out": len(catalog) - encoded,
        "distinct_titles": pc.count_distinct(catalog.titles).as_py(),
    }


def _found_vectors(output: Path, encoder: Encoder) -> VectorStore:
    """Return the vectors of this encoder that tables and an unfinished run left in ``output``."""
    parts = output / _PARTS
    store = VectorStore(parts, encoder)
    for path in (output / PRODUCT_TABLE, output / QUERY_TABLE, *sorted(parts.glob("*.parquet"))):
        store.read(path)
    if len(store):
        say(f"{output}: holds {len(store):,} vectors of this encoder; they are not made again")
    return store


def _encode_products(
    catalog: Catalog, encoder: Encoder, store: VectorStore, faults: ImageFaults, bar: Progress
) -> list[bytes | None]:
    """Put the vectors of all products into ``store``; return the content of each product."""
    if encoder.reads_images and catalog.has_images:
        reading = CatalogReading(catalog, store, faults)
        _encode_illustrated(reading, len(catalog), encoder, store, bar)
        faults.check()
        keys, titles = reading.keys, reading.titles
        missing = "neither a title nor a readable image is in any row"
    else:
        texts = catalog.titles.to_pylist()
        keys = [None if text is None else content_key(PRODUCT, text) for text in texts]
        titles = {key: text for key, text in zip(keys, texts, strict=True) if key is not None}
        missing = "column 'title' holds no text"
    if not any(keys):
        raise BadInputError(f"{catalog.path}: {missing}")
    _encode_texts(titles, encoder.encode_products, store, bar, "titles")
    return keys


def _encode_illustrated(
    reading: CatalogReading, products: int, encoder: Encoder, store: VectorStore, bar: Progress
) -> None:
    """Encode contents with an image, while a thread reads and decodes the next ones."""
    from features.batch import prefetch  # it imports torch

    say(f"reading the images of {products:,} products")
    advance = _advancer(bar, "products with images", products)
    done = 0
    for read, batch in prefetch(reading.new(), lambda item: item):
        if batch:
            titles = [content.title for content in batch]
            vectors = encoder.encode_products(titles, [content.image for content in batch])
            store.add([content.key for content in batch], vectors, titles)
        advance(read - done)
        done = read
    assert done == products, (done, products)


def _encode_texts(
    texts: Mapping[bytes, str],
    encode: Callable[[Sequence[str]], np.ndarray],
    store: VectorStore,
    bar: Progress,
    name: str,
) -> None:
    """Put the vectors of texts into ``store``, those that it does not hold.

    Texts of like length go together, which spares padding, and in an order of their own, so that
    the result does not depend on the order given.
    """
    new = [(len(text), text, key) for key, text in texts.items() if key not in store]
    say(f"encoding {len(new):,} {name}" + _besides(len(texts) - len(new)))
    advance = _advancer(bar, name, len(new))
    new.sort()
    for start in range(0, len(new), _TEXTS_AT_ONCE):
        batch = new[start : start + _TEXTS_AT_ONCE]
        named = [text for _, text, _ in batch]
        store.add([key for _, _, key in batch], encode(named), named)
        advance(len(batch))


def _besides(reused: int) -> str:
    return f"; {reused:,} are encoded already" if reused else ""


def _advancer(bar: Progress, name: str, total: int) -> Callable[[int], None]:
    """Return what moves ``bar`` forward by a number of items and shows items/s."""
    task = bar.add_task(name, total=total, rate="")
    started, done = time.perf_counter(), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        rate = done / (time.perf_counter() - started)
        bar.update(task, advance=count, rate=f"{rate:,.0f} items/s")

    return advance


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
    parts = output / _PARTS
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


def _dataset_fingerprint(catalog: Catalog, queries: list[str]) -> str:
    """Return the SHA-256 of the catalog's file and of the queries."""
    digest = hashlib.sha256(fingerprint(catalog.path).encode())
    digest.update(json.dumps(queries).encode())
    return digest.hexdigest()


def _holds(output: Path, origin: dict[str, str]) -> bool:
    """Return whether ``output`` holds the tables of ``origin``; raise if it is not ours to write.

    A missing or empty folder may be written, as may one that holds other embedding tables or the
    work of a run that was stopped.
    """
    if output.exists() and not output.is_dir():
        raise BadInputError(f"{output}: is a file; name a folder")
    if not output.exists() or not any(output.iterdir()):
        return False
    try:
        found = json.loads((output / SUMMARY).read_text(encoding="utf-8"))
        same = [found[key] == value for key, value in origin.items()]
    except (OSError, ValueError, KeyError, TypeError):
        if (output / _PARTS).is_dir():
            return False
        raise BadInputError(
            f"{output}: holds something other than embedding tables; name another folder"
        ) from None
    if all(same) and all((output / name).is_file() for name in (PRODUCT_TABLE, QUERY_TABLE)):
        return True
    say(f"{output}: its tables are of another encoder or dataset and are replaced")
    return False
