"""The Redis store and its loader against a real server, and the same answers as in process."""

import datetime as dt
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.errors import BadInputError
from serving.feature_store import FeatureStore, StoreUnavailableError, open_store
from serving.redis_store import PREFIX, address, decode, encode, main

redis = pytest.importorskip("redis", reason="the Redis client is not installed")
SERVER = shutil.which("redis-server")
pytestmark = pytest.mark.skipif(SERVER is None, reason="redis-server is not on the path")

NOON = dt.datetime(2024, 3, 31, 12)
DAY = dt.timedelta(days=1)
INSTANT = dt.timedelta(microseconds=1)


class Server:
    """A Redis server of the tests' own, on a Unix socket and a free port of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"unix://{folder / 'redis.sock'}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        assert SERVER is not None
        options = {"port": self.port, "bind": "127.0.0.1", "save": "", "dir": self.folder}
        options["unixsocket"] = self.folder / "redis.sock"
        arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        self.process = subprocess.Popen([SERVER, *arguments], stdout=subprocess.DEVNULL)
        with redis.Redis.from_url(self.url) as client:
            for _ in range(200):
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    time.sleep(0.02)
        self.stop()
        pytest.fail("redis-server did not answer within 4 s")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        running = Server(Path(folder))
        yield running
        running.stop()


@pytest.fixture
def client(server: Server) -> Iterator["redis.Redis"]:
    with redis.Redis.from_url(server.url) as connected:
        connected.flushdb()
        yield connected


@contextmanager
def opened(url: str, window_days: int = 84, cap: int = 1000) -> Iterator[FeatureStore]:
    store = open_store(url, window_days=window_days, cap=cap)
    yield store
    store.close()


def write_purchases(path: Path, purchases: list[tuple[int, int, dt.datetime]]) -> Path:
    table = {
        "user_id": pa.array([p[0] for p in purchases], pa.int64()),
        "product_id": pa.array([p[1] for p in purchases], pa.int64()),
        "purchased_at": pa.array([p[2] for p in purchases], pa.timestamp("us")),
    }
    pq.write_table(pa.table(table), path)
    return path


def load(path: Path, url: str) -> int:
    return main(["--purchases", str(path), "--redis", url])


def test_bytes_as_the_layout_says(
    server: Server, client: "redis.Redis", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = dt.datetime(1971, 1, 1)  # 365 days, 31,536,000 s after 1970
    path = write_purchases(tmp_path / "p.parquet", [(7, 258, second + INSTANT), (7, -2, second)])
    assert load(path, server.url) == 0
    stored = client.get("purchases:v1:7")
    assert stored == (31_536_000_000_000).to_bytes(8, "little") + b"\xfe" + b"\xff" * 7 + (
        31_536_000_000_001
    ).to_bytes(8, "little") + bytes([2, 1, 0, 0, 0, 0, 0, 0])
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result.pop("seconds") >= 0
    assert result == {"redis": server.url, "users": 1, "purchases": 2, "bytes": 32}
    assert "2 purchases of 1 users" in err


def test_another_program_appends_in_any_order(server: Server, client: "redis.Redis") -> None:
    def append(product: int, at: dt.datetime) -> None:
        micros = int(at.replace(tzinfo=dt.UTC).timestamp()) * 1_000_000
        purchase = micros.to_bytes(8, "little", signed=True) + product.to_bytes(8, "little")
        client.append("purchases:v1:3", purchase)

    with opened(server.url) as store:
        assert store.history(3, NOON).product_ids.tolist() == []
        append(20, NOON - DAY)
        append(10, NOON - 3 * DAY)
        append(30, NOON - 2 * DAY)
        append(9, NOON - 2 * DAY)
        found = store.history(3, NOON)
        assert found.product_ids.tolist() == [20, 9, 30, 10]
        assert found.age_days.tolist() == [1, 2, 2, 3]
        assert found.product_ids.dtype == np.int64
        assert found.age_days.dtype == np.int16


def test_loading_again_changes_nothing_and_keeps_others(
    server: Server, client: "redis.Redis", tmp_path: Path
) -> None:
    path = write_purchases(tmp_path / "p.parquet", [(1, 5, NOON), (2, 6, NOON), (1, 7, NOON - DAY)])
    client.set(f"{PREFIX}9", encode(np.array([1]), np.array([2])))
    assert load(path, server.url) == 0
    first = {key: client.get(key) for key in client.scan_iter()}
    assert sorted(first) == [f"{PREFIX}{user}".encode() for user in (1, 2, 9)]
    assert load(path, f"redis://127.0.0.1:{server.port}/0") == 0
    assert {key: client.get(key) for key in client.scan_iter()} == first


def test_equals_the_store_in_process(
    server: Server, client: "redis.Redis", tiny_dataset: Path
) -> None:
    purchases = tiny_dataset / "purchases.parquet"
    assert load(purchases, server.url) == 0
    users = pq.read_table(purchases)["user_id"].unique().to_pylist()
    rng = np.random.default_rng(0)
    start = dt.datetime(2023, 12, 1)
    moments = [start + dt.timedelta(seconds=int(s)) for s in rng.integers(0, 86_400 * 80, 20)]
    compared = 0
    with (
        opened(server.url, cap=20) as there,
        opened(f"parquet:{purchases}", cap=20) as here,
    ):
        for user in [*users, -5]:
            for at in moments:
                expected, found = here.history(user, at), there.history(user, at)
                for ours, theirs in zip(expected, found, strict=True):
                    np.testing.assert_array_equal(ours, theirs)
                compared += len(expected.product_ids)
    assert compared > 1000


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(-9, 9), st.integers(-200, 200)), max_size=40),
    st.lists(st.tuples(st.integers(1, 4), st.integers(-200, 200)), max_size=8),
    st.integers(1, 8),
    st.integers(1, 12),
)
def test_equals_the_store_in_process_on_any_purchases(
    server: Server,
    purchases: list[tuple[int, int, int]],
    requests: list[tuple[int, int]],
    window_days: int,
    cap: int,
) -> None:
    def at(hours: int) -> dt.datetime:
        return NOON + hours * dt.timedelta(hours=1)

    with redis.Redis.from_url(server.url) as client, tempfile.TemporaryDirectory() as folder:
        client.flushdb()
        path = Path(folder) / "p.parquet"
        write_purchases(path, [(user, product, at(hours)) for user, product, hours in purchases])
        assert load(path, server.url) == 0
        with (
            opened(server.url, window_days, cap) as there,
            opened(f"parquet:{path}", window_days, cap) as here,
        ):
            for user, hours in requests:
                ours, theirs = here.history(user, at(hours)), there.history(user, at(hours))
                assert [v.tolist() for v in ours] == [v.tolist() for v in theirs]


def test_decoding_is_the_inverse_of_encoding_up_to_order() -> None:
    products, times = decode(encode(np.array([3, 1, 2, 9]), np.array([10, 30, 30, 20])))
    assert products.tolist() == [1, 2, 9, 3]
    assert times.tolist() == [30, 30, 20, 10]
    assert [len(values) for values in decode(b"")] == [0, 0]


def test_a_fixed_moment_and_options_of_the_client(server: Server, client: "redis.Redis") -> None:
    micros = int(NOON.replace(tzinfo=dt.UTC).timestamp()) * 1_000_000
    client.set(f"{PREFIX}1", encode(np.array([4]), np.array([micros])))
    url = f"redis://127.0.0.1:{server.port}/0?socket_timeout=0.5&now=2024-04-02T13:00:00"
    with opened(url) as store:
        assert store.history(1).age_days.tolist() == [2]
        assert store.describe() == {
            "store": "redis",
            "address": f"redis://127.0.0.1:{server.port}/0",
            "keys": 1,
        }


def test_many_threads_share_a_store(server: Server, client: "redis.Redis") -> None:
    micros = int((NOON - DAY).replace(tzinfo=dt.UTC).timestamp()) * 1_000_000
    for user in range(50):
        client.set(f"{PREFIX}{user}", encode(np.array([user * 7]), np.array([micros])))
    wrong: list[list[int]] = []

    def ask(store: FeatureStore) -> None:
        found = [store.history(user, NOON).product_ids.tolist() for user in range(50)]
        wrong.extend(products for user, products in enumerate(found) if products != [user * 7])

    with opened(server.url) as store:
        threads = [threading.Thread(target=ask, args=[store]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_values_of_other_programs_are_an_error_of_the_store(
    server: Server, client: "redis.Redis"
) -> None:
    client.set(f"{PREFIX}1", b"17 bytes, not 16.")
    client.lpush(f"{PREFIX}2", "a list")
    with opened(server.url) as store:
        with pytest.raises(StoreUnavailableError, match="a value that is not of purchases"):
            store.history(1, NOON)
        with pytest.raises(StoreUnavailableError, match=r"does not answer .ResponseError"):
            store.history(2, NOON)


def test_a_server_that_hangs_or_goes_is_an_error_soon_and_comes_back() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            with opened(f"redis://127.0.0.1:{server.port}/0") as store:
                assert store.history(1, NOON).product_ids.tolist() == []
                os.kill(server.process.pid, signal.SIGSTOP)
                started = time.perf_counter()
                with pytest.raises(StoreUnavailableError, match=r"does not answer .TimeoutError"):
                    store.history(1, NOON)
                assert time.perf_counter() - started < 2
                os.kill(server.process.pid, signal.SIGCONT)
                assert store.history(1, NOON).product_ids.tolist() == []
                server.stop()
                with pytest.raises(StoreUnavailableError, match=r"does not answer .ConnectionErr"):
                    store.history(1, NOON)
                server.start()
                assert store.history(1, NOON).product_ids.tolist() == []
        finally:
            server.stop()


def test_no_server_is_one_sentence_without_the_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]  # nobody listens
        url = f"redis://me:secret@127.0.0.1:{port}/0"
        with pytest.raises(BadInputError) as refused:
            open_store(url, window_days=84, cap=9)
        assert str(refused.value).startswith(f"redis://127.0.0.1:{port}/0: no Redis server to use")
        path = write_purchases(tmp_path / "p.parquet", [(1, 5, NOON)])
        assert load(path, url) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "secret" not in message
    assert address("redis://me:secret@host/1?socket_timeout=1") == "redis://host/1"


def test_bad_purchases_and_a_full_server_are_one_sentence(
    server: Server,
    client: "redis.Redis",
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert load(tmp_path / "nowhere", server.url) == 2
    assert "no such file or folder of Parquet files" in capsys.readouterr().err
    path = write_purchases(tmp_path / "p.parquet", [(1, 5, NOON)])
    client.config_set("maxmemory", 1)
    try:
        assert load(path, server.url) == 2
    finally:
        client.config_set("maxmemory", 0)
    message = capsys.readouterr().err
    assert "loading stopped: " in message
    assert "give the same command again to go on" in message
    assert load(path, server.url) == 0
