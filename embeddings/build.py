"""From a dataset folder to its embedding tables, ``product.parquet`` and ``query.parquet``.

Legend: ``N`` rows, ``D`` embedding dimension.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.progress import Progress, TextColumn

from embeddings.catalog import Catalog, read_catalog, read_queries
from embeddings.encoder import Encoder
from embeddings.tables import EmbeddingTable, write_table
from embeddings.text_encoder import TextEncoder
from features.console import progress_bar, say
from features.errors import BadInputError
from features.files import atomic_folder, fingerprint

PRODUCT_TABLE = "product.parquet"
QUERY_TABLE = "query.parquet"
SUMMARY = "summary.json"

_TEXTS_AT_ONCE = 2048


def build_tables(data: Path, output: Path, encoder: Encoder | None = None) -> None:
    """Encode the catalog and the queries of a dataset folder into embedding tables.

    Writes ``product.parquet``, ``query.parquet`` (float16) and ``summary.json`` into ``output``,
    which appears whole or not at all. Tables that are there already are kept if encoder, catalog
    and queries are the same, and replaced if not. Products without a title have no row: a ranker
    takes them for unknown. The same command twice gives the same tables.

    Args:
        data: the dataset folder; of it, the catalog, the impressions and the relevance labels.
        output: the folder to write.
        encoder: the packaged MiniLM if ``None``.

    Raises:
        BadInputError: an input is missing or broken, or ``output`` holds something else.
    """
    catalog, queries = read_catalog(data), read_queries(data)
    if catalog.titles.null_count == len(catalog):
        raise BadInputError(f"{catalog.path}: column 'title' holds no text")
    encoder = encoder or TextEncoder.packaged()
    origin = {
        "encoder_fingerprint": encoder.fingerprint,
        "dataset_fingerprint": _dataset_fingerprint(catalog, queries),
    }
    if _holds(output, origin):
        say(f"{output}: holds these embedding tables already; nothing to do")
        return
    with atomic_folder(output) as folder:
        counts = _write_tables(folder, catalog, queries, encoder)
        summary = {**origin, "dimension": encoder.dim, **counts}
        (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    say(
        f"{output}: {counts['products']:,} products "
        f"({counts['products_without_title']:,} without a title left out) and "
        f"{counts['queries']:,} queries, {counts['texts']:,} texts encoded in "
        f"{counts['seconds']:.0f} s ({counts['texts_per_second']:,.0f} texts/s)"
    )


def _write_tables(
    folder: Path, catalog: Catalog, queries: list[str], encoder: Encoder
) -> dict[str, Any]:
    """Write both tables and return the counts of the summary."""
    titled = catalog.titles.is_valid()
    titles = catalog.titles.filter(titled).dictionary_encode()
    texts = len(titles) if encoder.reads_images else len(titles.dictionary)
    texts += len(queries)
    say(f"encoding {texts:,} texts")
    started = time.perf_counter()
    with progress_bar(TextColumn("{task.fields[rate]}")) as bar:
        advance = _advancer(bar, texts)
        if encoder.reads_images:
            product = _encode_with_images(catalog, len(titles), encoder, advance)
        else:
            distinct = titles.dictionary.to_pylist()
            product = _encode_texts(distinct, encoder.encode_products, encoder.dim, advance)
            product = product[titles.indices.to_numpy()]
        query = _encode_texts(queries, encoder.encode_queries, encoder.dim, advance)
    seconds = time.perf_counter() - started
    for name, ids, embedding in (
        (PRODUCT_TABLE, catalog.product_ids.filter(titled), product),
        (QUERY_TABLE, pa.array(queries, pa.string()), query),
    ):
        table = EmbeddingTable(
            ids=ids,
            embedding=embedding,
            fingerprint=encoder.fingerprint,
            normalized=encoder.normalized,
        )
        write_table(folder / name, table)
    return {
        "products": len(titles),
        "products_without_title": catalog.titles.null_count,
        "distinct_titles": len(titles.dictionary),
        "queries": len(queries),
        "texts": texts,
        "seconds": round(seconds, 3),
        "texts_per_second": round(texts / seconds, 1),
    }


def _encode_texts(
    texts: Sequence[str],
    encode: Callable[[Sequence[str]], np.ndarray],
    dim: int,
    advance: Callable[[int], None],
) -> np.ndarray:
    """Return [N, D] float16 vectors of distinct texts.

    Texts of like length go together, which spares padding, and in an order of their own, so that
    the result does not depend on the order given.
    """
    encoded = np.empty((len(texts), dim), np.float16)
    order = sorted(range(len(texts)), key=lambda row: (len(texts[row]), texts[row]))
    for start in range(0, len(order), _TEXTS_AT_ONCE):
        rows = order[start : start + _TEXTS_AT_ONCE]
        encoded[rows] = encode([texts[row] for row in rows])
        advance(len(rows))
    return encoded


def _encode_with_images(
    catalog: Catalog, count: int, encoder: Encoder, advance: Callable[[int], None]
) -> np.ndarray:
    """Return [N, D] float16 vectors of all products with a title, in the catalog's order."""
    encoded = np.empty((count, encoder.dim), np.float16)
    done = 0
    for _, every_title, every_image in catalog.with_images():
        titled = [row for row, title in enumerate(every_title) if title]
        titles = [every_title[row] for row in titled]
        if titles:
            images = [every_image[row] for row in titled]
            encoded[done : done + len(titles)] = encoder.encode_products(titles, images)
            done += len(titles)
            advance(len(titles))
    assert done == count, (done, count)
    return encoded


def _advancer(bar: Progress, total: int) -> Callable[[int], None]:
    """Return what moves ``bar`` forward by a number of texts and shows texts/s."""
    task = bar.add_task("encode", total=total, rate="")
    started, done = time.perf_counter(), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        rate = done / (time.perf_counter() - started)
        bar.update(task, advance=count, rate=f"{rate:,.0f} texts/s")

    return advance


def _dataset_fingerprint(catalog: Catalog, queries: list[str]) -> str:
    """Return the SHA-256 of the catalog's file and of the queries."""
    digest = hashlib.sha256(fingerprint(catalog.path).encode())
    digest.update(json.dumps(queries).encode())
    return digest.hexdigest()


def _holds(output: Path, origin: dict[str, str]) -> bool:
    """Return whether ``output`` holds the tables of ``origin``; raise if it is not ours to write.

    A missing or empty folder may be written, as may one that holds other embedding tables.
    """
    if output.exists() and not output.is_dir():
        raise BadInputError(f"{output}: is a file; name a folder")
    if not output.exists() or not any(output.iterdir()):
        return False
    try:
        found = json.loads((output / SUMMARY).read_text(encoding="utf-8"))
        same = [found[key] == value for key, value in origin.items()]
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInputError(
            f"{output}: holds something other than embedding tables; name another folder"
        ) from None
    if all(same) and all((output / name).is_file() for name in (PRODUCT_TABLE, QUERY_TABLE)):
        return True
    say(f"{output}: its tables are of another encoder or dataset and are replaced")
    return False
