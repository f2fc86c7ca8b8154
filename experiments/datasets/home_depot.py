"""Home Depot product search relevance: queries and products with the mean of human grades.

The folder ``--source`` holds ``train.csv`` as the competition publishes it (``id``,
``product_uid``, ``product_title``, ``search_term``, ``relevance``; Latin-1), or
``relevance.parquet`` with ``query``, ``product_id``, ``title`` and ``relevance``.

Grades are means of three or more people's 1 (irrelevant), 2 (partially relevant) and 3 (perfect
match). Products have neither image nor aisle.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from experiments.datasets.published import (
    Kind,
    find_form,
    grades,
    mean_labels,
    read_csv,
    read_parquet,
    tidy,
    whole_numbers,
)
from experiments.datasets.writing import products, write_catalog, write_relevance, write_schema
from features.schema import DatasetSchema

if TYPE_CHECKING:
    import pandas as pd

CUTS = (1.75, 2.5)  # mean grades from which a product is moderately and highly relevant

SCHEMA = DatasetSchema(
    name="home-depot",
    licence="Rules of the Kaggle competition; bring your own copy and do not pass it on.",
    provenance=(
        "Kaggle, Home Depot Product Search Relevance, train.csv: "
        "kaggle.com/c/home-depot-product-search-relevance."
    ),
    caveat=(
        "Human grades of the Home Depot search relevance competition, cut at 1.75 and 2.5; text "
        "only, about 6 graded products a query, so that most relevant products are unjudged."
    ),
)

_HOW = (
    "download train.csv of the Kaggle competition home-depot-product-search-relevance, unpack it "
    "into a folder and name that folder with --source"
)


def build(output: Path, *, source: Path | None) -> None:
    """Write the dataset's files into the empty folder ``output``.

    Args:
        output: an existing, empty folder.
        source: a folder with ``train.csv`` or ``relevance.parquet``.

    Raises:
        BadInputError: no folder was named, a file or column is missing, or a value is wrong.
    """
    pairs = read_grades(source)
    catalog = _one_title_each(pairs)
    write_catalog(output, [products(catalog.index.to_numpy(), catalog.tolist())])
    write_relevance(output, mean_labels(pairs, CUTS), source="human")
    write_schema(output, SCHEMA)


def read_grades(source: Path | None) -> "pd.DataFrame":
    """Return ``query``, ``product_id``, ``title`` and ``grade`` of all rows that have a query.

    Raises:
        BadInputError: as `build` does.
    """
    path = find_form(source, [["train.csv"], ["relevance.parquet"]], _HOW)
    if path.suffix == ".csv":
        names = ["search_term", "product_uid", "product_title", "relevance"]
        frame = read_csv(path, names, encoding="latin-1")
    else:
        names = ["query", "product_id", "title", "relevance"]
        kinds: tuple[Kind, ...] = ("text", "integer", "text", "number")
        frame = read_parquet(path, dict(zip(names, kinds, strict=True)))
    query, product, title, grade = (frame[name] for name in names)
    pairs = frame.assign(
        query=tidy(query),
        product_id=whole_numbers(path, product),
        title=tidy(title),
        grade=grades(path, grade, low=1, high=3),
    )
    return pairs[pairs["query"] != ""]


def _one_title_each(pairs: "pd.DataFrame") -> "pd.Series":
    """Return the titles by product id; of several the one in most rows, then the first by text."""
    counts = pairs.groupby(["product_id", "title"], as_index=False).size()
    counts = counts.sort_values(["product_id", "size", "title"], ascending=[True, False, True])
    return counts.drop_duplicates("product_id").set_index("product_id")["title"]
