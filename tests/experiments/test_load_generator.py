import asyncio
import contextlib
import socket
import threading
import time

import numpy as np
import pytest
import uvloop

from experiments.load_connection import Connection, Outcome
from experiments.load_generator import (
    LoadGenerator,
    at_once,
    fixed_rate,
    http_request,
    poisson,
    quantiles,
)
from experiments.load_service import free_port
from experiments.load_timer import Alarm

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
BUSY = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 2\r\n\r\n{}"


@contextlib.contextmanager
def server(serve):
    """Listen on a free port and give each connection to ``serve`` in a thread of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)
    over = threading.Event()
    threads = []

    def one(connection):
        with connection, contextlib.suppress(OSError):
            serve(connection)

    def accept():
        while not over.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(5)
            threads.append(threading.Thread(target=one, args=(connection,)))
            threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield listener.getsockname()[:2]
    finally:
        over.set()
        accepting.join()
        listener.close()
        for thread in threads:
            thread.join()


def read_request(connection):
    """Read one request whole; false at the end of the connection."""
    received = b""
    while b"\r\n\r\n" not in received:
        piece = connection.recv(1 << 16)
        if not piece:
            return False
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(1 << 16)
    return True


def answering(delay=0.0):
    """Return a server's function that answers each request after ``delay`` seconds."""

    def serve(connection):
        while read_request(connection):
            time.sleep(delay)
            connection.sendall(OK)

    return serve


def offer(address, plan, **options):
    """Offer ``plan`` to ``address`` and return the results."""

    async def go():
        body = b'{"a": 1}'
        generator = LoadGenerator(
            target=address, payloads=[http_request(address, "/x", body)], **options
        )
        try:
            return await generator.offer(plan)
        finally:
            generator.close()

    return uvloop.run(go())


def test_every_request_of_the_plan_is_sent_in_order_and_not_early():
    with server(answering()) as address:
        results = offer(address, fixed_rate(200, 0.5), connections=4)
    assert results.count(200) == 100
    assert results.failures() == 0
    assert (results.sent >= results.planned - 1e-6).all()
    assert (np.diff(results.sent) >= 0).all()
    assert results.planned[-1] == pytest.approx(0.495)
    summary = results.summary()
    assert summary["offered_per_s"] == pytest.approx(200)
    assert summary["statuses"] == {"200": 100}
    assert summary["failures"] == {}
    assert 0 < summary["generator_processor_s"] < 5


def test_a_slow_server_is_charged_from_the_plan():
    # 100 requests/s on one connection to a server of 50/s: request k waits for k before it.
    with server(answering(0.02)) as address:
        results = offer(address, fixed_rate(100, 0.4), connections=1, most_connections=1)
    from_plan = results.latency_ms(200)
    from_send = results.latency_ms(200, since="sent")
    k = np.arange(40)
    assert (from_plan >= 20 * (k + 1) - 10 * k - 1).all()
    assert from_plan[-1] >= 20 + 10 * 39 - 1
    assert np.median(from_send) < 100 < np.median(from_plan)
    assert results.connections == 1


def test_a_stall_is_charged_to_all_that_were_planned_during_it():
    stalled = threading.Event()

    def serve(connection):
        while read_request(connection):
            if not stalled.is_set():
                stalled.set()
                time.sleep(0.5)
            connection.sendall(OK)

    with server(serve) as address:
        results = offer(address, fixed_rate(100, 1), connections=1, most_connections=1)
    # Those of the first .25 s waited .25 s or more; a closed loop would show one slow request.
    assert (results.latency_ms(200) > 250).sum() >= 25


def test_the_pool_grows_when_connections_are_busy_and_no_further_than_allowed():
    with server(answering(0.1)) as address:
        free = offer(address, fixed_rate(100, 0.3), connections=1, most_connections=50)
        bounded = offer(address, fixed_rate(100, 0.3), connections=1, most_connections=3)
    assert free.connections >= 9
    assert bounded.connections == 3
    assert free.count(200) == bounded.count(200) == 30
    assert np.median(free.latency_ms(200)) < np.median(bounded.latency_ms(200))


def test_at_once_is_a_closed_loop():
    with server(answering()) as address:
        results = offer(address, at_once(300), connections=2, most_connections=2)
    assert results.count(200) == 300
    assert results.connections == 2
    assert results.summary()["offered_per_s"] is None


def test_statuses_are_counted_apart():
    turn = iter(range(1000))

    def serve(connection):
        while read_request(connection):
            connection.sendall(BUSY if next(turn) % 4 == 0 else OK)

    with server(serve) as address:
        results = offer(address, fixed_rate(100, 0.2), connections=1)
    assert results.summary()["statuses"] == {"200": 15, "429": 5}
    assert len(results.latency_ms(429)) == 5


def read_and_hang_up(connection):
    read_request(connection)


def hang_up_unread(connection):
    connection.recv(1, socket.MSG_PEEK)


def half_an_answer(connection):
    read_request(connection)
    connection.sendall(OK[:-1])


def no_http(connection):
    read_request(connection)
    connection.sendall(b"hello\r\n\r\n")


def silence(connection):
    read_request(connection)
    time.sleep(0.5)


@pytest.mark.parametrize(
    ("serve", "outcome"),
    [
        (read_and_hang_up, Outcome.DROPPED),
        (hang_up_unread, Outcome.UNREAD),
        (half_an_answer, Outcome.CUT),
        (no_http, Outcome.CUT),
        (silence, Outcome.UNANSWERED),
    ],
)
def test_what_is_not_answered_is_told_apart(serve, outcome):
    with server(serve) as address:
        results = offer(address, at_once(1), connections=1, grace_s=0.3)
    assert [Outcome(o) for o in results.outcomes] == [outcome]
    assert results.statuses.tolist() == [0]
    assert results.failures() == results.failures(outcome) == 1
    assert results.summary()["failures"] == {outcome.name.lower(): 1}


def test_no_connection_is_a_refusal():
    results = offer(("127.0.0.1", free_port()), at_once(3), connections=1)
    assert results.failures(Outcome.REFUSED) == 3
    assert np.isnan(results.sent).all()


def test_a_request_that_meets_a_closed_connection_was_never_read():
    def answer_once(connection):
        read_request(connection)
        connection.sendall(OK)

    class SendsAfterTheClose:
        def __init__(self):
            self.outcomes = []
            self.over = asyncio.Event()

        def sent(self, request, connection):
            pass

        def free(self, connection):
            time.sleep(0.2 * len(self.outcomes))  # the close arrives meanwhile, and is not seen
            connection.send(len(self.outcomes), http_request(("127.0.0.1", 1), "/x", b"{}"))

        def ended(self, request, outcome, status, body):
            self.outcomes.append(outcome)

        def closed(self, connection):
            self.over.set()

    async def go(address):
        owner = SendsAfterTheClose()
        Connection(address, owner)
        await asyncio.wait_for(owner.over.wait(), timeout=5)
        return owner.outcomes

    with server(answer_once) as address:
        assert uvloop.run(go(address)) == [Outcome.ANSWERED, Outcome.UNREAD]


def test_a_large_request_is_sent_in_pieces():
    async def go(address):
        body = b"x" * (8 << 20)
        generator = LoadGenerator(
            target=address, payloads=[http_request(address, "/x", body)], connections=1
        )
        results = await generator.offer(at_once(2))
        generator.close()
        return results

    with server(answering()) as address:
        assert uvloop.run(go(address)).count(200) == 2


def test_stop_ends_the_plan_and_awaits_what_was_sent():
    async def go(address):
        generator = LoadGenerator(target=address, payloads=[http_request(address, "/x", b"{}")])
        offering = asyncio.create_task(generator.offer(fixed_rate(100, 60)))
        await asyncio.sleep(0.5)
        generator.stop()
        results = await offering
        generator.close()
        return results

    with server(answering(0.05)) as address:
        results = uvloop.run(go(address))
    assert 0 < len(results.planned) <= 60
    assert results.count(200) == len(results.planned)


def test_answers_are_handed_over_with_their_request():
    answers = {}
    with server(answering()) as address:
        offer(
            address,
            at_once(5),
            connections=2,
            on_answer=lambda request, status, body: answers.update({request: (status, body)}),
        )
    assert answers == dict.fromkeys(range(5), (200, b"{}"))


def test_each_answer_is_known_by_its_connection():
    async def go(address):
        generator = LoadGenerator(
            target=address,
            payloads=[http_request(address, "/x", b"{}")],
            connections=3,
            on_answer=lambda request, *_: carriers.append(generator.carrier(request)),
        )
        carriers = []
        await generator.offer(fixed_rate(100, 0.09))
        assert generator.open_connections == {*carriers}
        generator.close()
        assert generator.open_connections == frozenset()
        return carriers

    with server(answering()) as address:
        carriers = uvloop.run(go(address))
    assert [carriers.index(c) for c in carriers] == [0, 1, 2] * 3  # in turn


def test_plans():
    assert fixed_rate(4, 1).tolist() == [0, 0.25, 0.5, 0.75]
    random = poisson(1000, 10, seed=1)
    assert len(random) == 10_000
    assert (np.diff(random) >= 0).all()
    assert random[-1] == pytest.approx(10, rel=0.05)
    assert np.std(np.diff(random)) == pytest.approx(0.001, rel=0.05)  # exponential: mean = std


def test_quantiles_are_observed_values():
    values = np.arange(1, 1001, dtype=float)
    found = quantiles(values)
    assert found["p50"] in (500, 501)
    assert found["p99"] in (990, 991)
    assert found["p999"] in (999, 1000)
    assert found["max"] == 1000
    assert quantiles(values[:0]) == {}


def test_an_alarm_rings_once_and_not_early():
    async def go():
        rung = []
        alarm = Alarm(lambda: rung.append(time.perf_counter()))
        moment = time.perf_counter() + 0.0105
        alarm.set(moment - 0.005)
        alarm.set(moment)
        await asyncio.sleep(0.1)
        alarm.close()
        return [at - moment for at in rung]

    (late,) = uvloop.run(go())
    assert 0 <= late < 0.08
