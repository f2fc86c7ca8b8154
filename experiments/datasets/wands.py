"""WANDS, the Wayfair annotation dataset: queries and home goods with human labels.

The folder ``--source`` holds the tab-separated ``query.csv``, ``product.csv`` and ``label.csv`` of
the published repository. The aisle is the ``product_class``, the first where several are joined by
``|``. Products have no image.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from experiments.datasets.published import (
    NEAREST,
    check_unique,
    find_form,
    mean_labels,
    named_grades,
    read_csv,
    tidy,
    whole_numbers,
)
from experiments.datasets.writing import products, write_catalog, write_relevance, write_schema
from features.errors import BadInputError
from features.schema import DatasetSchema

if TYPE_CHECKING:
    import pandas as pd

GRADES = {"Irrelevant": 0, "Partial": 1, "Exact": 2}

SCHEMA = DatasetSchema(
    name="wands",
    licence="MIT, Wayfair.",
    provenance=(
        "Chen et al.: WANDS: Dataset for Product Search Relevance Assessment (ECIR 2022); "
        "github.com/wayfair/WANDS."
    ),
    caveat="Human labels of home goods for a few hundred queries; text only.",
)

_HOW = (
    "download github.com/wayfair/WANDS and name its folder 'dataset', which holds label.csv, "
    "query.csv and product.csv, with --source"
)


def build(output: Path, *, source: Path | None) -> None:
    """Write the dataset's files into the empty folder ``output``.

    Args:
        output: an existing, empty folder.
        source: a folder with ``query.csv``, ``product.csv`` and ``label.csv``.

    Raises:
        BadInputError: no folder was named, a file or column is missing, or a value is wrong.
    """
    labels = find_form(source, [["label.csv", "query.csv", "product.csv"]], _HOW)
    path = labels.with_name("product.csv")
    catalog = _read(path, ["product_id", "product_name", "product_class"], key="product_id")
    aisles = catalog["product_class"].str.split("|").str[0]
    rows = products(
        catalog["product_id"].to_numpy(),
        tidy(catalog["product_name"]).tolist(),
        aisles=tidy(aisles).tolist(),
    )
    pairs = _pairs(labels)
    unknown = ~pairs["product_id"].isin(catalog["product_id"])
    if unknown.any():
        raise BadInputError(
            f"{labels}: column 'product_id' names {pairs['product_id'][unknown].iloc[0]}, which "
            f"{path} does not hold"
        )
    write_catalog(output, [rows])
    write_relevance(output, mean_labels(pairs, NEAREST), source="human")
    write_schema(output, SCHEMA)


def _pairs(path: Path) -> "pd.DataFrame":
    """Return ``query``, ``product_id`` and ``grade`` of all labels."""
    queries = _read(path.with_name("query.csv"), ["query_id", "query"], key="query_id")
    labels = _read(path, ["query_id", "product_id", "label"])
    labels["query_id"] = whole_numbers(path, labels["query_id"])
    text = labels["query_id"].map(tidy(queries.set_index("query_id")["query"]))
    if text.isna().any():
        raise BadInputError(
            f"{path}: column 'query_id' names {labels['query_id'][text.isna()].iloc[0]}, which "
            f"{path.with_name('query.csv')} does not hold"
        )
    pairs = labels.assign(
        query=text,
        product_id=whole_numbers(path, labels["product_id"]),
        grade=named_grades(path, labels["label"], GRADES),
    )
    return pairs[pairs["query"] != ""]


def _read(path: Path, names: list[str], *, key: str | None = None) -> "pd.DataFrame":
    frame = read_csv(path, names, separator="\t")
    if key is not None:
        frame[key] = whole_numbers(path, frame[key])
        check_unique(path, key, frame[key])
    return frame
