"""The parts of the load tests against a real service, for as short as shows that they work."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import uvloop
from tiny_export import export_tiny

from experiments.load_rates import overload, saturation
from experiments.load_serving import main
from experiments.load_setting import LoadConfig, payloads
from experiments.load_stops import stops
from experiments.load_swaps import swaps
from features.errors import BadInputError


@pytest.fixture
def config(tiny_exported, tmp_path):
    return LoadConfig(
        bundle=tiny_exported,
        output=tmp_path / "load",
        workers=1,
        candidates=5,
        history=6,
        swaps=3,
        stops=1,
    )


def failed(part):
    return {check.name: check.measured for check in part.checks if not check.passed}


def test_saturation_and_overload(config):
    with config.service("rates", options=["--queue", "4"]) as service:
        ready = payloads(service.target, config.requests())
        found = uvloop.run(saturation(service.target, ready, seconds=0.5))
        rate = found.figures["rate_per_s"]
        assert rate > 20
        steps = found.figures["steps"]
        assert steps[-1]["held"]
        assert max(step["rate"] for step in steps if step["held"]) >= rate
        assert min(step["rate"] for step in steps if not step["held"]) > rate
        beyond = uvloop.run(overload(service, ready, 2 * rate, seconds=1.0))
    assert beyond.figures["load"]["statuses"]["429"] > 0
    assert beyond.figures["load"]["failures"] == {}
    assert len(beyond.figures["service"]["worker_pids"]) == 1
    checks = {check.name: check for check in beyond.checks}
    assert checks["same worker processes"].passed


def test_swaps(config, ranker_data, random_tables, tmp_path):
    other = export_tiny(ranker_data, random_tables, tmp_path / "other", seed=1)
    part = swaps(replace(config, other=other), rate=1600.0)
    assert failed(part) == {}
    assert {found["noticed"] for found in part.figures["bad_folders"].values()} == {True}
    said = {name: found["said"] for name, found in part.figures["bad_folders"].items()}
    assert "SHA-256 differs" in said["one byte is another"]
    assert "not valid JSON" in said["half a manifest"]
    assert "golden request" in said["golden requests come out otherwise"]
    assert len(part.figures["answers_by_model"]) == 2
    assert part.figures["largest_difference"] < 1e-6


def test_swaps_need_two_models_that_differ(config):
    with pytest.raises(BadInputError, match="give --other"):
        swaps(config, 100.0)
    with pytest.raises(BadInputError, match="cannot be told from"):
        swaps(replace(config, other=config.bundle), 100.0)


def test_a_stop_loses_nothing(config):
    part = stops(config, rate=200.0)
    assert failed(part) == {}
    (stop,) = part.figures["stops"]
    assert stop["exposures"] == stop["answers"] > 0
    assert stop["sent_after_the_signal"] > 0


def test_bad_input_is_one_sentence(tiny_exported, tmp_path, capsys):
    output = str(tmp_path / "load")
    assert main(["--bundle", str(tmp_path), "--output", output]) == 2
    assert "golden.json: not the golden requests" in capsys.readouterr().err
    bundle = ["--bundle", str(tiny_exported), "--output", output]
    assert main([*bundle, "--swaps", "0"]) == 2
    assert "--swaps must be at least 1, got 0" in capsys.readouterr().err
    assert main([*bundle, "--parts", "stop"]) == 2
    assert "run the part 'saturation' first" in capsys.readouterr().err


def test_the_service_ends_with_the_command_that_started_it(tiny_exported, tmp_path):
    command = [sys.executable, "-m", "experiments.load_serving", "--bundle", str(tiny_exported)]
    command += ["--output", str(tmp_path), "--parts", "fuzz", "--workers", "1"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "logs" / "fuzz.log"
    until = time.monotonic() + 60
    while time.monotonic() < until and not (log.exists() and "starting" in log.read_text()):
        time.sleep(0.1)
    first = json.loads(log.read_text().splitlines()[0])
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "interrupted" in said
    with pytest.raises(ProcessLookupError):
        os.kill(first["process"], 0)
