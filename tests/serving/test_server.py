"""The real `serve-ranker` with two worker processes, and the ways in which it ends."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from serving.exported import ExportedRanker

ROOT = Path(__file__).parents[2]
READY_S = 120.0
END_S = 40.0
KEY = "a key"
WITH_KEY = {"Authorization": f"Bearer {KEY}"}


class Server:
    """A running `serve-ranker` on a free port."""

    def __init__(self, folder, *options, **environment):
        self.log = folder / "log.jsonl"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serving.serve_cli", "--port", "0", *map(str, options)],
                cwd=ROOT,
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.port = None

    def __enter__(self):
        killer = threading.Timer(READY_S, self.process.kill)
        killer.start()
        said = self.process.stdout.readline()
        killer.cancel()
        found = re.fullmatch(r"ready: http://127\.0\.0\.1:(\d+)\n", said)
        if found is None:
            self.__exit__()
        assert found is not None, self.log.read_text()
        self.port = int(found[1])
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(END_S)
        finally:
            self.process.kill()
            self.process.stdout.close()

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def ask(self, method, path, body=None, headers=(), connection=None):
        """Return status, JSON or text, and headers of one answer."""
        own = self.connect() if connection is None else None
        asked = own or connection
        try:
            asked.request(method, path, body, dict(headers))
            with asked.getresponse() as answer:
                content = answer.read()
        finally:
            if own is not None:
                own.close()
        if answer.headers["content-type"] == "application/json":
            content = json.loads(content)
        return answer.status, content, answer.headers

    def rank(self, request, **more):
        return self.ask("POST", "/v1/rank", json.dumps(request), **more)

    def workers(self):
        """Return the process ids of the workers."""
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        commands = {}
        for pid in text.split():
            with suppress(OSError):  # it may have ended meanwhile
                commands[int(pid)] = Path(f"/proc/{pid}/cmdline").read_bytes()
        return {pid for pid, command in commands.items() if b"spawn_main" in command}

    def lines(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def wait_for(condition):
    until = time.monotonic() + READY_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def runs(pid):
    """Return whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def ranker(tiny_exported):
    return ExportedRanker.open(tiny_exported)


@pytest.fixture(scope="module")
def raw(ranker):
    return max(ranker.golden, key=lambda golden: len(golden.probabilities)).request


@pytest.fixture(scope="module")
def exposures(tmp_path_factory):
    return tmp_path_factory.mktemp("exposures")


@pytest.fixture(scope="module")
def server(tiny_exported, exposures, tmp_path_factory):
    """A server whose workers are killed, replaced and, by the last test, stopped."""
    options = ("--bundle", tiny_exported, "--exposures", exposures, "--batch-wait-ms", "30")
    with Server(tmp_path_factory.mktemp("server"), *options) as server:
        yield server


@pytest.fixture(scope="module")
def keyed(tiny_exported, tmp_path_factory):
    """A server that asks for a key and waits for more requests before it scores."""
    folder = tmp_path_factory.mktemp("keyed")
    options = ("--bundle", tiny_exported, "--queue", "3")
    more = ("--batch-wait-ms", "400", "--batch-candidates", "100000")
    with Server(folder, *options, *more, RANKER_API_KEY=KEY, TMPDIR=str(folder)) as server:
        yield server


def test_answers_are_what_the_exported_ranker_says(keyed, ranker):
    for golden in ranker.golden[:3]:
        status, found, _ = keyed.rank(golden.request, headers=WITH_KEY)
        assert status == 200
        expected = ranker.score_raw([golden.request])
        assert np.array_equal(np.array(found["probabilities"], np.float32), expected)


def test_the_key_is_asked_for(keyed, raw):
    assert keyed.ask("GET", "/readyz")[0] == 200
    assert keyed.rank(raw)[0] == 401
    assert keyed.ask("GET", "/metrics")[0] == 401


def test_a_full_queue_answers_429_at_once(keyed, raw):
    def ask(_):
        started = time.monotonic()
        status, content, headers = keyed.rank(raw, headers=WITH_KEY)
        return status, time.monotonic() - started, content, headers

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    statuses = [status for status, *_ in answers]
    # Each worker takes 3 and holds them for 400 ms.
    assert set(statuses) == {200, 429}
    assert 3 <= statuses.count(200) <= 6
    for status, seconds, content, headers in answers:
        if status == 429:
            assert content["error"]["code"] == "queue_full"
            assert headers["retry-after"] == "1"
            assert seconds < 0.35
    assert keyed.rank(raw, headers=WITH_KEY)[0] == 200


def test_metrics_are_summed_over_the_workers(keyed, raw):
    def ranked():
        text = keyed.ask("GET", "/metrics", headers=WITH_KEY)[1].decode()
        return float(re.search(r'^ranker_ranked_total\{slot="control"\} (.*)$', text, re.M)[1])

    before = ranked()
    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(lambda _: keyed.rank(raw, headers=WITH_KEY)[0], range(4)))
    assert {ranked() for _ in range(8)} == {before + statuses.count(200)}


def test_logs_are_json_without_what_users_sent(keyed, raw):
    secret = {"query": "zebra-unicorn", "candidates": {"product_id": [987654321987]}}
    assert keyed.rank(secret, headers=WITH_KEY)[0] == 200
    broken = {"query": "zebra-unicorn", "candidates": {"product_id": ["987654321987"]}}
    assert keyed.rank(broken, headers=WITH_KEY)[0] == 422
    assert {line["level"] for line in keyed.lines()} == {"info"}
    text = keyed.log.read_text()
    assert "zebra" not in text
    assert "987654321987" not in text


def raw_socket(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def read_all(connection):
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def test_headers_without_end_are_refused(keyed):
    with raw_socket(keyed) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-long: ")
        for _ in range(8):
            connection.sendall(b"y" * 65536)
        assert b" 431 " in read_all(connection)
    assert keyed.ask("GET", "/healthz")[0] == 200


def test_a_large_body_is_refused_before_it_is_sent(keyed):
    with raw_socket(keyed) as connection:
        connection.sendall(
            b"POST /v1/rank HTTP/1.1\r\nhost: x\r\ncontent-length: 99000000\r\n"
            b"authorization: Bearer " + KEY.encode() + b"\r\n\r\n"
        )
        assert b" 413 " in connection.recv(65536)


def test_a_body_that_does_not_come_is_given_up(keyed):
    with raw_socket(keyed) as connection:
        connection.sendall(
            b"POST /v1/rank HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n"
            b"authorization: Bearer " + KEY.encode() + b"\r\n\r\n{"
        )
        assert b" 408 " in connection.recv(65536)  # at the deadline of 1 s


def test_what_is_not_http_is_refused(keyed):
    with raw_socket(keyed) as connection:
        connection.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        assert b" 400 " in read_all(connection)


def test_workers_leave_when_their_parent_is_killed(keyed):
    workers = keyed.workers()
    assert len(workers) == 2
    keyed.process.kill()
    wait_for(lambda: not any(runs(worker) for worker in workers))


def test_a_worker_that_dies_is_replaced_and_the_other_serves(server, raw):
    before = server.workers()
    assert len(before) == 2
    os.kill(min(before), signal.SIGKILL)
    time.sleep(0.2)
    assert {server.rank(raw)[0] for _ in range(5)} == {200}
    wait_for(lambda: len(server.workers() - before) == 1)
    assert max(before) in server.workers()


def test_sighup_replaces_the_workers_without_a_gap(server, raw):
    before = server.workers()
    server.process.send_signal(signal.SIGHUP)
    statuses = []

    def replaced():
        statuses.append(server.rank(raw)[0])
        return not before & server.workers()

    wait_for(replaced)
    assert set(statuses) == {200}
    assert len(server.workers()) == 2


def exposed(folder):
    """Return the request ids of an exposure log."""
    lines = [line for file in folder.iterdir() for line in file.read_text().splitlines()]
    return {json.loads(line)["request_id"] for line in lines}


def test_sigterm_loses_no_accepted_request(server, raw, exposures):
    """Callers ask without a pause on connections that stay open, until nobody listens."""
    before = exposed(exposures)
    answered, lost = [], []
    stopping = threading.Event()

    def ask_on(connection):
        while True:
            status, content, headers = server.rank(raw, connection=connection)
            answered.append((status, content["request_id"]))
            if headers["connection"] == "close":
                return

    def call():
        while not stopping.is_set():
            connection = server.connect()
            try:
                ask_on(connection)
            except (OSError, http.client.HTTPException) as error:
                lost.append(error)
            finally:
                connection.close()

    callers = [threading.Thread(target=call) for _ in range(8)]
    for caller in callers:
        caller.start()
    time.sleep(1.0)
    stopping.set()
    server.process.terminate()
    for caller in callers:
        caller.join(END_S)
    assert server.process.wait(END_S) == 0
    assert lost == []
    assert len(answered) > 40
    assert {status for status, _ in answered} == {200}
    assert {request_id for _, request_id in answered} <= exposed(exposures) - before


def test_an_idle_connection_may_still_ask_after_sigterm(tiny_exported, raw, tmp_path):
    options = ("--bundle", tiny_exported, "--workers", "1", "--drain-seconds", "1")
    with Server(tmp_path, *options) as server:
        idle, probe = server.connect(), server.connect()
        for connection in (idle, probe):
            assert server.ask("GET", "/readyz", connection=connection)[0] == 200
        server.process.terminate()
        wait_for(lambda: server.ask("GET", "/readyz", connection=probe)[0] == 503)
        assert server.rank(raw)[0] == 200  # still listens
        time.sleep(1.2)  # now it does not
        status, _, headers = server.rank(raw, connection=idle)
        assert (status, headers["connection"]) == (200, "close")
        with pytest.raises(OSError, match="refused"):
            server.rank(raw)
        idle.close()
        probe.close()
        assert server.process.wait(END_S) == 0


def serve_in_vain(*options, **environment):
    """Return exit status and last line of a `serve-ranker` that cannot start."""
    done = subprocess.run(
        [sys.executable, "-m", "serving.serve_cli", *map(str, options)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=READY_S,
        check=False,
    )
    return done.returncode, done.stderr.splitlines()[-1]


def test_bad_input_is_one_sentence_and_status_2(tiny_exported, tmp_path):
    bundle = ("--bundle", tiny_exported)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, told = serve_in_vain(*bundle, "--port", port)
        assert (status, told) == (
            2,
            f"serve-ranker: cannot listen on 127.0.0.1 port {port}: Address already in use",
        )
    status, told = serve_in_vain(*bundle, "--treatment-share", "1.2")
    assert status == 2
    assert "'treatment_share' must be from 0 to 1, got 1.2" in told
    status, told = serve_in_vain("--bundle", tmp_path, "--port", "0")
    assert status == 2
    assert "no exported ranker there" in told


def test_workers_that_cannot_load_end_the_service_with_their_reason(tiny_exported, tmp_path):
    broken = shutil.copytree(tiny_exported, tmp_path / "broken")
    with (broken / "ranker.pt").open("ab") as file:
        file.write(b"more")
    status, told = serve_in_vain("--bundle", broken, "--port", "0", "--workers", "1")
    assert status == 2
    assert told.startswith("serve-ranker: ")
    assert "ranker.pt: is not the file that was exported" in told
