import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embeddings.labeling import pace
from embeddings.labeling.config import EndpointConfig
from embeddings.labeling.endpoint import Endpoint
from embeddings.labeling.endpoint_requests import read_completion
from embeddings.labeling.grades import UNGRADED, Pairs, grade_all
from embeddings.labeling.ledger import BudgetReachedError, Ledger
from features.errors import BadInputError
from tests.chat_server import FAULTS, FaultyProxy, completion, free_port, refusal
from tests.tiny_causal import rule_pairs

KEY = "sk-secret-of-the-test-1234567890"


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(pace, "_FIRST_WAIT", 0.02)


def open_endpoint(proxy, ledger=None, **settings):
    settings = {"base_url": proxy.url, "timeout_seconds": 60.0} | settings
    return Endpoint(EndpointConfig(model=proxy.model, **settings), Path(), ledger)


def listen(endpoint, pairs, into):
    for grades in endpoint.grade(pairs):
        into |= dict(zip(grades.position, grades.label, strict=True))


def always(fault, *, first=0):
    return lambda number: fault if number >= first else ""


def test_a_real_server_is_asked_once_a_pair(chat_server):
    pairs, labels = rule_pairs(30)
    ledger = Ledger()
    with FaultyProxy(chat_server, delay=0.02) as proxy:
        endpoint = open_endpoint(proxy, ledger, concurrency=3, input_price=1.0)
        grades = grade_all(endpoint, pairs)
    np.testing.assert_array_equal(grades.label, labels)
    assert np.isnan(grades.probability).all()
    assert proxy.requests == ledger.requests == endpoint.counts.answered == 30
    assert proxy.most_at_once == 3
    # 233 tokens or so a prompt, two or three an answer.
    assert 30 * 200 < ledger.input_tokens < 30 * 300
    assert 30 * 2 <= ledger.output_tokens <= 30 * 4
    assert ledger.cost == pytest.approx(ledger.input_tokens / 1e6)
    asked = proxy.bodies[0]
    assert asked["temperature"] == 0
    assert asked["max_completion_tokens"] == 32
    assert asked["response_format"]["json_schema"]["schema"]["required"] == ["label"]
    assert f"authorization: bearer {KEY}" in proxy.headers[0].lower()


@pytest.mark.parametrize("fault", FAULTS)
def test_every_pair_is_labelled_once_whatever_fails(chat_server, fault):
    pairs, labels = rule_pairs(12)
    ledger = Ledger()
    faults = {1, 4, 5}
    timeout = 1.0 if fault == "time-out" else 60.0
    with FaultyProxy(chat_server, lambda number: fault if number in faults else "") as proxy:
        endpoint = open_endpoint(
            proxy, ledger, concurrency=2, timeout_seconds=timeout, constraint="none"
        )
        given = [(g.position, g.label) for g in endpoint.grade(pairs)]
    position = np.concatenate([p for p, _ in given])
    assert sorted(position) == list(range(12))
    label = np.concatenate([label for _, label in given])
    np.testing.assert_array_equal(label[np.argsort(position)], labels)
    assert len(proxy.answered) == 12
    assert "response_format" not in proxy.bodies[0]
    if fault == "time-out":  # of a busy machine's real answers, too
        return
    assert proxy.requests == ledger.requests == 15
    assert set(proxy.answered.values()) == {1}
    unreadable = fault in ("wrong answer", "cut answer")
    assert endpoint.counts.unreadable == (3 if unreadable else 0)
    assert endpoint.counts.failed == (0 if unreadable else 3)


def test_a_question_that_got_no_label_is_asked_again_without_the_temperature(chat_server):
    pairs, labels = rule_pairs(1)
    with FaultyProxy(chat_server, lambda number: "wrong answer" if number == 0 else "") as proxy:
        assert grade_all(open_endpoint(proxy), pairs).label == labels
    first, second = proxy.bodies
    assert first.pop("temperature") == 0
    assert second == first


def test_what_is_never_readable_stays_ungraded(chat_server):
    pairs, labels = rule_pairs(4)
    ledger = Ledger(max_requests=100)
    with FaultyProxy(chat_server, always("wrong answer", first=2)) as proxy:
        endpoint = open_endpoint(proxy, ledger, concurrency=1, retries=2)
        grades = grade_all(endpoint, pairs)
    assert grades.label.tolist() == [*labels[:2], UNGRADED, UNGRADED]
    assert np.isnan(grades.probability).all()
    assert ledger.requests == 2 + 2 * 3
    assert (endpoint.counts.unreadable, endpoint.counts.ungraded) == (6, 2)
    assert ledger.unreadable == 6


def test_a_model_that_never_states_a_label_is_stopped(chat_server):
    pairs, _ = rule_pairs(150)
    refusals = {"talk": completion("It depends.")}
    with FaultyProxy(chat_server, always("talk"), refusals=refusals) as proxy:
        endpoint = open_endpoint(proxy, retries=0)
        with pytest.raises(
            BadInputError, match="model' states a label, in 100 pairs; the last: 'It dep"
        ):
            grade_all(endpoint, pairs)
    assert proxy.requests < 115


def test_a_pair_that_alone_fails_does_not_stop_the_others(chat_server):
    pairs, labels = rule_pairs(40)
    queries, titles = list(pairs.queries), list(pairs.titles)
    queries[5] = "poison"
    with FaultyProxy(chat_server, delay=0.02) as proxy:
        proxy.fault_of_body = lambda body: "500" if b"poison" in body else ""
        endpoint = open_endpoint(proxy, concurrency=4)
        grades = grade_all(endpoint, Pairs(queries=queries, titles=titles))
    expected = labels.tolist()
    expected[5] = UNGRADED
    assert grades.label.tolist() == expected
    assert endpoint.counts.failed == 1 + endpoint.config.retries


def test_a_pair_that_is_refused_does_not_stop_the_others(chat_server):
    pairs, labels = rule_pairs(3)
    refusals = {"filter": refusal(400, "filtered", code="content_filter")}
    with FaultyProxy(
        chat_server, lambda number: "filter" if number == 1 else "", refusals=refusals
    ) as proxy:
        grades = grade_all(open_endpoint(proxy, concurrency=1), pairs)
    assert grades.label.tolist() == [labels[0], UNGRADED, labels[2]]
    assert proxy.requests == 3


@pytest.mark.parametrize("fault", ["500", "429", "reset"])
def test_an_endpoint_that_gives_no_answers_ends_the_run(chat_server, fault):
    pairs, _ = rule_pairs(20)
    ledger = Ledger()
    with FaultyProxy(chat_server, always(fault, first=6)) as proxy:
        endpoint = open_endpoint(proxy, ledger, concurrency=2, retries=2)
        with pytest.raises(BadInputError, match=f"^{proxy.url} (gives no answer|refuses)"):
            grade_all(endpoint, pairs)
    assert 8 <= ledger.requests <= 16


def test_what_was_answered_before_the_end_is_yielded(chat_server):
    pairs, labels = rule_pairs(20)
    refusals = {"401": refusal(401, f"Incorrect API key provided: {KEY}")}
    seen = {}
    with FaultyProxy(chat_server, always("401", first=7), refusals=refusals) as proxy:
        endpoint = open_endpoint(proxy, concurrency=3)
        with pytest.raises(BadInputError) as refused:
            listen(endpoint, pairs, seen)
    assert len(seen) == 7
    assert all(labels[position] == label for position, label in seen.items())
    assert proxy.requests <= 10
    assert KEY not in str(refused.value)
    assert refused.value.__cause__ is None
    assert str(refused.value).startswith(
        f"{proxy.url} refuses with status 401: Incorrect API key provided: ***"
    )
    assert str(refused.value).endswith("; is OPENAI_API_KEY the right key?")


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (400, "invalid_value", "status 400: .*no such setting"),
        (403, "", "status 403: .*may not do this"),
        (404, "model_not_found", "status 404: .*does it know the model '.*model'"),
        (422, "", "status 422"),
        (429, "insufficient_quota", "status 429: .*no such setting"),
    ],
)
def test_a_refusal_ends_the_run_at_once(chat_server, status, code, says):
    pairs, _ = rule_pairs(20)
    refusals = {"no": refusal(status, "no such setting", code=code)}
    with (
        FaultyProxy(chat_server, always("no"), refusals=refusals) as proxy,
        pytest.raises(BadInputError, match=says),
    ):
        grade_all(open_endpoint(proxy, concurrency=2), pairs)
    assert proxy.requests <= 2


def test_a_server_that_cannot_be_reached_ends_the_run():
    pairs, _ = rule_pairs(3)
    url = f"http://127.0.0.1:{free_port()}/v1"
    endpoint = Endpoint(EndpointConfig(model="tiny", base_url=url, retries=1), Path())
    with pytest.raises(BadInputError, match=f"^{url} gives no answer: Connection error"):
        grade_all(endpoint, pairs)


def test_too_long_a_wait_ends_the_run(chat_server):
    refusals = {"tomorrow": refusal(429, "daily limit", retry_after="40000")}
    with (
        FaultyProxy(chat_server, always("tomorrow"), refusals=refusals) as proxy,
        pytest.raises(BadInputError, match=r"asks to wait for 40,000 s: .*daily limit"),
    ):
        grade_all(open_endpoint(proxy), rule_pairs(3)[0])


def test_the_budget_of_requests_stops_after_all_answers(chat_server):
    pairs, _ = rule_pairs(20)
    ledger = Ledger(max_requests=8)
    seen = {}
    with FaultyProxy(chat_server, lambda number: "500" if number == 2 else "") as proxy:
        endpoint = open_endpoint(proxy, ledger, concurrency=3)
        with pytest.raises(BudgetReachedError, match=r"7 of 20 pairs .* --max-requests"):
            listen(endpoint, pairs, seen)
    assert proxy.requests == ledger.requests == 8
    assert len(seen) == len(proxy.answered) == 7


def test_the_budget_of_money_is_not_exceeded(chat_server):
    pairs, _ = rule_pairs(20)
    one = 240e-6  # about, at one unit a million tokens
    ledger = Ledger(max_cost=5 * one)
    with FaultyProxy(chat_server) as proxy:
        endpoint = open_endpoint(proxy, ledger, input_price=1.0, output_price=1.0)
        with pytest.raises(BudgetReachedError, match=r"budget of 0\.0012, .* --max-cost"):
            grade_all(endpoint, pairs)
    assert 0 < ledger.cost <= 5 * one
    assert proxy.requests in (3, 4, 5)
    assert ledger.cost == pytest.approx((ledger.input_tokens + ledger.output_tokens) / 1e6)


def test_the_limit_of_requests_a_minute_is_kept(chat_server):
    pairs, _ = rule_pairs(16)
    with FaultyProxy(chat_server) as proxy:
        grade_all(open_endpoint(proxy, requests_per_minute=600.0), pairs)
    # 10 a second, and as many at once: the last of 16 goes 0.6 s after the first.
    assert proxy.times[-1] - proxy.times[0] >= 0.3


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_loses_no_answer(chat_server, kind):
    """As Ctrl-C does, and SIGTERM where a command has it do the same."""
    pairs, labels = rule_pairs(40)
    seen = {}

    def interrupt(number):
        if number == 9:
            os.kill(os.getpid(), kind)
        return ""

    before = signal.signal(kind, signal.default_int_handler)  # SIGINT may be ignored
    try:
        with FaultyProxy(chat_server, interrupt, delay=0.1) as proxy:
            endpoint = open_endpoint(proxy, concurrency=4)
            with pytest.raises(KeyboardInterrupt):
                listen(endpoint, pairs, seen)
            time.sleep(0.2)
    finally:
        signal.signal(kind, before)
    assert len(proxy.answered) == proxy.requests < 20
    # SIGTERM may strike within the handling of one answer.
    assert len(proxy.answered) - len(seen) in ((0,) if kind == signal.SIGINT else (0, 1))
    assert all(labels[position] == label for position, label in seen.items())


def test_a_caller_may_stop_listening(chat_server):
    pairs, _ = rule_pairs(40)
    with FaultyProxy(chat_server, delay=0.05) as proxy:
        grades = open_endpoint(proxy, concurrency=2).grade(pairs)
        next(grades)
        grades.close()
        assert proxy.requests <= 6


def test_logged_probabilities_become_that_of_the_label():
    def told(tokens):
        text = "".join(token for token, _ in tokens)
        content = [{"token": t, "logprob": float(np.log(p))} for t, p in tokens]
        message = {"role": "assistant", "content": text}
        choice = {"message": message, "logprobs": {"content": content}, "finish_reason": "stop"}
        return read_completion({"choices": [choice], "usage": {"prompt_tokens": 7}})

    plain = told([("highly", 0.8), (" relevant", 0.5)])
    assert (plain.label, plain.probability) == (2, pytest.approx(0.4))
    assert (plain.input_tokens, plain.output_tokens) == (7, None)
    wrapped = told([('{"label"', 0.1), (': "irr', 0.5), ("elevant", 0.9), ('"}', 0.1)])
    assert (wrapped.label, wrapped.probability) == (0, pytest.approx(0.45))
    assert np.isnan(told([("perhaps", 0.8)]).probability)


def test_the_probability_stands_at_the_answered_label(chat_server):
    """The server tells no probabilities: the proxy adds them."""
    pairs, labels = rule_pairs(4)
    with FaultyProxy(chat_server) as proxy:
        proxy.change = lambda answer: _with_logprobs(answer, [-0.1, -0.2])
        grades = grade_all(open_endpoint(proxy, logprobs=True), pairs)
    assert proxy.bodies[0]["logprobs"] is True
    rows = np.arange(4)
    np.testing.assert_allclose(grades.probability[rows, labels], np.exp(-0.3), rtol=1e-6)
    assert np.isnan(grades.probability).sum() == 8


def _with_logprobs(answer, logprobs):
    choice = answer["choices"][0]
    text = choice["message"]["content"]
    halves = [text[:3], text[3:]]
    content = [{"token": t, "logprob": p} for t, p in zip(halves, logprobs, strict=True)]
    choice["logprobs"] = {"content": content}
    return answer


def test_the_address_and_the_key_come_from_the_environment(chat_server, monkeypatch):
    pairs, labels = rule_pairs(2)
    with FaultyProxy(chat_server) as proxy:
        monkeypatch.setenv("OPENAI_BASE_URL", proxy.url)
        assert grade_all(open_endpoint(proxy, base_url=""), pairs).label.tolist() == labels.tolist()
        monkeypatch.delenv("OPENAI_API_KEY")  # a server of one's own may ask for none
        assert grade_all(open_endpoint(proxy, base_url=""), pairs).label.tolist() == labels.tolist()
    monkeypatch.delenv("OPENAI_BASE_URL")
    with pytest.raises(BadInputError, match="set the environment variable OPENAI_API_KEY"):
        grade_all(open_endpoint(proxy, base_url=""), pairs)


def test_the_key_is_in_no_file_and_no_log(chat_server, tmp_path, caplog):
    ledger = Ledger(tmp_path / "ledger")
    caplog.set_level("DEBUG")
    with FaultyProxy(chat_server, lambda number: "500" if number == 1 else "") as proxy:
        grade_all(open_endpoint(proxy, ledger), rule_pairs(3)[0])
    assert "openai" in {record.name.split(".")[0] for record in caplog.records}
    assert KEY not in caplog.text
    assert KEY not in " ".join(str(record.__dict__) for record in caplog.records)
    for path in tmp_path.iterdir():
        assert KEY.encode() not in path.read_bytes()
    ledger.close()


def test_a_missing_package_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    endpoint = Endpoint(EndpointConfig(model="tiny"), Path())
    with pytest.raises(BadInputError, match=r"pip install 'dashclip-ranker\[labeling\]'"):
        grade_all(endpoint, rule_pairs(1)[0])


def test_the_fingerprint_follows_what_decides_an_answer():
    config = EndpointConfig(model="one", base_url="http://a/v1")
    fingerprint = Endpoint(config, Path()).fingerprint
    same = replace(config, concurrency=2, timeout_seconds=1.0, mode="batch", input_price=3.0)
    assert Endpoint(same, Path()).fingerprint == fingerprint
    for change in ({"model": "two"}, {"base_url": "http://b/v1"}, {"constraint": "none"}):
        assert Endpoint(replace(config, **change), Path()).fingerprint != fingerprint


def test_the_estimate_is_on_the_high_side(chat_server):
    pairs, _ = rule_pairs(20)
    ledger = Ledger()
    with FaultyProxy(chat_server) as proxy:
        endpoint = open_endpoint(proxy, ledger, input_price=2.0, output_price=8.0)
        usage = endpoint.estimate(pairs)
        grade_all(endpoint, pairs)
    assert usage.requests == 20
    assert ledger.input_tokens <= usage.input_tokens <= 3 * ledger.input_tokens
    assert usage.output_tokens == 20 * 32
    assert usage.cost == pytest.approx((2 * usage.input_tokens + 8 * 640) / 1e6)
    assert usage.seconds == 20 / 8
    slow = open_endpoint(proxy, requests_per_minute=60.0)
    assert slow.estimate(pairs).seconds == 20
