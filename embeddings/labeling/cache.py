"""Answers of graders by what was asked, so that nothing is graded, or paid, twice.

Legend: ``P`` pairs.
"""

import errno
import hashlib
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from embeddings.labeling.grades import LABELS, UNGRADED, Grades, Pairs
from features.errors import BadInputError

KEY_BYTES = 16

# WITHOUT ROWID: a look-up then goes down one tree, not two.
_TABLE = "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer BLOB) WITHOUT ROWID"
_ANSWER = np.dtype([("label", "i1"), ("probability", "<f4", (len(LABELS),))])
_NONE = np.array((UNGRADED, (np.nan,) * len(LABELS)), _ANSWER).tobytes()
_KEYS_A_LOOKUP = 1 << 14


def answer_keys(fingerprint: str, pairs: Pairs) -> list[bytes]:
    """Return the 16-byte BLAKE2b hash of what each pair asks a grader: one key, one answer.

    Args:
        fingerprint: of the grader.
        pairs: ``P`` pairs.
    """
    digest = hashlib.blake2b
    grader = digest(fingerprint.encode(), digest_size=KEY_BYTES).digest()
    return [
        # The length tells where the query ends.
        digest(
            b"%b%d:%b%b" % (grader, len(query), query.encode(), title.encode()),
            digest_size=KEY_BYTES,
        ).digest()
        for query, title in zip(pairs.queries, pairs.titles, strict=True)
    ]


class AnswerCache:
    """The answers of any number of graders in an SQLite file, which several runs may share.

    Args:
        path: of the file, which appears with the first use.
        commit_seconds: how long answers may wait to be kept for good. A killed process loses what
            waits: 0 where an answer costs money; where it costs time alone, that much of it.

    Raises:
        BadInputError: the file is of another kind.
    """

    def __init__(self, path: Path, *, commit_seconds: float = 0.0) -> None:
        self.path = path
        self._commit_seconds = commit_seconds
        self._committed = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._blamed():
            self._file = sqlite3.connect(path, timeout=60, isolation_level=None)
            # What is committed outlives the process; readers do not wait for a writer.
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = NORMAL")
            self._file.execute(_TABLE)

    def __enter__(self) -> "AnswerCache":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.commit()
        finally:
            self._file.close()

    def is_empty(self) -> bool:
        """Return whether there is no answer."""
        with self._blamed():
            return self._file.execute("SELECT 1 FROM answers LIMIT 1").fetchone() is None

    def look_up(self, keys: Sequence[bytes]) -> Grades:
        """Return what is known of ``P`` keys, in their order; `UNGRADED` where nothing is."""
        # In the order of the tree, neighbours lie on one page.
        ordered = sorted(set(keys))
        found: dict[bytes, bytes] = {}
        with self._blamed():
            for first in range(0, len(ordered), _KEYS_A_LOOKUP):
                some = ordered[first : first + _KEYS_A_LOOKUP]
                places = ",".join("?" * len(some))
                rows = self._file.execute(f"SELECT * FROM answers WHERE key IN ({places})", some)
                found.update(rows.fetchall())
        answers = np.frombuffer(b"".join([found.get(key, _NONE) for key in keys]), _ANSWER)
        return Grades(
            position=np.arange(len(keys)),
            label=answers["label"],
            probability=answers["probability"],
        )

    def add(self, keys: Sequence[bytes], label: np.ndarray, probability: np.ndarray) -> None:
        """Keep answers; one that was there already, of another run, gives way.

        Args:
            keys: ``P`` of them.
            label: [P] int8, 0, 1 or 2.
            probability: [P, 3] float32, NaN where the grader does not tell.
        """
        assert (label != UNGRADED).all()
        answers = np.empty(len(keys), _ANSWER)
        answers["label"], answers["probability"] = label, probability
        content, width = answers.tobytes(), _ANSWER.itemsize
        values = (content[at : at + width] for at in range(0, len(content), width))
        with self._blamed():
            if not self._file.in_transaction:
                self._file.execute("BEGIN IMMEDIATE")
            self._file.executemany(
                "INSERT OR REPLACE INTO answers VALUES (?, ?)",
                sorted(zip(keys, values, strict=True)),
            )
        if time.monotonic() - self._committed >= self._commit_seconds:
            self.commit()

    def commit(self) -> None:
        """Keep for good what was added."""
        if self._file.in_transaction:
            with self._blamed():
                self._file.execute("COMMIT")
        self._committed = time.monotonic()

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise OSError(errno.ENOSPC, "No space left on device", str(self.path)) from error
            raise BadInputError(
                f"{self.path}: cannot be used as a cache of answers: {error}"
            ) from error
