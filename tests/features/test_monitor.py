from contextlib import closing

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from features import console
from features.monitor import Monitor


def scalars(folder):
    board = EventAccumulator(str(folder))
    board.Reload()
    return {
        tag: [(event.step, pytest.approx(event.value)) for event in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
    }


def test_a_line_for_every_tenth_of_the_run(tmp_path, capfd):
    with closing(Monitor("stage 1", 1000, "pairs", tmp_path)) as monitor:
        for step in range(1, 501):
            monitor.step(done=2 * step, seconds=step / 50, figures={"loss": 1.5})
    said = capfd.readouterr().err.splitlines()
    assert [line.partition(" pairs")[0] for line in said] == [
        f"stage 1: {done:,} of 1,000" for done in (2, *range(100, 1001, 100))
    ]
    assert said[0] == "stage 1: 2 of 1,000 pairs, 100 pairs/s, loss 1.5000, 10 s left"
    assert said[5] == "stage 1: 500 of 1,000 pairs, 100 pairs/s, loss 1.5000, 5 s left"


def test_a_resumed_run_says_where_it_is_and_not_what_was_said(tmp_path, capfd):
    with closing(Monitor("stage 2", 100, "pairs", tmp_path)) as monitor:
        monitor.step(done=55, seconds=5.5, figures={"loss": 2.0})
        monitor.step(done=100, seconds=10.0, figures={"loss": 2.0})
    assert [line.partition(" pairs")[0] for line in capfd.readouterr().err.splitlines()] == [
        "stage 2: 55 of 100",
        "stage 2: 100 of 100",
    ]


def test_scalars_are_smoothed_and_evaluations_are_not(tmp_path):
    with closing(Monitor("stage 1", 4, "pairs", tmp_path)) as monitor:
        monitor.evaluated(0, {"itm_loss": 0.75})
        monitor.step(done=2, seconds=1.0, figures={"loss": 1.0, "itc": 3.0})
        monitor.step(done=4, seconds=4.0, figures={"loss": 2.0, "itc": 3.0})
        monitor.evaluated(1, {"itm_loss": 0.5})
    assert scalars(tmp_path) == {
        "train/loss": [(2, 1.0), (4, 1.02)],  # 0.98 * 1 + 0.02 * 2
        "train/itc": [(2, 3.0), (4, 3.0)],
        "train/pairs_per_second": [(2, 2.0), (4, 1.0)],
        "evaluation/itm_loss": [(0, 0.75), (1, 0.5)],
    }


def test_a_terminal_gets_a_bar_and_no_lines(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(console, "stderr", Console(stderr=True, force_terminal=True, width=120))
    with closing(Monitor("stage 1", 10, "pairs", tmp_path)) as monitor:
        monitor.step(done=10, seconds=2.0, figures={"loss": 0.25})
    said = capfd.readouterr().err
    assert "5 pairs/s, loss 0.2500" in said
    assert "s left" not in said
