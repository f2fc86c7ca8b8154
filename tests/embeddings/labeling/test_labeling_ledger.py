import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.labeling.ledger import BudgetReachedError, Ledger
from features.errors import BadInputError


def test_a_request_counts_at_its_highest_cost_until_it_is_settled(tmp_path):
    ledger = Ledger(tmp_path / "ledger", max_cost=1.0)
    ledger.reserve(0.6)
    assert (ledger.requests, ledger.cost) == (1, 0.6)
    with pytest.raises(BudgetReachedError, match=r"0\.6 is spent .* --max-cost"):
        ledger.reserve(0.6)
    ledger.settle(0.6, 0.1, input_tokens=200, output_tokens=3, unreadable=1)
    ledger.reserve(0.6)
    assert (ledger.requests, ledger.input_tokens, ledger.output_tokens) == (2, 200, 3)
    assert ledger.cost == pytest.approx(0.7)
    assert ledger.unreadable == 1


def test_the_requests_of_earlier_runs_count(tmp_path):
    first = Ledger(tmp_path / "ledger", max_requests=3)
    first.reserve(0.0, requests=2)
    first.close()
    second = Ledger(tmp_path / "ledger", max_requests=3)
    assert second.affordable(10, 0.0) == 1
    with pytest.raises(BudgetReachedError, match=r"of 3 requests, 2 are sent.*--max-requests"):
        second.reserve(0.0, requests=2)
    second.reserve(0.0)
    assert second.requests == 3
    assert Ledger(tmp_path / "ledger").affordable(10, 0.0) == 10


def test_a_killed_process_has_counted_what_it_sent(tmp_path):
    program = (
        "import os, pathlib, signal, sys\n"
        "from embeddings.labeling.ledger import Ledger\n"
        "ledger = Ledger(pathlib.Path(sys.argv[1]))\n"
        "[ledger.reserve(0.25) for _ in range(4)]\n"
        "ledger.settle(0.25, 0.0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "ledger"], check=False)
    ledger = Ledger(tmp_path / "ledger")
    assert (ledger.requests, ledger.cost) == (4, 0.75)


def test_threads_never_exceed_the_limit_together(tmp_path):
    ledgers = [Ledger(tmp_path / "ledger", max_requests=100) for _ in range(4)]

    def spend(ledger):
        for _ in range(50):
            try:
                ledger.reserve(0.0)
            except BudgetReachedError:
                return

    threads = [threading.Thread(target=spend, args=(ledger,)) for ledger in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledgers[0].requests == 100


@settings(deadline=None, max_examples=50)
@given(
    costs=st.lists(st.floats(0, 10), max_size=20),
    max_cost=st.floats(0, 30),
    max_requests=st.integers(0, 15),
)
def test_no_limit_is_ever_exceeded(costs, max_cost, max_requests):
    ledger = Ledger(max_requests=max_requests, max_cost=max_cost)
    sent = []
    for cost in costs:
        allowed = ledger.affordable(1, cost)
        try:
            ledger.reserve(cost)
        except BudgetReachedError:
            assert not allowed
        else:
            assert allowed
            sent.append(cost)
    assert ledger.requests == len(sent) <= max_requests
    assert ledger.cost == pytest.approx(sum(sent))
    assert ledger.cost <= max_cost * (1 + 1e-6)
    ledger.close()


@given(requests=st.integers(0, 10**9), cost=st.floats(0, 1e300), limit=st.floats(0, 1e300))
def test_what_is_affordable_can_be_reserved(requests, cost, limit):
    ledger = Ledger(max_cost=limit)
    allowed = ledger.affordable(requests, cost)
    assert 0 <= allowed <= requests
    ledger.reserve(allowed * cost, requests=allowed)
    ledger.close()


def test_wrong_limits_and_files_are_refused(tmp_path):
    with pytest.raises(BadInputError, match="--max-requests must be 0 or more, got -1"):
        Ledger(max_requests=-1)
    with pytest.raises(BadInputError, match="--max-cost must be 0 or more, got nan"):
        Ledger(max_cost=float("nan"))
    (tmp_path / "other").write_text("not a database, and long enough to have a header of its own")
    with pytest.raises(BadInputError, match="other: cannot be read"):
        Ledger(tmp_path / "other")
