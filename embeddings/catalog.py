"""What the encoders read of a dataset folder: products and queries."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features import columns
from features.errors import BadInputError
from features.parquet import is_text, missing_column, parquet_files

CATALOG = "catalog.parquet"
IMPRESSIONS = "impressions.parquet"
RELEVANCE = "relevance.parquet"

_IMAGE_BATCH = 256
_QUERY_BATCH = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Catalog:
    """The products of a dataset, in the order of the file.

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

    def with_images(self) -> Iterator[tuple[list[str], list[bytes | None]]]:
        """Yield batches of the titles and images of all products that have a title.

        Images are the bytes of the file (JPEG or PNG), ``None`` for products without one or where
        the catalog has no such column. Only one batch is in memory.
        """
        with pq.ParquetFile(self.path) as file:
            has_images = columns.IMAGE in file.schema_arrow.names
            read = columns.IMAGE if has_images else columns.PRODUCT_ID
            start = 0
            for batch in file.iter_batches(_IMAGE_BATCH, columns=[read]):
                titles = self.titles.slice(start, batch.num_rows).to_pylist()
                start += batch.num_rows
                images = batch.column(0).to_pylist() if has_images else [None] * len(titles)
                kept = [row for row, title in enumerate(titles) if title is not None]
                yield [titles[row] for row in kept], [images[row] for row in kept]


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
    with _open(path, names) as file:
        _check_type(path, file, columns.PRODUCT_ID, pa.types.is_integer, "an integer")
        _check_type(path, file, columns.TITLE, is_text, "text")
        content = file.read(names)
        ids = content.column(columns.PRODUCT_ID).cast(pa.int64()).combine_chunks()
    _check_ids(path, ids)
    titles = pc.utf8_trim_whitespace(content.column(columns.TITLE).cast(pa.string()))
    titles = pc.if_else(pc.equal(titles, ""), pa.scalar(None, pa.string()), titles)
    return Catalog(path=path, product_ids=ids, titles=titles.combine_chunks())


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
        with _open(path, [columns.QUERY]) as file:
            _check_type(path, file, columns.QUERY, is_text, "text")
            for batch in file.iter_batches(_QUERY_BATCH, columns=[columns.QUERY]):
                found.update(pc.unique(batch.column(0)).to_pylist())
    queries = sorted(query for query in found if query and not query.isspace())
    if not queries:
        named = " and ".join(str(source) for source in sources)
        raise BadInputError(f"{named}: column '{columns.QUERY}' holds no text")
    return queries


@contextmanager
def _open(path: Path, names: list[str]) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file that has columns ``names``; what Arrow says of damage is bad input."""
    try:
        with pq.ParquetFile(path) as file:
            found = file.schema_arrow.names
            for name in names:
                if name not in found:
                    raise missing_column(path, name, found)
            yield file
    except (pa.ArrowException, OSError) as error:
        raise BadInputError(f"{path}: cannot be read: {error}") from error


def _check_type(
    path: Path,
    file: pq.ParquetFile,
    name: str,
    accepts: Callable[[pa.DataType], bool],
    expected: str,
) -> None:
    found = file.schema_arrow.field(name).type
    if not accepts(found):
        raise BadInputError(f"{path}: column '{name}' is {found}, expected {expected}")


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
