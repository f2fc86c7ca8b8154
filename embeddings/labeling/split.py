"""``label-relevance split``: parts of the human labels that share no query.

Legend: ``J`` judgements, ``P`` pairs, ``Q`` distinct queries.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.catalog import RELEVANCE, Catalog, read_catalog
from embeddings.labeling.agreement import rater_agreement
from embeddings.labeling.grades import LABELS
from embeddings.labeling.judgements import PARTS, SCHEMA, judgements
from embeddings.labeling.options import Split
from embeddings.relevance import (
    SOURCES,
    RelevanceRows,
    hash_fraction,
    held_out_queries,
    query_hashes,
    read_relevance_rows,
)
from features import columns
from features.console import print_table, say
from features.errors import BadInputError
from features.files import atomic_folder, fingerprint

SPLIT = "split.json"

_GOLDEN = (5**0.5 - 1) / 2


def run(options: Split, command: str) -> None:
    """Do the step and print what the parts hold."""
    content = split(options, command)
    rows = [
        [
            part.replace("_", "-"),
            *(f"{figures[name]:,}" for name in ("queries", "pairs", "judgements")),
            *(f"{100 * share:.1f} %" for share in figures["label_shares"]),
        ]
        for part, figures in content["parts"].items()
    ]
    header = ["part", "queries", "pairs", "judgements", *LABELS]
    print_table(f"Human labels of {content['data']}", header, rows)
    left_out = content["left_out"]
    say(
        f"left out: {left_out['held_out']:,} judgements of queries that train-dashclip holds out, "
        f"{left_out['without_title']:,} of products without a title, "
        f"{left_out['not_human']:,} labels that are not human"
    )
    agreed = content["agreement"]
    if agreed is None:
        say("agreement between people: unknown, no pair has two judgements")
    else:
        say(
            f"agreement between people: {agreed['agreement']:.3f}, Fleiss' kappa "
            f"{agreed['fleiss_kappa']:.3f}, quadratic kappa {agreed['quadratic_kappa']:.3f} "
            f"({agreed['pairs']:,} pairs with two judgements or more)"
        )


def split(options: Split, command: str = "") -> dict[str, Any]:
    """Write the parts of a dataset's human labels; returns the content of ``split.json``.

    The same call again finds them done.

    Args:
        options: dataset, output, shares and seed.
        command: the command line, for the record.

    Raises:
        BadInputError: the dataset breaks a rule, a share is out of range, there are too few
            queries, or the output folder holds something else.
    """
    _check_shares(options)
    catalog = read_catalog(options.data)
    if not (options.data / RELEVANCE).exists():
        raise BadInputError(f"{options.data / RELEVANCE}: no such file; it holds the human labels")
    identity = {
        "data": options.data.resolve().name,
        "data_fingerprint": fingerprint(catalog.path, options.data / RELEVANCE),
        "evaluation": options.evaluation,
        "validation": options.validation,
        "held_out_queries": options.held_out_queries,
        "seed": options.seed,
    }
    done = _find(options.output, identity)
    if done is not None:
        say(f"{options.output}: these parts are there already")
        return done
    rows = read_relevance_rows(options.data, catalog)
    table, left_out = _usable(rows, catalog, options.held_out_queries)
    if not len(table):
        raise BadInputError(f"{options.data / RELEVANCE}: no human label is left to split")
    parts = _parts(table, options)
    everything = judgements(options.data / RELEVANCE, table)
    agreed = rater_agreement(everything)
    content = {
        **identity,
        "command": command,
        "left_out": left_out,
        "parts": {part: _describe(part_table) for part, part_table in parts.items()},
        "agreement": None if agreed is None else asdict(agreed),
    }
    with atomic_folder(options.output) as folder:
        for part, part_table in parts.items():
            pq.write_table(part_table, folder / f"{part}.parquet")
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / SPLIT).write_text(text + "\n", encoding="utf-8")
    return content


def _check_shares(options: Split) -> None:
    for name in ("evaluation", "validation"):
        if not 0 < getattr(options, name) < 1:
            raise BadInputError(
                f"--{name} is a share of the queries between 0 and 1, got {getattr(options, name)}"
            )
    if options.evaluation + options.validation >= 1:
        raise BadInputError("--evaluation and --validation leave no query to fine-tune on")
    if not 0 <= options.held_out_queries < 1:
        raise BadInputError(
            f"--held-out-queries is a share from 0 to below 1, got {options.held_out_queries}"
        )


def _find(output: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a folder tells of a finished split, ``None`` where it is empty or not there.

    Raises:
        BadInputError: it holds another split or something else.
    """
    if (output / SPLIT).is_file():
        found = dict(json.loads((output / SPLIT).read_text(encoding="utf-8")))
        for name, value in identity.items():
            if found.get(name) != value:
                raise BadInputError(
                    f"{output}: holds a split with another '{name}' ({found.get(name)}, "
                    f"not {value}); choose another --output or remove it"
                )
        return found
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise BadInputError(f"{output}: exists and is no split; choose another --output")
    return None


def _usable(
    rows: RelevanceRows, catalog: Catalog, held_out: float
) -> tuple[pa.Table, dict[str, int]]:
    """Return the judgements to split, sorted, and how many rows were left out for what."""
    human = rows.source == SOURCES.index("human")
    titled = catalog.titles.is_valid().to_numpy(zero_copy_only=False)[rows.product]
    usable = human & titled
    if held_out:  # as train-dashclip does
        usable &= ~held_out_queries(rows.merged(), held_out=held_out, seed=0)[rows.query]
    product = rows.product[usable]
    table = pa.table(
        [
            pa.array(rows.queries, pa.string()).take(pa.array(rows.query[usable])),
            catalog.product_ids.take(pa.array(product)),
            catalog.titles.take(pa.array(product)),
            pa.array(rows.label[usable], pa.int8()),
        ],
        schema=SCHEMA,
    )
    left_out = {
        "not_human": int((~human).sum()),
        "without_title": int((human & ~titled).sum()),
        "held_out": int((human & titled & ~usable).sum()),
    }
    order = [(name, "ascending") for name in (columns.QUERY, columns.PRODUCT_ID, columns.LABEL)]
    return table.sort_by(order), left_out


def _parts(table: pa.Table, options: Split) -> dict[str, pa.Table]:
    """Return the table of each part; their labels are mixed alike.

    Raises:
        BadInputError: a part would have no query.
    """
    encoded = table.column(columns.QUERY).combine_chunks().dictionary_encode()
    query = encoded.indices.to_numpy()
    place = _places(encoded.dictionary.to_pylist(), query, table, options.seed)
    number = np.where(place < options.evaluation, PARTS.index("evaluation"), 0)
    validation = (place >= options.evaluation) & (place < options.evaluation + options.validation)
    number[validation] = PARTS.index("validation")
    for position, part in enumerate(PARTS):
        if not (number == position).any():
            raise BadInputError(
                f"{options.data / RELEVANCE}: the human labels are of {len(place)} queries, which "
                f"leaves none for the part '{part}'"
            )
    of_row = number[query]
    return {part: table.filter(pa.array(of_row == i)) for i, part in enumerate(PARTS)}


def _places(queries: list[str], query: np.ndarray, table: pa.Table, seed: int) -> np.ndarray:
    """Return a place from 0 to below 1 for each query ([Q]), spread evenly over alike queries.

    The queries in the order of their mean label, then of their number of judgements, then of a
    seeded hash, take the places of a golden-ratio sequence: any interval of places holds, of any
    run of neighbours, nearly its share.
    """
    count = np.bincount(query)
    mean = np.bincount(query, weights=table.column(columns.LABEL).to_numpy()) / count
    order = np.lexsort((hash_fraction(query_hashes(queries), seed), count, mean))
    place = np.empty(len(queries))
    start = np.random.default_rng(seed).random()
    place[order] = (start + _GOLDEN * np.arange(len(queries))) % 1
    return place


def _describe(table: pa.Table) -> dict[str, Any]:
    found = judgements(Path("part"), table)
    counts = np.bincount(found.label, minlength=len(LABELS))
    return {
        "queries": len(set(found.pairs.queries)),
        "pairs": len(found),
        "judgements": len(table),
        "labels": counts.tolist(),
        "label_shares": (counts / len(found)).round(6).tolist(),
    }
