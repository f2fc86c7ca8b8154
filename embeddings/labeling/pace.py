"""How fast requests may follow each other, and how long to wait after one that failed."""

import random
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

_MINUTE = 60.0
_FIRST_WAIT = 0.5
_LONGEST_WAIT = 60.0


class Pace:
    """A token bucket: so many units a minute, with bursts of at most one second's worth.

    An amount that is larger than a burst passes at once where the bucket is full, and those behind
    it wait the longer, so that over any time no more passes than the rate, one burst and one
    amount.

    Args:
        per_minute: units; 0 for no limit.
        clock: seconds that only go up.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = per_minute / _MINUTE
        self._burst = max(self._rate, 1.0)
        self._clock = clock
        self._level = self._burst
        self._at = clock()

    def take(self, amount: float) -> float:
        """Take an amount, and return after how many seconds it may be used.

        A negative one gives back what was taken in excess.
        """
        if not self._rate:
            return 0.0
        now = self._clock()
        self._level = min(self._level + (now - self._at) * self._rate, self._burst)
        self._at = now
        wait = max((min(amount, self._burst) - self._level) / self._rate, 0.0)
        self._level = min(self._level - amount, self._burst)
        return wait


def back_off(failures: int) -> float:
    """Return how many seconds to wait after so many failures (1 or more) in a row.

    Each failure doubles the longest wait, from half a second to a minute; chance takes up to half
    of it away, so that those who failed together do not come back together.
    """
    longest = min(_FIRST_WAIT * 2.0 ** min(failures - 1, 30), _LONGEST_WAIT)
    return longest * random.uniform(0.5, 1.0)


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Return the seconds that a response asks to wait, ``None`` where it does not say.

    Read are ``retry-after-ms`` and ``Retry-After``, in seconds or as a date (RFC 9110, 10.2.3).
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        until = parsedate_to_datetime(headers["retry-after"])
    except (KeyError, ValueError):
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=UTC)
    return max((until - (now or datetime.now(UTC))).total_seconds(), 0.0)
