"""The files of labels: one for each chunk of pairs, its rows in the form of relevance.parquet.

=====================  ===========================================================================
``query``              text
``product_id``         an id of the catalog
``label``              0, 1 or 2
``source``             ``llm``
``model``              the grader, as it names itself
``prompt_version``     empty where there is no prompt
``probability``        of the label; null where the grader does not tell
``probabilities``      of each label; null, or of null, where the grader does not tell
=====================  ===========================================================================

A part's metadata tells how many of the pairs chosen it stands for, and how many of them have no
label: these have no row.

Legend: ``P`` pairs of a part.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.catalog import open_parquet
from embeddings.labeling.grades import LABELS, UNGRADED, Grader, Grades
from embeddings.labeling.pair_files import Selection
from features import columns
from features.errors import BadInputError
from features.files import atomic_file

MODEL = "model"
PROMPT_VERSION = "prompt_version"
PROBABILITY = "probability"
PROBABILITIES = "probabilities"
SOURCE = "llm"

UNGRADED_PAIRS = "_ungraded.parquet"
"""Pairs without a label. Its name begins so that readers of the folder pass it over."""

SCHEMA = pa.schema(
    [
        (columns.QUERY, pa.string()),
        (columns.PRODUCT_ID, pa.int64()),
        (columns.LABEL, pa.int8()),
        (columns.SOURCE, pa.string()),
        (MODEL, pa.string()),
        (PROMPT_VERSION, pa.string()),
        (PROBABILITY, pa.float32()),
        (PROBABILITIES, pa.list_(pa.float32(), len(LABELS))),
    ]
)

_PAIRS, _UNGRADED = b"pairs", b"ungraded"
_BINS = 1000
_QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartState:
    """What a part stands for.

    Attributes:
        pairs: of its chunk, from the first on.
        ungraded: those of them without a label.
    """

    pairs: int
    ungraded: int


def part_path(output: Path, chunk: int) -> Path:
    """Return where the labels of a chunk lie."""
    return output / f"part-{chunk:05d}.parquet"


def part_paths(output: Path) -> list[Path]:
    """Return the parts of a folder, in their order.

    Raises:
        BadInputError: there is none.
    """
    paths = sorted(output.glob("part-*.parquet"))
    if not paths:
        raise BadInputError(f"{output}: holds no labels; `label-relevance label` writes them")
    return paths


def write_part(path: Path, pairs: pa.Table, grades: Grades, grader: Grader) -> None:
    """Write the labels of a chunk, whole or not at all.

    Args:
        path: of the part.
        pairs: [P] ``query``, ``product_id``.
        grades: of all ``P`` pairs, in their order; those that are `UNGRADED` get no row.
        grader: who graded.
    """
    graded = grades.label != UNGRADED
    pairs = pairs.filter(pa.array(graded))
    label, probability = grades.label[graded], grades.probability[graded]
    rows = len(label)
    own = probability[np.arange(rows), label]
    untold, flat = np.isnan(own), probability.reshape(-1)
    table = pa.table(
        [
            pairs.column(columns.QUERY),
            pairs.column(columns.PRODUCT_ID),
            pa.array(label),
            *(pa.repeat(text, rows) for text in (SOURCE, grader.model, grader.prompt_version)),
            pa.array(own, mask=untold),
            pa.FixedSizeListArray.from_arrays(
                pa.array(flat, mask=np.isnan(flat)), len(LABELS), mask=pa.array(untold)
            ),
        ],
        schema=SCHEMA.with_metadata(
            {_PAIRS: str(len(graded)), _UNGRADED: str(int((~graded).sum()))}
        ),
    )
    with atomic_file(path) as scratch:
        pq.write_table(table, scratch, compression="zstd")


def part_state(path: Path) -> PartState:
    """Return what a part stands for; nothing where there is none.

    Raises:
        BadInputError: it cannot be read.
    """
    if not path.is_file():
        return PartState(pairs=0, ungraded=0)
    with open_parquet(path, SCHEMA.names) as file:
        metadata = file.schema_arrow.metadata or {}
    try:
        return PartState(pairs=int(metadata[_PAIRS]), ungraded=int(metadata[_UNGRADED]))
    except (KeyError, ValueError) as error:
        raise BadInputError(f"{path}: was not written by `label-relevance label`") from error


def write_ungraded(output: Path, selection: Selection) -> int:
    """List the pairs of all parts that have no label; returns their number.

    The list is removed where there is none.
    """
    path = output / UNGRADED_PAIRS
    states = [(part, part_state(part)) for part in part_paths(output)]
    if not any(state.ungraded for _, state in states):
        path.unlink(missing_ok=True)
        return 0
    names = [columns.QUERY, columns.PRODUCT_ID]
    schema = pa.schema([SCHEMA.field(name) for name in names])
    with atomic_file(path) as scratch, pq.ParquetWriter(scratch, schema) as writer:
        for part, state in states:
            if state.ungraded:
                chosen = selection.read(int(part.stem.removeprefix("part-")), state.pairs)
                with open_parquet(part, names) as file:
                    graded = set(zip(*file.read(names).to_pydict().values(), strict=True))
                rows = [row for row in chosen.to_pylist() if tuple(row.values()) not in graded]
                writer.write_table(pa.Table.from_pylist(rows, schema))
    return sum(state.ungraded for _, state in states)


def read_parts(output: Path, names: list[str]) -> Iterator[pa.Table]:
    """Yield columns of the labels, a part at a time."""
    for path in part_paths(output):
        with open_parquet(path, names) as file:
            yield file.read(names)


def summary(output: Path) -> dict[str, Any]:
    """Return how the labels and their probabilities are distributed.

    Returns:
        ``labelled``: number; ``labels``: number by name; ``probability`` of the label given, where
        the grader tells it: ``known`` (number), ``mean``, quantiles ``p10``, ``p50``, ``p90`` to a
        thousandth, and the mean of each label by name.
    """
    count = np.zeros(len(LABELS), np.int64)
    total, known = np.zeros(len(LABELS)), np.zeros(len(LABELS), np.int64)
    histogram = np.zeros(_BINS, np.int64)
    for table in read_parts(output, [columns.LABEL, PROBABILITY]):
        label = table.column(columns.LABEL).to_numpy()
        probability = table.column(PROBABILITY).to_numpy()  # null is NaN
        told = ~np.isnan(probability)
        count += np.bincount(label, minlength=len(LABELS))
        known += np.bincount(label[told], minlength=len(LABELS))
        total += np.bincount(label[told], weights=probability[told], minlength=len(LABELS))
        bins = np.clip((probability[told] * _BINS).astype(np.int64), 0, _BINS - 1)
        histogram += np.bincount(bins, minlength=_BINS)
    return {
        "labelled": int(count.sum()),
        "labels": dict(zip(LABELS, count.tolist(), strict=True)),
        "probability": _probability(total, known, histogram) if known.any() else None,
    }


def _probability(total: np.ndarray, known: np.ndarray, histogram: np.ndarray) -> Mapping[str, Any]:
    below = np.cumsum(histogram) / histogram.sum()
    quantiles = {
        f"p{round(100 * q)}": (int(np.searchsorted(below, q)) + 0.5) / _BINS for q in _QUANTILES
    }
    by_label = {
        name: float(sum_ / n) if n else None
        for name, sum_, n in zip(LABELS, total, known, strict=True)
    }
    mean = float(total.sum() / known.sum())
    return {"known": int(known.sum()), "mean": mean, **quantiles, "mean_by_label": by_label}
