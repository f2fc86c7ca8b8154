"""Encoding a dataset's catalog and queries: which calls of the encoder there are, and making them.

Legend: ``N`` rows, ``D`` embedding dimension.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import Progress, TextColumn

from embeddings.catalog import Catalog, read_catalog, read_queries
from embeddings.contents import PRODUCT, CatalogReading, Share
from embeddings.encoder import Encoder
from embeddings.images import ImageFaults
from embeddings.open_encoder import open_encoder
from embeddings.vector_store import VectorStore, content_key
from features.console import progress_bar, say
from features.errors import BadInputError
from features.files import fingerprint

PRODUCT_TABLE = "product.parquet"
QUERY_TABLE = "query.parquet"
SUMMARY = "summary.json"
PARTS = ".parts"

_QUERY = "query"
_TEXTS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What there is to do; ``origin`` tells it from other work."""

    catalog: Catalog
    queries: list[str]
    encoder: Encoder
    output: Path
    store: VectorStore
    origin: dict[str, str]


def open_work(data: Path, output: Path, encoder: Encoder | None) -> Work | None:
    """Return what there is to do, or None if ``output`` holds the tables already."""
    catalog, queries = read_catalog(data), read_queries(data)
    encoder = encoder or open_encoder(None)
    origin = {
        "encoder_fingerprint": encoder.fingerprint,
        "dataset_fingerprint": _dataset_fingerprint(catalog, queries),
    }
    if _holds(output, origin):
        shutil.rmtree(output / PARTS, ignore_errors=True)
        say(f"{output}: holds these embedding tables already; nothing to do")
        return None
    store = VectorStore(output / PARTS, encoder)
    for name in (PRODUCT_TABLE, QUERY_TABLE):
        store.read(output / name)
    store.settle()
    read_parts(store)
    if len(store):
        say(f"{output}: holds {len(store):,} vectors of this encoder; they are not made again")
    return Work(
        catalog=catalog,
        queries=queries,
        encoder=encoder,
        output=output,
        store=store,
        origin=origin,
    )


def read_parts(store: VectorStore) -> None:
    """Take the vectors that runs or other processes left beside the tables."""
    for path in sorted(store.parts.glob("*.parquet")):
        store.read(path)


def encode_calls(
    work: Work, share: Share, faults: ImageFaults | None
) -> tuple[list[bytes | None], dict[bytes, str]]:
    """Put the vectors of a share into the store; return the contents of products and queries.

    Without ``faults``, images that are broken are left to who has them.
    """
    encoder, store = work.encoder, work.store
    texts = {content_key(_QUERY, query): query for query in work.queries}
    with progress_bar(TextColumn("{task.fields[rate]}")) as bar:
        keys = _encode_products(work, share, faults, bar)
        _encode_texts(texts, encoder.encode_queries, store, share, bar, "queries")
    return keys, texts


def _encode_products(
    work: Work, share: Share, faults: ImageFaults | None, bar: Progress
) -> list[bytes | None]:
    """Put the vectors of a share of the products into the store; return all products' contents."""
    catalog, encoder, store = work.catalog, work.encoder, work.store
    bared: dict[bytes, str] = {}
    if encoder.reads_images and catalog.has_images:
        reading = CatalogReading(catalog, store, faults or ImageFaults(1, silent=True), share)
        _encode_illustrated(reading, len(catalog), encoder, store, bar)
        keys, titles = reading.keys, reading.titles
        if faults is not None:
            faults.check()
            bared = {key: text for key, text in reading.bared.items() if key not in titles}
        missing = "neither a title nor a readable image is in any row"
    else:
        texts = catalog.titles.to_pylist()
        keys = [None if text is None else content_key(PRODUCT, text) for text in texts]
        titles = {key: text for key, text in zip(keys, texts, strict=True) if key is not None}
        missing = "column 'title' holds no text"
    if not any(keys):
        raise BadInputError(f"{catalog.path}: {missing}")
    _encode_texts(titles, encoder.encode_products, store, share, bar, "titles")
    if bared:  # on their own, as only who has seen all images knows them
        _encode_texts(bared, encoder.encode_products, store, share, bar, "titles of broken images")
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
    share: Share,
    bar: Progress,
    name: str,
) -> None:
    """Put the vectors of a share of texts into ``store``, those that it does not hold.

    Texts of like length go together, which spares padding, and in an order of their own, so that
    the result does not depend on the order given.
    """
    lacking = [(len(text), text, key) for key, text in texts.items() if not store.is_settled(key)]
    lacking.sort()
    starts = range(0, len(lacking), _TEXTS_AT_ONCE)
    calls = [
        [
            (text, key)
            for _, text, key in lacking[start : start + _TEXTS_AT_ONCE]
            if key not in store
        ]
        for number, start in enumerate(starts)
        if share.has(number)
    ]
    new = sum(map(len, calls))
    others = "" if share.of == 1 else f", the share of one process of {share.of}"
    known = sum(key in store for key in texts)
    say(f"encoding {new:,} {name}{others}" + _besides(known))
    advance = _advancer(bar, name, new)
    for call in filter(None, calls):
        named = [text for text, _ in call]
        store.add([key for _, key in call], encode(named), named)
        advance(len(call))


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
        if (output / PARTS).is_dir():
            return False
        raise BadInputError(
            f"{output}: holds something other than embedding tables; name another folder"
        ) from None
    if all(same) and all((output / name).is_file() for name in (PRODUCT_TABLE, QUERY_TABLE)):
        return True
    say(f"{output}: its tables are of another encoder or dataset and are replaced")
    return False
