import json
import os
import subprocess
import sys

import numpy as np
import pytest

from experiments.load_checks import (
    Part,
    at_least,
    at_most,
    equals,
    print_results,
    read_results,
    write_part,
)
from experiments.load_connection import Outcome
from experiments.load_generator import Results
from experiments.load_rates import MemoryWatch, held, lost
from experiments.load_service import children, memory, processor_s
from experiments.load_stops import Stop
from features.errors import BadInputError


def results(statuses, latency_ms=1.0, outcomes=None, sent_after_ms=0.0):
    """Return results of one request each second; latencies count from the plan."""
    count = len(statuses)
    planned = np.arange(count, dtype=float)
    return Results(
        planned=planned,
        sent=planned + sent_after_ms / 1e3,
        ended=planned + np.broadcast_to(latency_ms, count) / 1e3,
        outcomes=np.array(outcomes or [Outcome.ANSWERED] * count, dtype=np.int8),
        statuses=np.array(statuses, dtype=np.int16),
        connections=1,
        processor_s=0.5,
    )


def test_a_rate_is_held_when_all_are_answered_in_time():
    assert held(results([200] * 10))
    assert not held(results([200] * 9 + [429]))
    assert not held(results([200] * 10, latency_ms=[1] * 5 + [101] * 5))
    assert held(results([200] * 1000, latency_ms=[1] * 995 + [5000] * 5))


def test_latency_counts_from_the_plan_or_from_the_send():
    found = results([200, 429, 200], latency_ms=[10, 20, 30], sent_after_ms=4)
    assert found.latency_ms(200).tolist() == pytest.approx([10, 30])
    assert found.latency_ms(429, since="sent").tolist() == pytest.approx([16])
    summary = found.summary()
    assert summary["latency_from_plan_ms"]["200"]["max"] == pytest.approx(30)
    assert summary["latency_from_send_ms"]["200"]["max"] == pytest.approx(26)
    assert summary["sent_after_plan_ms"]["p50"] == pytest.approx(4)
    assert summary["answered_200_per_s"] == pytest.approx(2 / 2.03)
    assert summary["generator_share_of_a_core"] == pytest.approx(0.5 / 2.03)


def test_only_what_the_service_had_read_is_lost():
    outcomes = [*Outcome]
    assert lost(results([0] * 6, outcomes=outcomes)) == 3  # dropped, cut, unanswered
    assert results([0] * 6, outcomes=outcomes).failures() == 5


def test_a_stop_compares_answers_with_the_exposure_log():
    stop = Stop(
        results=results([200, 200, 503, 0], outcomes=[0, 0, 0, Outcome.REFUSED]),
        stopped_at=1.5,
        exited_at=2.5,
        exit_status=0,
        answered=("a", "b"),
    )
    found = stop.figures(["a", "c"])
    assert found["sent_after_the_signal"] == 2
    assert found["never_connected"] == 1
    assert found["lost"] == found["answers_5xx_but_503"] == 0
    assert found["seconds_to_exit"] == 1
    assert (found["answers"], found["exposures"], found["answers_without_exposure"]) == (2, 2, 1)


def test_growth_is_that_after_the_first_fifth():
    mib = 1 << 20
    watch = MemoryWatch(pids=())
    watch.seconds = [float(second) for second in range(10)]
    watch.own = watch.resident = [
        size * mib for size in (50, 80, 100, 100, 100, 100, 100, 100, 110, 110)
    ]
    assert watch.growth() == pytest.approx(0.1)
    course = watch.figures()["resident_mib"]
    assert (course["start"], course["peak"], course["end"]) == (50, 110, 110)
    watch.own = watch.resident = [(100 + second) * mib for second in range(10)]
    assert watch.figures()["resident_mib"]["slope_per_min"] == pytest.approx(60)


def test_a_process_is_measured():
    child = subprocess.Popen(
        [sys.executable, "-c", "x = bytearray(50 << 20); print('up', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout.read(2) == b"up"
    assert child.pid in children(os.getpid())
    resident, own = memory(child.pid)
    assert 50 << 20 <= own <= resident < 500 << 20
    assert 0 < processor_s(child.pid) < 60
    child.communicate(b"\n")
    assert child.pid not in children(os.getpid())
    assert memory(child.pid) == (0, 0)
    assert processor_s(child.pid) == 0


def test_checks():
    assert at_most("p99", 10.0, 10).passed
    assert not at_most("p99", 10.1, 10).passed
    assert not at_most("p99", float("nan"), 10).passed
    assert not at_least("rate", float("nan"), 1).passed
    assert equals("exits", [0], [0]).passed


def test_parts_are_kept_beside_those_of_earlier_runs(tmp_path, capsys):
    write_part(tmp_path, "half", Part(checks=(at_most("p99", 12.0, 10),), figures={"rate": 5}))
    write_part(tmp_path, "stop", Part(checks=(equals("lost", 0, 0),), figures={}))
    write_part(tmp_path, "half", Part(checks=(at_most("p99", 9.0, 10),), figures={"rate": 6}))
    parts = read_results(tmp_path)["parts"]
    assert [*parts] == ["half", "stop"]
    assert parts["half"]["passed"]
    assert parts["half"]["rate"] == 6
    assert parts["half"]["checks"] == [
        {"name": "p99", "measured": 9.0, "asked": "at most 10", "passed": True}
    ]
    print_results(tmp_path)
    shown = capsys.readouterr().out
    assert "at most 10" in shown
    assert "FAILED" not in shown
    (tmp_path / "load.json").write_text(json.dumps([]))
    with pytest.raises(BadInputError, match="not a result of this command"):
        read_results(tmp_path)
