"""A real service, and requests that it did not expect."""

import json
import random
import socket

import pytest
import uvloop

from experiments.load_bodies import encode, golden_requests, sized_requests
from experiments.load_fuzz import Tally, send_bodies, spoil
from experiments.load_generator import LoadGenerator, at_once
from experiments.load_malformed import KINDS
from experiments.load_schema import exercise, schema_of
from experiments.load_service import Service
from experiments.load_setting import payloads
from experiments.load_wire import WIRE_KINDS


@pytest.fixture(scope="module")
def service(tiny_exported, tmp_path_factory):
    log = tmp_path_factory.mktemp("robustness") / "service.log"
    with Service(tiny_exported, log, workers=1) as running:
        yield running


@pytest.fixture(scope="module")
def golden(tiny_exported):
    return golden_requests(tiny_exported)


def good_answer(service, golden):
    """Return the probabilities of one good request."""
    answers = []

    async def go():
        requests = sized_requests(golden, candidates=5, history=6, count=1)
        generator = LoadGenerator(
            target=service.target,
            payloads=payloads(service.target, requests),
            connections=1,
            on_answer=lambda request, status, body: answers.append((status, json.loads(body))),
        )
        await generator.offer(at_once(1))
        generator.close()

    uvloop.run(go())
    ((status, answer),) = answers
    assert status == 200
    return answer["probabilities"]


def test_malformed_requests_break_nothing(service, golden):
    workers = service.workers()
    before = good_answer(service, golden)
    tally = uvloop.run(spoil(service, golden, 1000))
    assert tally.kept == []
    assert tally.broken == 0
    assert sum(sum(counts.values()) for counts in tally.statuses.values()) == 1000
    assert {*tally.statuses} == {*KINDS, *WIRE_KINDS}
    assert service.workers() == workers
    assert service.get("/healthz")[0] == 200
    assert good_answer(service, golden) == before


@pytest.mark.parametrize(
    ("kind", "statuses"),
    [
        ("truncated", {"400"}),
        ("random_bytes", {"400"}),
        ("other_whole", {"400", "422"}),
        ("deep", {"400", "422"}),
    ],
)
def test_what_is_no_request_is_refused(service, golden, kind, statuses):
    draw = random.Random(1)
    (good,) = sized_requests(golden, candidates=3, history=4, count=1)
    bodies = [(kind, KINDS[kind](draw, json.loads(encode(good)))) for _ in range(50)]
    tally = Tally()
    uvloop.run(send_bodies(service.target, bodies, tally))
    assert {*tally.statuses[kind]} == statuses


def test_requests_made_from_the_document_get_documented_answers(service):
    base_url = f"http://{service.target[0]}:{service.target[1]}"
    run = exercise(schema_of(base_url), examples=15, base_url=base_url)
    assert run.server_errors == ()
    assert run.breaches == {}
    assert "POST /v1/rank" in run.operations
    assert run.requests >= 60
    assert run.statuses["POST /v1/rank"]["200"] > 0  # what fits the schema is answered
    assert run.statuses["POST /v1/rank"]["422"] > 0


def test_half_a_request_holds_nobody_up(service, golden):
    """Connections that hang in the middle of a request, and others that are answered meanwhile."""
    hanging = []
    for _ in range(20):
        connection = socket.create_connection(service.target)
        connection.sendall(b"POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        hanging.append(connection)
    assert good_answer(service, golden)
    for connection in hanging:
        connection.close()
    assert good_answer(service, golden)
