"""Grades on disk, so that nobody is asked twice what a stopped run has heard already."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.catalog import open_parquet
from embeddings.labeling.grades import LABELS, UNGRADED, Grader, Grades, Pairs
from features import columns
from features.errors import BadInputError
from features.files import atomic_file

_SAVE_SECONDS = 10.0
_SECONDS = b"seconds"
_SCHEMA = pa.schema(
    [
        ("position", pa.int64()),
        (columns.QUERY, pa.string()),
        (columns.TITLE, pa.string()),
        (columns.LABEL, pa.int8()),
        ("probability", pa.list_(pa.float32(), len(LABELS))),
    ]
)


class StoredGrades:
    """The grades of some pairs by one grader, in a folder of their own.

    Args:
        folder: where folders of grades lie.
        name: how this one's name begins; a hash of grader and pairs follows.
        grader: who grades.
        pairs: [P] what is graded.

    Attributes:
        grades: [P] what is known; `UNGRADED` and NaN elsewhere.
        seconds: that it took to grade them.
    """

    def __init__(self, folder: Path, name: str, grader: Grader, pairs: Pairs) -> None:
        digest = hashlib.sha256(grader.fingerprint.encode())
        for text in (*pairs.queries, *pairs.titles):
            digest.update(b"\0" + text.encode())
        self.folder = folder / f"{name}-{digest.hexdigest()[:12]}"
        self.seconds = 0.0
        self._grader = grader
        self._pairs = pairs
        self._known = np.zeros(len(pairs), bool)
        self.grades = Grades(
            position=np.arange(len(pairs)),
            label=np.full(len(pairs), UNGRADED, np.int8),
            probability=np.full((len(pairs), len(LABELS)), np.nan, np.float32),
        )
        for path in sorted(self.folder.glob("*.parquet")):
            self._load(path)

    def __len__(self) -> int:
        """Return how many of the pairs were asked for; some may have no grade for all that."""
        return int(self._known.sum())

    def complete(self, on_graded: Callable[[int], None] | None = None) -> None:
        """Have the grader grade what is missing; what it says is saved every few seconds.

        Args:
            on_graded: called with the number of pairs that were graded since its last call.

        Raises:
            BadInputError: the grader cannot go on; what it has said until then is saved.
        """
        missing = np.flatnonzero(~self._known)
        for first in range(0, len(missing), self._grader.chunk_pairs):
            self._grade(missing[first : first + self._grader.chunk_pairs], on_graded)

    def _grade(self, positions: np.ndarray, on_graded: Callable[[int], None] | None) -> None:
        unsaved: list[np.ndarray] = []
        since = time.perf_counter()
        try:
            for grades in self._grader.grade(self._pairs.take(positions)):
                rows = positions[grades.position]
                self._take(rows, grades.label, grades.probability)
                unsaved.append(rows)
                if on_graded:
                    on_graded(len(rows))
                if time.perf_counter() - since > _SAVE_SECONDS:
                    self._save(unsaved, time.perf_counter() - since)
                    unsaved, since = [], time.perf_counter()
        finally:
            self._save(unsaved, time.perf_counter() - since)

    def _take(self, rows: np.ndarray, label: np.ndarray, probability: np.ndarray) -> None:
        self.grades.label[rows] = label
        self.grades.probability[rows] = probability
        self._known[rows] = True

    def _save(self, unsaved: list[np.ndarray], seconds: float) -> None:
        self.seconds += seconds
        if not unsaved:
            return
        rows = np.sort(np.concatenate(unsaved))
        pairs = self._pairs.take(rows)
        probability = pa.FixedSizeListArray.from_arrays(
            self.grades.probability[rows].ravel(), len(LABELS)
        )
        table = pa.table(
            [rows, pairs.queries, pairs.titles, self.grades.label[rows], probability],
            schema=_SCHEMA.with_metadata({_SECONDS: str(seconds)}),
        )
        # No pair is graded twice, so that the first one's position names the file.
        with atomic_file(self.folder / f"{rows[0]:08d}.parquet") as scratch:
            pq.write_table(table, scratch)

    def _load(self, path: Path) -> None:
        with open_parquet(path, _SCHEMA.names) as file:
            table = file.read().cast(_SCHEMA)
            metadata = file.schema_arrow.metadata or {}
        rows, label = (table.column(name).to_numpy() for name in ("position", columns.LABEL))
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self._pairs):
            raise BadInputError(f"{path}: column 'position': is not one of the {len(self._pairs)}")
        flat = table.column("probability").combine_chunks().flatten()
        self._take(rows, label, flat.to_numpy(zero_copy_only=False).reshape(-1, len(LABELS)))
        self.seconds += float(metadata.get(_SECONDS, b"0"))
