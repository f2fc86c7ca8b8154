"""Batches, against a server of the tests that hands their lines to a real chat server."""

import json
from pathlib import Path

import numpy as np
import pytest

from embeddings.labeling import endpoint_batch, endpoint_jobs, pace
from embeddings.labeling.config import EndpointConfig
from embeddings.labeling.endpoint import Endpoint
from embeddings.labeling.grades import UNGRADED, Pairs, grade_all
from embeddings.labeling.ledger import BudgetReachedError, Ledger
from features.errors import BadInputError
from tests.jobs_server import JobsServer
from tests.tiny_causal import rule_pairs

KEY = "sk-secret-of-the-test-1234567890"


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(pace, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(endpoint_jobs, "_FIRST_LOOK", 0.01)


@pytest.fixture
def server(chat_server):
    with JobsServer(chat_server) as server:
        yield server


@pytest.fixture
def open_endpoint(server, chat_server, tmp_path):
    """Open an endpoint as a new process would, with the ledger's file of the test."""

    def opened(max_requests=None, max_cost=None, **settings):
        config = EndpointConfig(
            model=chat_server.model, base_url=server.url, mode="batch", **settings
        )
        ledger = Ledger(tmp_path / "ledger", max_requests=max_requests, max_cost=max_cost)
        return Endpoint(config, Path(), ledger)

    return opened


def test_a_batch_grades_all_pairs(server, open_endpoint, capsys):
    pairs, labels = rule_pairs(8)
    endpoint = open_endpoint(input_price=1.0, output_price=1.0)
    assert endpoint.chunk_pairs == 50_000
    grades = grade_all(endpoint, pairs)
    np.testing.assert_array_equal(grades.label, labels)
    assert len(server.batches) == 1
    line = json.loads(server.files["file-0"].splitlines()[0])
    assert set(line) == {"custom_id", "method", "url", "body"}
    assert line["body"]["response_format"]["type"] == "json_schema"
    ledger = endpoint.ledger
    assert ledger.requests == 8
    assert ledger.cost == pytest.approx((ledger.input_tokens + ledger.output_tokens) / 1e6)
    assert "batch batch_0: completed, 8 of 8 answered" in capsys.readouterr().err


def test_pairs_of_the_same_words_are_asked_once(server, open_endpoint):
    pairs, labels = rule_pairs(2)
    twice = Pairs(queries=[*pairs.queries, *pairs.queries], titles=[*pairs.titles, *pairs.titles])
    endpoint = open_endpoint()
    assert grade_all(endpoint, twice).label.tolist() == [*labels, *labels]
    assert endpoint.ledger.requests == 2


def test_many_pairs_become_several_batches(server, open_endpoint, monkeypatch):
    pairs, labels = rule_pairs(10)
    monkeypatch.setattr(endpoint_batch, "BATCH_PAIRS", 4)
    np.testing.assert_array_equal(grade_all(open_endpoint(), pairs).label, labels)
    assert [batch["request_counts"]["total"] for batch in server.batches.values()] == [4, 4, 2]


def test_no_file_is_larger_than_allowed(server, open_endpoint, monkeypatch):
    pairs, labels = rule_pairs(5)
    monkeypatch.setattr(endpoint_batch, "FILE_BYTES", 4000)
    np.testing.assert_array_equal(grade_all(open_endpoint(), pairs).label, labels)
    uploaded = [server.files[batch["input_file_id"]] for batch in server.batches.values()]
    assert len(uploaded) == 3
    assert max(map(len, uploaded)) <= 4000


def test_unreadable_and_failed_lines_go_into_another_batch(server, open_endpoint):
    pairs, labels = rule_pairs(6)
    numbers = {}

    def outcome(custom_id):
        number = numbers.setdefault(custom_id.partition("-")[0], len(numbers))
        first = custom_id.endswith("-0")
        return {0: "Perhaps." if first else "", 1: "error: server_error" if first else ""}.get(
            number, ""
        ) or ("No idea." if number == 2 else "")

    server.outcome = outcome
    endpoint = open_endpoint(retries=2)
    grades = grade_all(endpoint, pairs)
    assert grades.label.tolist() == [*labels[:2], UNGRADED, *labels[3:]]
    sizes = [batch["request_counts"]["total"] for batch in server.batches.values()]
    assert sizes == [6, 3, 1]
    assert endpoint.ledger.requests == 10
    assert endpoint.counts.unreadable == 1 + 3
    assert endpoint.counts.failed == 1
    again = json.loads(server.files[server.batches["batch_1"]["input_file_id"]].splitlines()[0])
    assert "temperature" not in again["body"]


def test_a_run_that_is_given_again_pays_nothing(server, open_endpoint):
    pairs, labels = rule_pairs(6)
    first = open_endpoint(input_price=1.0)
    grade_all(first, pairs)
    again = open_endpoint(input_price=1.0)
    before = (again.ledger.requests, again.ledger.cost)
    np.testing.assert_array_equal(grade_all(again, pairs).label, labels)
    assert (again.ledger.requests, again.ledger.cost) == before
    assert len(server.batches) == 1


class KilledError(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.parametrize("call", ["POST /files", "POST /batches", "GET /batches/batch_0"])
@pytest.mark.parametrize("done", [True, False])
def test_a_killed_run_finds_its_batch_again(server, open_endpoint, monkeypatch, call, done):
    """The process ends at a call, which the server has answered by then or never received."""
    pairs, labels = rule_pairs(5)
    send = endpoint_jobs.Jobs.call

    def call_or_end(self, function):
        seen = server.calls[call]
        if not done and _about_to(call, server):
            raise KilledError
        result = send(self, function)
        if done and server.calls[call] > seen:
            raise KilledError
        return result

    with monkeypatch.context() as patch:
        patch.setattr(endpoint_jobs.Jobs, "call", call_or_end)
        with pytest.raises(KilledError):
            grade_all(open_endpoint(input_price=1.0), pairs)
    endpoint = open_endpoint(input_price=1.0)
    np.testing.assert_array_equal(grade_all(endpoint, pairs).label, labels)
    assert len(server.batches) == 1
    assert set(server.asked.values()) == {1}
    assert len(server.asked) == endpoint.ledger.requests == 5
    assert endpoint.ledger.cost == pytest.approx(endpoint.ledger.input_tokens / 1e6)


def _about_to(call, server):
    """Return whether the next call is the one, by what was called before."""
    uploaded, created = server.calls["POST /files"], server.calls["POST /batches"]
    return {
        "POST /files": not uploaded,
        "POST /batches": uploaded and not created,
        "GET /batches/batch_0": created,
    }[call]


def test_a_batch_whose_creation_was_not_confirmed_is_not_created_twice(server, open_endpoint):
    pairs, labels = rule_pairs(4)
    server.fault = lambda call, number: "lose" if (call, number) == ("POST /batches", 0) else ""
    np.testing.assert_array_equal(grade_all(open_endpoint(), pairs).label, labels)
    assert len(server.batches) == 1
    assert server.calls["GET /batches"] == 2


def test_calls_that_fail_in_passing_are_repeated(server, open_endpoint):
    pairs, labels = rule_pairs(4)
    server.fault = lambda _call, number: "500" if number == 0 else ""
    np.testing.assert_array_equal(grade_all(open_endpoint(), pairs).label, labels)
    assert len(server.batches) == 1


def test_a_batch_that_expired_brings_what_was_answered(server, open_endpoint):
    pairs, labels = rule_pairs(4)
    server.end = "expired"
    seen = []

    def outcome(custom_id):
        seen.append(custom_id)
        return "error: batch_expired" if len(seen) <= 2 else ""

    server.outcome = outcome
    np.testing.assert_array_equal(grade_all(open_endpoint(), pairs).label, labels)
    assert [b["request_counts"]["total"] for b in server.batches.values()] == [4, 2]


def test_a_refused_batch_says_why_and_can_be_handed_in_again(server, open_endpoint):
    pairs, labels = rule_pairs(3)
    server.end, server.refusal = "failed", "Enqueued token limit reached"
    with pytest.raises(BadInputError, match="refuses batch batch_0: Enqueued token limit reached"):
        grade_all(open_endpoint(input_price=1.0), pairs)
    server.end = ""
    endpoint = open_endpoint(input_price=1.0)
    assert (endpoint.ledger.requests, endpoint.ledger.cost) == (0, 0)
    np.testing.assert_array_equal(grade_all(endpoint, pairs).label, labels)


def test_what_the_server_has_forgotten_is_asked_again(server, open_endpoint):
    pairs, labels = rule_pairs(3)
    grade_all(open_endpoint(), pairs)
    del server.files[server.batches["batch_0"]["output_file_id"]]
    np.testing.assert_array_equal(grade_all(open_endpoint(), pairs).label, labels)
    assert len(server.batches) == 2
    del server.batches["batch_0"]
    np.testing.assert_array_equal(grade_all(open_endpoint(), pairs).label, labels)


def test_a_batch_of_errors_alone_says_why(server, open_endpoint):
    server.outcome = lambda _: "error: invalid_value"
    with pytest.raises(BadInputError, match="refuses batch batch_0: it does not like that"):
        grade_all(open_endpoint(), rule_pairs(3)[0])


def test_a_refused_pair_stays_ungraded(server, open_endpoint):
    pairs, _ = rule_pairs(1)
    server.outcome = lambda _: "error: content_filter"
    assert grade_all(open_endpoint(retries=1), pairs).label.tolist() == [UNGRADED]


def test_the_budget_limits_what_is_handed_in(server, open_endpoint):
    pairs, labels = rule_pairs(6)
    with pytest.raises(BudgetReachedError, match=r"4 of 6 pairs .* --max-requests"):
        grade_all(open_endpoint(max_requests=4), pairs)
    assert [b["request_counts"]["total"] for b in server.batches.values()] == [4]
    endpoint = open_endpoint(max_requests=6)
    np.testing.assert_array_equal(grade_all(endpoint, pairs).label, labels)
    assert endpoint.ledger.requests == 6


def test_the_budget_of_money_limits_what_is_handed_in(server, open_endpoint):
    pairs, _ = rule_pairs(6)
    with pytest.raises(BudgetReachedError, match=r"--max-cost"):
        # About 390 tokens a question are reserved, of which it takes 240.
        grade_all(open_endpoint(max_cost=1200e-6, input_price=1.0), pairs)
    assert [b["request_counts"]["total"] for b in server.batches.values()] == [3]


def test_the_key_is_sent_and_noted_nowhere(server, open_endpoint, tmp_path, capsys):
    grade_all(open_endpoint(), rule_pairs(2)[0])
    assert all(f"bearer {KEY}" in text.lower() for text in map(str.lower, server.headers))
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir())
    assert KEY not in capsys.readouterr().err
