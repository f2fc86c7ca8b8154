"""Purchase histories by user id, point in time: the same as in the request records.

A history is what `features.history` defines: the purchases of a user in the ``window_days`` days
of 24 hours before a moment, most recent first, ties by ascending product id, at most ``cap``. So a
ranker is served what it was trained on, whichever store is behind it::

    parquet:data/purchases.parquet         a file or folder, loaded into this process
    redis://localhost:6379/0               a Redis server; `serving.redis_store` fills it

Times without a time zone, in the purchases as in a question, count as UTC. A store of past
purchases is asked as of a fixed moment with ``?now=``, such as
``parquet:data/purchases.parquet?now=2017-10-30T12:00:00``.
"""

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from features.errors import BadInputError
from serving.purchases import SortedPurchases, open_sorted

DAY_US = 24 * 60 * 60 * 1_000_000
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MICROSECOND = dt.timedelta(microseconds=1)
_OLDEST = 2**15 - 1  # what int16 holds, as in the records
_REDIS = ("redis", "rediss", "unix")
_NOW = "now="

Clock = Callable[[], dt.datetime]


class StoreUnavailableError(RuntimeError):
    """The store cannot answer now: it is away, too slow, or holds something else.

    The message is one sentence; a service answers 503 with it.
    """


class History(NamedTuple):
    """What a user bought before a moment.

    Attributes:
        product_ids: [H] int64, most recent first.
        age_days: [H] int16, whole days of 24 hours between purchase and moment.
    """

    product_ids: npt.NDArray[np.int64]
    age_days: npt.NDArray[np.int16]


class FeatureStore(Protocol):
    """Where a service finds purchase histories; may be asked from several threads."""

    def history(self, user_id: int, at: dt.datetime | None = None) -> History:
        """Return a user's history at a moment, or now; empty for a user who is not known.

        Raises:
            StoreUnavailableError: the store cannot answer.
        """

    def describe(self) -> dict[str, Any]:
        """Return what the store is and holds, for logs; as JSON."""

    def close(self) -> None:
        """Let go of memory and connections."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Which purchases a history shows.

    Attributes:
        days: how many days of 24 hours it reaches back.
        cap: the most purchases that it shows.
        clock: tells now.
    """

    days: int
    cap: int
    clock: Clock

    def cut(
        self,
        product_ids: npt.NDArray[np.int64],
        times: npt.NDArray[np.int64],
        at: dt.datetime | None,
    ) -> History:
        """Return the history at a moment, of all N purchases of one user.

        Args:
            product_ids: [N], most recent first, ties by ascending product id.
            times: [N] int64 microseconds since 1970, of the same purchases.
            at: the moment; now where not given.
        """
        moment = microseconds(self.clock() if at is None else at)
        oldest_first = times[::-1]
        start = len(times) - int(np.searchsorted(oldest_first, moment))
        end = len(times) - int(np.searchsorted(oldest_first, moment - self.days * DAY_US))
        inside = slice(start, min(end, start + self.cap))
        age = np.minimum((moment - times[inside]) // DAY_US, _OLDEST)
        return History(product_ids[inside].copy(), age.astype(np.int16))


class ParquetStore:
    """Histories out of arrays in this process: 16 bytes a purchase, 16 a user.

    The purchases lie sorted by user and time, a user's behind each other (CSR)::

        users        [3,               7,  …]
        offsets      [0,               3,  …]
        product_ids  [81, 12, 81,      5,  …]
        times        [t3, t2, t1,      t9, …]

    Args:
        source: purchases, read once.
        window: which of them a history shows.
    """

    def __init__(self, source: SortedPurchases, window: Window) -> None:
        self._window = window
        self._product_ids = np.empty(source.purchases, np.int64)
        self._times = np.empty(source.purchases, np.int64)
        users: list[npt.NDArray[np.int64]] = []
        offsets: list[npt.NDArray[np.int64]] = []
        done, last = 0, None
        for block in source.blocks():
            place = slice(done, done + len(block.users))
            self._product_ids[place] = block.product_ids
            self._times[place] = block.times
            firsts = block.firsts()
            if block.users[0] == last:
                firsts = firsts[1:]
            users.append(block.users[firsts])
            offsets.append(firsts + done)
            done, last = place.stop, block.users[-1]
        assert done == source.purchases
        self._users = np.concatenate([np.zeros(0, np.int64), *users])
        self._offsets = np.concatenate([*offsets, np.array([done])])

    def history(self, user_id: int, at: dt.datetime | None = None) -> History:
        """Return a user's history at a moment, or now; empty for a user who is not known."""
        place = int(np.searchsorted(self._users, user_id))
        known = place < len(self._users) and self._users[place] == user_id
        mine = slice(self._offsets[place], self._offsets[place + 1]) if known else slice(0)
        return self._window.cut(self._product_ids[mine], self._times[mine], at)

    def describe(self) -> dict[str, Any]:
        """Return the numbers of users and purchases, the last purchase and the bytes held."""
        arrays = (self._users, self._offsets, self._product_ids, self._times)
        return {
            "store": "parquet",
            "users": len(self._users),
            "purchases": len(self._times),
            "last_purchase": _moment(int(self._times.max())) if len(self._times) else None,
            "bytes": sum(array.nbytes for array in arrays),
        }

    def close(self) -> None:
        """Do nothing: there is only memory to let go of."""


def open_store(spec: str, *, window_days: int, cap: int) -> FeatureStore:
    """Open the store that a text names.

    Args:
        spec: ``parquet:PATH`` or a Redis address, with ``?now=MOMENT`` where asked for another
            moment than now.
        window_days: how many days of 24 hours a history reaches back.
        cap: the most purchases in one history.

    Raises:
        BadInputError: the text names no store, its purchases break a rule, or no such Redis
            server answers.
    """
    plain, clock = _take_clock(spec)
    window = Window(days=window_days, cap=cap, clock=clock)
    scheme, colon, rest = plain.partition(":")
    if scheme == "parquet" and rest:
        with open_sorted(Path(rest)) as source:
            return ParquetStore(source, window)
    if scheme in _REDIS and colon:
        from serving.redis_store import RedisStore

        return RedisStore(plain, window)
    raise BadInputError(
        f"store '{spec}': write parquet:PATH, redis://HOST:PORT/DB or unix://SOCKET"
    )


def microseconds(at: dt.datetime) -> int:
    """Return a moment as microseconds since 1970; one without a time zone is of UTC."""
    zoned = at if at.tzinfo is not None else at.replace(tzinfo=dt.UTC)
    return (zoned - _EPOCH) // _MICROSECOND


def _take_clock(spec: str) -> tuple[str, Clock]:
    """Return a store's text without ``now``, and the clock that ``now`` asks for."""
    path, _, query = spec.partition("?")
    options = query.split("&")
    told = [option for option in options if option.startswith(_NOW)]
    if not told:
        return spec, lambda: dt.datetime.now(dt.UTC)
    moment = unquote(told[-1].removeprefix(_NOW))
    try:
        fixed = dt.datetime.fromisoformat(moment)
    except ValueError:
        raise BadInputError(
            f"store '{spec}': now is '{moment}', expected a moment such as 2017-10-30T12:00:00"
        ) from None
    rest = "&".join(option for option in options if option not in told)
    return path + (f"?{rest}" if rest else ""), lambda: fixed


def _moment(time: int) -> str:
    return (_EPOCH + time * _MICROSECOND).isoformat()
