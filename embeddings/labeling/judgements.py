"""Human judgements of pairs, one row each: a pair that several people graded has several rows.

::

    SPLIT/
      fine_tuning.parquet  validation.parquet  evaluation.parquet     no query is in two of them
      split.json

Each file holds ``query``, ``product_id``, ``title`` and ``label``, by query, then product.

Legend: ``J`` judgements, ``P`` pairs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa

from embeddings.catalog import open_parquet
from embeddings.labeling.grades import LABELS, Pairs
from features import columns
from features.errors import BadInputError

Part = Literal["fine_tuning", "validation", "evaluation"]
PARTS: tuple[Part, ...] = get_args(Part)
SCHEMA = pa.schema(
    [
        (columns.QUERY, pa.string()),
        (columns.PRODUCT_ID, pa.int64()),
        (columns.TITLE, pa.string()),
        (columns.LABEL, pa.int8()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judgements:
    """Human judgements, and the pairs that they are of.

    Attributes:
        pairs: [P] each once.
        product_id: [P] int64.
        label: [P] int8, the mean of a pair's judgements, rounded half up.
        pair: [J] int64, which pair a judgement is of, ascending.
        given: [J] int8, the label of each judgement.
    """

    pairs: Pairs
    product_id: np.ndarray
    label: np.ndarray
    pair: np.ndarray
    given: np.ndarray

    def __len__(self) -> int:
        return len(self.pairs)


def read_judgements(split: Path, part: Part) -> Judgements:
    """Read one part of a folder that ``label-relevance split`` wrote.

    Raises:
        BadInputError: the file or a column is missing, there is no row, or a label is not one.
    """
    path = split / f"{part}.parquet"
    if not path.is_file():
        raise BadInputError(f"{path}: no such file; `label-relevance split` writes it")
    with open_parquet(path, SCHEMA.names) as file:
        table = file.read(SCHEMA.names).cast(SCHEMA)
    return judgements(path, table)


def judgements(path: Path, table: pa.Table) -> Judgements:
    """Return the judgements in a table of `SCHEMA`.

    Raises:
        BadInputError: there is no row, or a label is not one.
    """
    if not len(table):
        raise BadInputError(f"{path}: the table is empty")
    table = table.sort_by([(columns.QUERY, "ascending"), (columns.PRODUCT_ID, "ascending")])
    given = table.column(columns.LABEL).to_numpy()
    wrong = np.flatnonzero((given < 0) | (given >= len(LABELS)))
    if len(wrong):
        raise BadInputError(f"{path}: column 'label': {given[wrong[0]]} is none of 0, 1 and 2")
    queries, titles = (table.column(n).to_pylist() for n in (columns.QUERY, columns.TITLE))
    product = table.column(columns.PRODUCT_ID).to_numpy()
    new = np.ones(len(table), bool)
    new[1:] = product[1:] != product[:-1]
    new[1:] |= np.fromiter((a != b for a, b in zip(queries[1:], queries, strict=False)), bool)
    pair = np.cumsum(new) - 1
    first = np.flatnonzero(new)
    count = np.bincount(pair)
    total = np.bincount(pair, weights=given).astype(np.int64)
    return Judgements(
        pairs=Pairs(queries=queries, titles=titles).take(first),
        product_id=product[first],
        label=((2 * total + count) // (2 * count)).astype(np.int8),
        pair=pair,
        given=given,
    )
