"""What an endpoint may spend, and what it has spent, over all runs that share one file."""

import sqlite3
import threading
from pathlib import Path

from features.errors import BadInputError

_TABLE = """
CREATE TABLE IF NOT EXISTS spent (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    requests INTEGER NOT NULL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL,
    cost REAL NOT NULL, unreadable INTEGER NOT NULL
)"""
_Spent = tuple[int, int, int, float, int]
_ROUNDING = 1e-9  # of a sum of many costs, in parts of the limit


class BudgetReachedError(BadInputError):
    """The user's limit of requests or money does not allow a further request."""


class Ledger:
    """Counts requests, tokens and money; a request that the limits do not allow is not sent.

    `reserve` notes a request, at its highest cost, before it is sent, and `settle` what it did
    cost; a process that is killed in between has counted too much, never too little. Every note is
    in the file when its call returns, so it outlives the process; several threads and processes may
    share a file.

    Args:
        path: an SQLite file, made where there is none; in memory only if not given.
        max_requests: the most to send, those of earlier runs included.
        max_cost: the most to spend, in the currency of the grader's prices.

    Raises:
        BadInputError: a limit is negative, or the file is not one that this class wrote.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        max_requests: int | None = None,
        max_cost: float | None = None,
    ) -> None:
        for option, limit in (("--max-requests", max_requests), ("--max-cost", max_cost)):
            if limit is not None and not limit >= 0:
                raise BadInputError(f"{option} must be 0 or more, got {limit}")
        self.path = path
        self._max_requests = max_requests
        self._max_cost = max_cost
        self._lock = threading.Lock()
        self._file = open_notes(path, _TABLE)
        self._file.execute("INSERT OR IGNORE INTO spent VALUES (1, 0, 0, 0, 0.0, 0)")

    @property
    def requests(self) -> int:
        """Requests that were sent, those without an answer included."""
        return int(self._read()[0])

    @property
    def input_tokens(self) -> int:
        """Tokens that the endpoint says it read."""
        return int(self._read()[1])

    @property
    def output_tokens(self) -> int:
        """Tokens that the endpoint says it wrote."""
        return int(self._read()[2])

    @property
    def cost(self) -> float:
        """Money; a request whose answer did not arrive counts at its highest cost."""
        return max(float(self._read()[3]), 0.0)

    @property
    def unreadable(self) -> int:
        """Answers that did not state exactly one label."""
        return int(self._read()[4])

    def affordable(self, requests: int, cost: float) -> int:
        """Return how many of ``requests`` requests, each of at most ``cost``, the limits allow."""
        return self._affordable(requests, cost, self._read())

    def reserve(self, cost: float, *, requests: int = 1) -> None:
        """Note requests that are about to be sent.

        Args:
            cost: the most that all of them together can cost.
            requests: how many.

        Raises:
            BudgetReachedError: a limit does not allow them all; nothing is noted.
        """
        with self._lock, self._file:
            self._file.execute("BEGIN IMMEDIATE")
            spent = self._file.execute("SELECT * FROM spent").fetchone()[1:]
            if self._affordable(requests, cost / max(requests, 1), spent) < requests:
                raise BudgetReachedError(self._reached(requests, spent))
            self._file.execute(
                "UPDATE spent SET requests = requests + ?, cost = cost + ?", (requests, cost)
            )

    def settle(
        self,
        reserved: float,
        cost: float,
        *,
        input_tokens: int = 0,
        output_tokens: int = 0,
        unreadable: int = 0,
        unsent: int = 0,
    ) -> None:
        """Note what came of requests: the ``cost`` in the place of what was ``reserved``.

        Args:
            reserved: what was reserved for them.
            cost: what they did cost.
            input_tokens: that the endpoint read.
            output_tokens: that it wrote.
            unreadable: answers that do not state exactly one label.
            unsent: requests that were reserved and, in the end, not asked.
        """
        with self._lock, self._file:
            self._file.execute(
                "UPDATE spent SET cost = cost + ?, input_tokens = input_tokens + ?, "
                "output_tokens = output_tokens + ?, unreadable = unreadable + ?, "
                "requests = requests - ?",
                (cost - reserved, input_tokens, output_tokens, unreadable, unsent),
            )

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()

    def _read(self) -> _Spent:
        with self._lock:
            row = self._file.execute("SELECT * FROM spent").fetchone()
        return row[1:]

    def _affordable(self, wanted: int, cost: float, noted: _Spent) -> int:
        requests, _, _, spent, _ = noted
        allowed = wanted
        if self._max_requests is not None:
            allowed = min(allowed, self._max_requests - requests)
        if self._max_cost is not None and cost > 0:
            left = self._max_cost * (1 + _ROUNDING) - spent
            # Not the quotient: 1e308 / 1e-300 overflows.
            allowed = allowed if left >= allowed * cost else int(left / cost)
        return max(allowed, 0)

    def _reached(self, wanted: int, noted: _Spent) -> str:
        requests, _, _, spent, _ = noted
        if self._max_requests is not None and requests + wanted > self._max_requests:
            return (
                f"of the budget of {self._max_requests:,} requests, {requests:,} are sent; "
                "a higher --max-requests lets it go on"
            )
        return (
            f"of the budget of {self._max_cost:g}, {max(spent, 0.0):.4g} is spent and a further "
            "request could exceed it; a higher --max-cost lets it go on"
        )


def open_notes(path: Path | None, *tables: str) -> sqlite3.Connection:
    """Open an SQLite file, in memory if no path is given, and make its tables.

    A transaction is in the file when it ends, and outlives the process; the newest may be lost when
    the machine loses power.

    Raises:
        BadInputError: the file is another kind of file.
    """
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
    file = sqlite3.connect(
        path or ":memory:", timeout=60, isolation_level=None, check_same_thread=False
    )
    try:
        file.execute("PRAGMA journal_mode = WAL")
        file.execute("PRAGMA synchronous = NORMAL")
        for table in tables:
            file.execute(table)
    except sqlite3.DatabaseError as error:
        file.close()
        raise BadInputError(f"{path}: cannot be read as notes of requests: {error}") from error
    return file
