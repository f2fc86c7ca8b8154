"""Purchase histories in Redis, and the command that loads them: ``python -m serving.redis_store``.

Layout: one string a user, under ``purchases:v1:USER_ID``, of 16 bytes a purchase in any order::

    purchases:v1:1371   │ time  8 bytes │ product 8 bytes │ time │ product │ …
                          int64, microseconds since 1970    int64, both little-endian

One GET brings all that a user bought, and numpy reads it where it lies: a sorted set would let the
server cut the window, but its answer is two texts a purchase, which cost a client more than all the
rest, and it takes 4 to 8 times the memory. The window is cut here, so that one value answers for
any moment. Another program tells of a purchase the moment it happens, in whatever order, with one
atomic command: ``APPEND purchases:v1:1371 <16 bytes>``. A purchase appended twice counts twice:
who repeats an APPEND that got no answer should read the value's end first.

Loading replaces the values of the users that the Parquet files name, so that it can be repeated and
carried on after a stop; other users' values stay.
"""

import datetime as dt
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import tyro

from features.console import progress_bar, run_command, say
from features.errors import BadInputError
from serving.feature_store import History, StoreUnavailableError, Window
from serving.purchases import SortedPurchases, open_sorted

if TYPE_CHECKING:
    import redis

PREFIX = "purchases:v1:"
_PURCHASE = np.dtype("<i8")  # of which one purchase has two
_PURCHASE_BYTES = 2 * _PURCHASE.itemsize

# A request waits at most twice this long for an answer (a lost connection is tried anew once); the
# address may say otherwise: redis://localhost:6379/0?socket_timeout=0.05
_TIMEOUT_S = 0.2
_CONNECTIONS = 64
_LOADING_TIMEOUT_S = 30.0
_LOADED_AT_ONCE = 1000


class RedisStore:
    """Histories out of a Redis server, one GET each.

    Connections are pooled, opened when needed and opened anew when lost.

    Args:
        url: address of the server, as ``redis.Redis.from_url`` takes it.
        window: which purchases a history shows.

    Raises:
        BadInputError: the address is wrong, or no server answers there.
    """

    def __init__(self, url: str, window: Window) -> None:
        self._window = window
        self._address = address(url)
        self._client = _connect(url, _TIMEOUT_S)
        self._keys = self._client.dbsize()

    def history(self, user_id: int, at: dt.datetime | None = None) -> History:
        """Return a user's history at a moment, or now; empty for a user who is not known.

        Raises:
            StoreUnavailableError: the server is away or too slow, or holds something else.
        """
        import redis

        try:
            value = cast("bytes | None", self._client.get(f"{PREFIX}{user_id}"))
        except redis.RedisError as error:
            raise StoreUnavailableError(
                f"the feature store does not answer ({type(error).__name__})"
            ) from error
        if value is not None and len(value) % _PURCHASE_BYTES:
            raise StoreUnavailableError("the feature store holds a value that is not of purchases")
        return self._window.cut(*decode(value or b""), at)

    def describe(self) -> dict[str, Any]:
        """Return the address, without a password, and the keys that it held on opening."""
        return {"store": "redis", "address": self._address, "keys": self._keys}

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def encode(product_ids: npt.NDArray[np.int64], times: npt.NDArray[np.int64]) -> bytes:
    """Return the bytes of N purchases, in the order given.

    Args:
        product_ids: [N].
        times: [N] int64 microseconds since 1970.
    """
    return np.stack([times, product_ids], axis=1).astype(_PURCHASE).tobytes()


def decode(value: bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return product ids and times [N] of a user's value, most recent first, ties by product id."""
    times, product_ids = np.frombuffer(value, _PURCHASE).reshape(-1, 2).T
    order = np.lexsort((product_ids, -times))
    return product_ids[order], times[order]


def address(url: str) -> str:
    """Return an address without user, password and options."""
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2] + parts.path
    return f"{parts.scheme}://{place}" if parts.scheme else place


def _connect(url: str, timeout_s: float) -> "redis.Redis":
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    try:
        pool = redis.BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=timeout_s,  # for a connection of the pool
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 1),
        )
        client = redis.Redis.from_pool(pool)
        client.ping()
    except (redis.RedisError, ValueError) as error:
        raise BadInputError(f"{address(url)}: no Redis server to use there: {error}") from error
    return client


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Load purchases into Redis, for serve-ranker --store redis://….

    Replaces what Redis holds of each user whom the purchases name; other users stay as they are.
    A load that was stopped is given again.
    """

    purchases: Annotated[Path, tyro.conf.arg(metavar="PATH")]
    """Parquet file of user_id, product_id and purchased_at, or folder of such files."""
    redis: Annotated[str, tyro.conf.arg(metavar="URL")]
    """Address of the server, such as redis://localhost:6379/0 or unix:///run/redis.sock."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(Options, _load, prog="python -m serving.redis_store", arguments=arguments)


def _load(options: Options) -> None:
    started = time.perf_counter()
    client = _connect(options.redis, _LOADING_TIMEOUT_S)
    try:
        with open_sorted(options.purchases) as source, _loading(options.redis):
            users, size = load(source, client)
    finally:
        client.close()
    result = {
        "redis": address(options.redis),
        "users": users,
        "purchases": source.purchases,
        "bytes": size,
        "seconds": round(time.perf_counter() - started, 3),
    }
    say(
        f"{result['redis']}: {source.purchases:,} purchases of {users:,} users, "
        f"{size / 2**20:.1f} MiB of values, in {result['seconds']:.1f} s"
    )
    sys.stdout.write(json.dumps(result) + "\n")


def load(source: SortedPurchases, client: "redis.Redis") -> tuple[int, int]:
    """Write all purchases, in pipelines of 1,000 users.

    Returns:
        the numbers of users and of bytes written.
    """
    users = size = 0
    values = _values(source)
    with progress_bar() as bar:
        task = bar.add_task("purchases", total=source.purchases)
        while some := list(islice(values, _LOADED_AT_ONCE)):
            with client.pipeline(transaction=False) as pipeline:
                for user, value in some:
                    pipeline.set(f"{PREFIX}{user}", value)
                pipeline.execute()
            written = sum(len(value) for _, value in some)
            users, size = users + len(some), size + written
            bar.advance(task, written // _PURCHASE_BYTES)
    return users, size


def _values(source: SortedPurchases) -> Iterator[tuple[int, bytes]]:
    """Yield each user with his value, oldest purchase first, as appending goes on."""
    last, parts = None, []
    for block in source.blocks():
        firsts = block.firsts()
        for start, end in zip(firsts, [*firsts[1:], len(block.users)], strict=True):
            user = int(block.users[start])
            if user != last and last is not None:
                yield last, b"".join(reversed(parts))
                parts = []
            last = user
            mine = slice(start, end)
            parts.append(encode(block.product_ids[mine][::-1], block.times[mine][::-1]))
    if last is not None:
        yield last, b"".join(reversed(parts))


@contextmanager
def _loading(url: str) -> Iterator[None]:
    """Say what went wrong while loading in one sentence."""
    import redis

    try:
        yield
    except redis.RedisError as error:
        raise BadInputError(
            f"{address(url)}: loading stopped: {error}; give the same command again to go on"
        ) from error


if __name__ == "__main__":
    raise SystemExit(main())
