"""Notes of the batches that were handed in to an endpoint, durable over runs and kills."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embeddings.labeling.ledger import open_notes

_TABLES = (
    "CREATE TABLE IF NOT EXISTS batches (name TEXT PRIMARY KEY, id TEXT, requests INTEGER, "
    "cost REAL, settled INTEGER)",
    "CREATE TABLE IF NOT EXISTS batch_questions (question TEXT PRIMARY KEY, batch TEXT)",
)
_LOOKUP = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class NotedBatch:
    """A batch that was noted.

    Attributes:
        name: its mark at the endpoint.
        id: at the endpoint; ``None`` where the run ended before it was known.
        requests: that it holds.
        cost: reserved for it.
        settled: whether its true cost is noted.
    """

    name: str
    id: str | None
    requests: int
    cost: float
    settled: bool


class BatchNotes:
    """Which questions are in which batch; in a ``with`` block.

    Args:
        path: the ledger's file; in memory only if not given.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = open_notes(path, *_TABLES)

    def __enter__(self) -> "BatchNotes":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def known(self, questions: Sequence[str]) -> dict[str, str]:
        """Return the name of the batch of each question that is in one."""
        found: dict[str, str] = {}
        for first in range(0, len(questions), _LOOKUP):
            some = questions[first : first + _LOOKUP]
            marks = ",".join("?" * len(some))
            found.update(
                self._file.execute(
                    f"SELECT question, batch FROM batch_questions WHERE question IN ({marks})",
                    list(some),
                )
            )
        return found

    def batches_of(self, questions: Sequence[str]) -> list[NotedBatch]:
        """Return the batches that hold some questions, the oldest first."""
        names = set(self.known(questions).values())
        rows = self._file.execute("SELECT * FROM batches ORDER BY rowid")
        return [
            NotedBatch(name=name, id=identity, requests=requests, cost=cost, settled=bool(settled))
            for name, identity, requests, cost, settled in rows.fetchall()
            if name in names
        ]

    def add(self, name: str, reserved: float, questions: Sequence[str]) -> None:
        """Note a batch that is about to be handed in."""
        with self._file:
            self._file.execute("BEGIN IMMEDIATE")
            self._file.execute(
                "INSERT INTO batches VALUES (?, NULL, ?, ?, 0)", (name, len(questions), reserved)
            )
            self._file.executemany(
                "INSERT INTO batch_questions VALUES (?, ?)", [(q, name) for q in questions]
            )

    def set_id(self, name: str, identity: str) -> None:
        """Note what the endpoint calls a batch."""
        self._file.execute("UPDATE batches SET id = ? WHERE name = ?", (identity, name))

    def settle(self, name: str) -> None:
        """Note that a batch's true cost is noted in the ledger."""
        self._file.execute("UPDATE batches SET settled = 1 WHERE name = ?", (name,))

    def forget(self, name: str) -> None:
        """Take back a note of a batch that the endpoint does not do."""
        with self._file:
            self._file.execute("BEGIN IMMEDIATE")
            self._file.execute("DELETE FROM batches WHERE name = ?", (name,))
            self._file.execute("DELETE FROM batch_questions WHERE batch = ?", (name,))
