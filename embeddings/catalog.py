"""What the encoders read of a dataset folder: products and queries."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features import columns
from features.errors import BadInputError
from features.parquet import is_text, missing_column, open_streamed, parquet_files

CATALOG = "catalog.parquet"
IMPRESSIONS = "impressions.parquet"
RELEVANCE = "relevance.parquet"

_IMAGE_BATCH = 256
_QUERY_BATCH = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Catalog:
    """The products of a dataset, in the order of the file.

    Legend: ``N`` products. A product's *row* is its position here; its id is any integer.

    Attributes:
        path: of ``catalog.parquet``.
        product_ids: [N] int64, unique, a `pyarrow.Array`.
        titles: [N] strings without space at either end; null where a product has no title.
    """

    path: Path
    product_ids: pa.Array
    titles: pa.Array

    def __len__(self) -> int:
        return len(self.product_ids)

    def aisles(self) -> np.ndarray:
        """Return the aisle of each product, [N] int32 positions in `aisle_names`; -1 where none.

        The column is read on the first call.

        Raises:
            BadInputError: the column cannot be read or is not text.
        """
        return self._aisles[0]

    @property
    def aisle_names(self) -> list[str]:
        """The names of all aisles of the catalog, sorted; empty where it has no such column."""
        return self._aisles[1]

    @cached_property
    def _aisles(self) -> tuple[np.ndarray, list[str]]:
        with open_parquet(self.path) as file:
            if columns.AISLE not in file.schema_arrow.names:
                return np.full(len(self), -1, np.int32), []
            check_type(self.path, file, columns.AISLE, is_text, "text")
            names = _trimmed(file.read([columns.AISLE]).column(0)).dictionary_encode()
        found = names.dictionary
        order = pc.sort_indices(found).to_numpy()
        code = np.empty(len(found) + 1, np.int32)
        code[order] = np.arange(len(found))
        code[-1] = -1
        rows = names.indices.fill_null(len(found)).to_numpy()
        return code[rows], found.take(pa.array(order)).to_pylist()

    @cached_property
    def has_images(self) -> bool:
        """Whether the catalog has a column of images."""
        with open_parquet(self.path) as file:
            return columns.IMAGE in file.schema_arrow.names

    def any_image(self) -> bool:
        """Return whether any product has an image, readable or not."""
        if not self.has_images:
            return False
        with open_parquet(self.path) as file:
            batches = file.iter_batches(_IMAGE_BATCH, columns=[columns.IMAGE])
            return any(batch.column(0).null_count < batch.num_rows for batch in batches)

    def with_images(self) -> Iterator[tuple[list[int], list[str], list[bytes | None]]]:
        """Yield batches of the ids, titles and images of all products, in the catalog's order.

        A missing title is the empty string. Images are the bytes of the file (JPEG or PNG),
        ``None`` for products without one or where the catalog has no such column: a product may
        have neither. Only one batch is in memory.

        Raises:
            BadInputError: the column cannot be read or is not binary.
        """
        with open_parquet(self.path) as file:
            if self.has_images:
                check_type(self.path, file, columns.IMAGE, _is_binary, "binary")
            read = columns.IMAGE if self.has_images else columns.PRODUCT_ID
            start = 0
            for batch in file.iter_batches(_IMAGE_BATCH, columns=[read]):
                ids = self.product_ids.slice(start, batch.num_rows).to_pylist()
                titles = self.titles.slice(start, batch.num_rows).fill_null("").to_pylist()
                images = batch.column(0).to_pylist() if self.has_images else [None] * len(ids)
                start += batch.num_rows
                yield ids, titles, images


def read_catalog(folder: Path) -> Catalog:
    """Read ``folder/catalog.parquet``.

    Raises:
        BadInputError: the folder, file or a column is missing or of a wrong type, the catalog is
            empty, or a product id is null or stands twice.
    """
    if not folder.is_dir():
        raise BadInputError(f"{folder}: no such dataset folder")
    path = folder / CATALOG
    if not path.is_file():
        raise BadInputError(f"{path}: no such file; it holds the products to encode")
    names = [columns.PRODUCT_ID, columns.TITLE]
    with open_parquet(path, names) as file:
        check_type(path, file, columns.PRODUCT_ID, pa.types.is_integer, "an integer")
        check_type(path, file, columns.TITLE, is_text, "text")
        content = file.read(names)
        ids = content.column(columns.PRODUCT_ID).cast(pa.int64()).combine_chunks()
    _check_ids(path, ids)
    return Catalog(path=path, product_ids=ids, titles=_trimmed(content.column(columns.TITLE)))


def read_queries(folder: Path) -> list[str]:
    """Return the distinct queries of the impressions and relevance labels of ``folder``, sorted.

    Each is exactly the text that the data holds; nulls and blank texts are left out.

    Raises:
        BadInputError: there are neither impressions nor labels, a file is unreadable, its
            ``query`` is missing or not text, or no query is left.
    """
    sources = [folder / name for name in (IMPRESSIONS, RELEVANCE) if (folder / name).exists()]
    if not sources:
        raise BadInputError(f"{folder}: holds neither {IMPRESSIONS} nor {RELEVANCE}: no queries")
    found: set[str | None] = set()
    for path in (path for source in sources for path in parquet_files(source)):
        with open_parquet(path, [columns.QUERY]) as file:
            check_type(path, file, columns.QUERY, is_text, "text")
            for batch in file.iter_batches(_QUERY_BATCH, columns=[columns.QUERY]):
                found.update(pc.unique(batch.column(0)).to_pylist())
    queries = sorted(query for query in found if query and not query.isspace())
    if not queries:
        named = " and ".join(str(source) for source in sources)
        raise BadInputError(f"{named}: column '{columns.QUERY}' holds no text")
    return queries


@contextmanager
def open_parquet(path: Path, names: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file that has columns ``names``; what Arrow says of damage is bad input."""
    try:
        with open_streamed(path) as file:
            found = file.schema_arrow.names
            for name in names:
                if name not in found:
                    raise missing_column(path, name, found)
            yield file
    except (pa.ArrowException, OSError) as error:
        raise BadInputError(f"{path}: cannot be read: {error}") from error


def check_type(
    path: Path,
    file: pq.ParquetFile,
    name: str,
    accepts: Callable[[pa.DataType], bool],
    expected: str,
) -> None:
    """Raise `BadInputError` unless ``accepts`` takes the type of column ``name``."""
    found = file.schema_arrow.field(name).type
    if not accepts(found):
        raise BadInputError(f"{path}: column '{name}' is {found}, expected {expected}")


def _is_binary(found: pa.DataType) -> bool:
    types = pa.types
    return types.is_binary(found) or types.is_large_binary(found) or types.is_binary_view(found)


def _trimmed(texts: pa.ChunkedArray) -> pa.Array:
    """Return texts without space at either end; null where nothing is left."""
    texts = pc.utf8_trim_whitespace(texts.cast(pa.string()))
    blank = pc.equal(texts, "")
    return pc.if_else(blank, pa.scalar(None, pa.string()), texts).combine_chunks()


def _check_ids(path: Path, ids: pa.Array) -> None:
    if not len(ids):
        raise BadInputError(f"{path}: the table is empty")
    if ids.null_count:
        row = pc.index(pc.is_null(ids), True).as_py() + 1
        raise BadInputError(f"{path}: column '{columns.PRODUCT_ID}', row {row}: is null")
    counts = pc.value_counts(ids)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        first = twice[0].as_py()
        raise BadInputError(
            f"{path}: column '{columns.PRODUCT_ID}': product {first['values']} stands in "
            f"{first['counts']} rows, expected one"
        )
