"""Feature fetching: embeddings in Redis, and two clients that get them back.

A value is a row of float16 numbers; a key is a table's prefix and the id as eight bytes. All three
reads of a request go out at once (a pipeline of MGET), as the paper's "fat feature fetches" would.

Legend: ``N`` rows read, ``E`` embedding dimension.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from features.errors import BadInputError
from ranking.pretrained_embeddings import PretrainedTable

if TYPE_CHECKING:
    import redis

PREFIXES = {"product": b"dashclip-benchmark:p:", "query": b"dashclip-benchmark:q:"}

_START_SECONDS = 20.0
_BATCH = 2_000  # keys written or removed by one command
_TIMEOUT = 30.0  # seconds without an answer after which a read is given up

Halves = npt.NDArray[np.float16]
Integers = npt.NDArray[np.int64]


class Client(Protocol):
    """Reads rows out of Redis."""

    def fetch(self, product_ids: Integers, query_ids: Integers) -> Callable[[], Halves]:
        """Ask for rows and wait for the answer.

        Args:
            product_ids: candidates, then purchases.
            query_ids: the query.

        Returns:
            What decodes the answer: to [N, E] float16, products first.
        """
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


def open_redis(url: str) -> "redis.Redis":
    """Connect to a Redis server.

    Raises:
        BadInputError: the client is not installed, or no server answers there.
    """
    try:
        import redis
    except ModuleNotFoundError as error:
        raise BadInputError(
            "feature fetching needs the Redis client: pip install 'redis>=5'"
        ) from error
    try:
        client = redis.Redis.from_url(url, socket_timeout=_TIMEOUT)
        client.ping()
    except (redis.RedisError, ValueError) as error:
        raise BadInputError(f"{url}: no Redis server answers: {error}") from error
    return client


@contextmanager
def running_redis(core: int | None) -> Iterator[str]:
    """Run a Redis server on this machine's loopback and yield its URL; it is gone afterwards.

    It is reached over TCP, as a store on another machine would be, without a network's delay. It
    keeps nothing on disk and serves no other connection.

    Args:
        core: processor core to run on; any where None.

    Raises:
        BadInputError: the program is not installed or does not start.
    """
    program = shutil.which("redis-server")
    if program is None:
        raise BadInputError(
            "feature fetching needs a Redis server: install redis-server, or name a running one "
            "with --redis URL"
        )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        log = Path(folder, "redis.log")
        command = [program, "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly"]
        command += ["no", "--daemonize", "no", "--dir", folder, "--logfile", str(log)]
        with _on_core(core):
            server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            url = f"redis://127.0.0.1:{port}/0"
            _await(url, server, log)
            yield url
        finally:
            server.terminate()
            server.wait()


@contextmanager
def _on_core(core: int | None) -> Iterator[None]:
    """Let processes that are started within run on one core."""
    if core is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _await(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Return when this server, and no other, answers at the URL."""
    end = time.monotonic() + _START_SECONDS
    problem = "it does not answer"
    while server.poll() is None and time.monotonic() < end:
        try:
            with open_redis(url) as client:
                if ServerUse.now(client).pid == server.pid:
                    return
        except BadInputError as error:
            problem = str(error)
        time.sleep(0.02)
    said = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    raise BadInputError(f"redis-server did not start: {said[-1] if said else problem}")


def write_tables(url: str, tables: Mapping[str, PretrainedTable]) -> None:
    """Put all rows of the tables into Redis, as float16.

    Args:
        url: of the server.
        tables: ``product`` and ``query``.
    """
    client = open_redis(url)
    for name, table in tables.items():
        assert isinstance(table.weight, np.ndarray)
        keys = _keys(PREFIXES[name], table.ids)
        for start in range(0, len(keys), _BATCH):
            rows = table.weight[start : start + _BATCH].astype(np.float16)
            some = keys[start : start + _BATCH]
            client.mset(dict(zip(some, (row.tobytes() for row in rows), strict=True)))
    client.close()


def remove_tables(url: str, ids: Mapping[str, Integers]) -> None:
    """Take out of Redis what `write_tables` put there."""
    client = open_redis(url)
    for name in ids:
        keys = _keys(PREFIXES[name], ids[name])
        for start in range(0, len(keys), _BATCH):
            client.unlink(*keys[start : start + _BATCH])
    client.close()


def _keys(prefix: bytes, ids: Integers) -> list[bytes]:
    raw = ids.astype("<i8").tobytes()
    return [prefix + raw[start : start + 8] for start in range(0, len(raw), 8)]


class RedisPy:
    """The usual client, ``redis-py``: with its compiled parser where hiredis is installed.

    Args:
        url: of the server.
        dim: E.
    """

    def __init__(self, url: str, dim: int) -> None:
        self._client = open_redis(url)
        self._zeros = bytes(2 * dim)
        self._dim = dim

    def fetch(self, product_ids: Integers, query_ids: Integers) -> Callable[[], Halves]:
        """Read rows; one that is not there is zeros. See `Client`."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.mget(_keys(PREFIXES["product"], product_ids))
        pipeline.mget(_keys(PREFIXES["query"], query_ids))
        products, queries = pipeline.execute()
        return lambda: self._decode([*products, *queries])

    def _decode(self, values: list[bytes | None]) -> Halves:
        whole = bytearray().join(self._zeros if value is None else value for value in values)
        return np.frombuffer(whole, np.float16).reshape(-1, self._dim)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


class Thin:
    """The least that a client can do: one write, reads into one buffer, decoding without a copy.

    It relies on every row being there, so that the answer's length is known beforehand. No
    application would be served by it; it tells how much of the time is not the client's.

    Args:
        url: of the server.
        dim: E.
    """

    def __init__(self, url: str, dim: int) -> None:
        self._client = open_redis(url)
        # redis-py connects, signs in and selects the database; its socket is used by itself.
        self._connection: Any = self._client.connection_pool.get_connection()
        self._socket = cast(socket.socket, self._connection._sock)
        self._head = b"$%d\r\n" % (2 * dim)
        self._stride = len(self._head) + 2 * dim + 2
        self._buffer = bytearray()

    def fetch(self, product_ids: Integers, query_ids: Integers) -> Callable[[], Halves]:
        """Read rows. See `Client`.

        Raises:
            OSError: a row is not there.
        """
        reads = [(PREFIXES["product"], product_ids), (PREFIXES["query"], query_ids)]
        reads = [(prefix, ids) for prefix, ids in reads if len(ids)]
        self._socket.sendall(b"".join(_mget(prefix, ids) for prefix, ids in reads))
        heads = [len(b"*%d\r\n" % len(ids)) for _, ids in reads]
        total = sum(h + len(ids) * self._stride for h, (_, ids) in zip(heads, reads, strict=True))
        if len(self._buffer) < total:
            self._buffer = bytearray(total)
        view, have = memoryview(self._buffer), 0
        while have < total:
            have += self._socket.recv_into(view[have:total])
        return lambda: self._decode(heads, [len(ids) for _, ids in reads])

    def _decode(self, heads: list[int], counts: list[int]) -> Halves:
        found, start = [], 0
        for head, count in zip(heads, counts, strict=True):
            start += head
            size = count * self._stride
            answers = np.frombuffer(self._buffer, np.uint8, size, start)
            answers = answers.reshape(count, self._stride)
            assert (answers[:, 0] == self._head[0]).all(), "every row is there"
            rows = answers[:, len(self._head) : -2]
            found.append(np.ascontiguousarray(rows).view(np.float16))
            start += size
        return np.concatenate(found)

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()
        self._client.close()


def _mget(prefix: bytes, ids: Integers) -> bytes:
    """Return ``MGET`` of some ids as Redis's protocol has it."""
    size = len(prefix) + 8
    head = b"$%d\r\n" % size + prefix
    record = np.dtype([("head", f"V{len(head)}"), ("id", "<i8"), ("end", "V2")])
    keys = np.empty(len(ids), record)
    keys["head"] = np.void(head)
    keys["id"] = ids
    keys["end"] = np.void(b"\r\n")
    return b"*%d\r\n$4\r\nMGET\r\n" % (len(ids) + 1) + keys.tobytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerUse:
    """What a Redis server has used.

    Attributes:
        cpu_seconds: processor time since it started.
        rss_mb: memory in megabytes.
        pid: its process.
    """

    cpu_seconds: float
    rss_mb: float
    pid: int

    @classmethod
    def now(cls, client: "redis.Redis") -> "ServerUse":
        """Ask the server."""
        about: Any = client.info()
        return cls(
            cpu_seconds=about["used_cpu_user"] + about["used_cpu_sys"],
            rss_mb=about["used_memory_rss"] / 1e6,
            pid=about["process_id"],
        )
