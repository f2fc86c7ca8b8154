import json
import re
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from serving.exposure_log import ExposureLog, now

ROOT = Path(__file__).parents[2]


def exposure(number, candidates=3, **changes):
    return {
        "request_id": f"request-{number}",
        "time": now(),
        "user_id": number % 7,
        "bucket": "control",
        "model": "f" * 64,
        "candidates": list(range(candidates)),
        "probabilities": [1 / (place + 2) for place in range(candidates)],
    } | changes


def lines(folder):
    files = sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_what_was_written_is_there_after_close(tmp_path):
    with ExposureLog(tmp_path / "log") as log:
        for number in range(1000):
            log.write(exposure(number))
    found = lines(tmp_path / "log")
    assert [line["request_id"] for line in found] == [f"request-{n}" for n in range(1000)]
    assert found[8] == exposure(8) | {
        "time": found[8]["time"],
        "probabilities": [0.5, 0.3333333, 0.25],  # 7 decimals
    }
    assert (log.written, log.dropped, log.last_error) == (1000, 0, None)


def test_a_line_is_there_soon_without_a_close(tmp_path):
    log = ExposureLog(tmp_path)
    log.write(exposure(0))
    deadline = time.monotonic() + 10
    while log.written == 0 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert [line["request_id"] for line in lines(tmp_path)] == ["request-0"]
    log.close()
    log.close()  # nothing happens


def test_arrays_are_written_as_lists(tmp_path):
    with ExposureLog(tmp_path) as log:
        arrays = {"candidates": np.array([2**53 + 1, 7]), "probabilities": np.float32([0.7, 0.1])}
        log.write(exposure(0) | arrays)
    (line,) = lines(tmp_path)
    assert line["candidates"] == [2**53 + 1, 7]
    assert line["probabilities"] == [0.7, 0.1]


def test_a_full_file_is_followed_by_another(tmp_path):
    with ExposureLog(tmp_path, rotate_bytes=2000) as log:
        for number in range(50):
            log.write(exposure(number))
            while log.written <= number:  # one at a time, so that sizes are known
                time.sleep(0.0005)
    files = sorted(tmp_path.iterdir())
    sizes = [file.stat().st_size for file in files]
    longest = max(len(line) + 1 for file in files for line in file.read_text().splitlines())
    assert len(files) > 3
    assert all(2000 <= size < 2000 + longest for size in sizes[:-1])
    stem = re.fullmatch(r"(exposures-\d{8}T\d{6}Z-[0-9a-f]{8})-0001\.jsonl", files[0].name)[1]
    assert [f.name for f in files] == [f"{stem}-{n + 1:04d}.jsonl" for n in range(len(files))]
    assert [line["request_id"] for line in lines(tmp_path)] == [f"request-{n}" for n in range(50)]


def test_no_exposure_makes_no_file(tmp_path):
    ExposureLog(tmp_path / "log").close()
    assert list((tmp_path / "log").iterdir()) == []


def test_many_threads_lose_nothing(tmp_path):
    def write(first):
        for number in range(first, first + 500):
            log.write(exposure(number))

    with ExposureLog(tmp_path, rotate_bytes=50_000) as log:
        threads = [threading.Thread(target=write, args=(500 * n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    numbers = {int(line["request_id"].removeprefix("request-")) for line in lines(tmp_path)}
    assert numbers == set(range(2000))
    assert len(lines(tmp_path)) == log.written == 2000


def test_two_logs_of_a_folder_write_files_of_their_own(tmp_path):
    with ExposureLog(tmp_path) as first, ExposureLog(tmp_path) as second:
        first.write(exposure(1))
        second.write(exposure(2))
    assert len(list(tmp_path.iterdir())) == 2
    assert {line["request_id"] for line in lines(tmp_path)} == {"request-1", "request-2"}


def test_more_than_may_wait_is_dropped_and_counted(tmp_path):
    with ExposureLog(tmp_path, capacity=100) as log:
        log.write(exposure(0, candidates=100))  # 101 with itself
        log.write(exposure(1, candidates=99))
    assert [line["request_id"] for line in lines(tmp_path)] == ["request-1"]
    assert (log.written, log.dropped) == (1, 1)


def test_a_flood_is_bounded_and_every_exposure_is_accounted_for(tmp_path):
    with ExposureLog(tmp_path, capacity=5000) as log:
        for number in range(20_000):
            log.write(exposure(number, candidates=200))
    assert log.dropped > 0
    assert log.written + log.dropped == 20_000
    assert len(lines(tmp_path)) == log.written


def test_a_closed_log_drops(tmp_path):
    log = ExposureLog(tmp_path)
    log.close()
    log.write(exposure(0))
    assert (log.written, log.dropped) == (0, 1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"probabilities": [0.5, float("nan"), 0.1]}, "not JSON compliant"),
        ({"probabilities": [0.5]}, "3 candidates and 1 probabilities"),
        ({"user_id": object()}, "not JSON serializable"),
    ],
)
def test_an_exposure_that_cannot_be_written_leaves_the_others_alone(tmp_path, change, sentence):
    with ExposureLog(tmp_path) as log:
        log.write(exposure(0))
        log.write(exposure(1) | change)
        log.write(exposure(2))
    assert [line["request_id"] for line in lines(tmp_path)] == ["request-0", "request-2"]
    assert (log.written, log.dropped) == (2, 1)
    assert log.last_error.startswith("exposure 'request-1': ")
    assert sentence in log.last_error


def test_the_log_goes_on_once_its_folder_is_there_again(tmp_path):
    folder = tmp_path / "log"
    log = ExposureLog(folder)
    folder.rmdir()
    folder.write_text("in the way")
    log.write(exposure(0))
    deadline = time.monotonic() + 10
    while log.dropped == 0 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert "File exists" in log.last_error
    folder.unlink()
    log.write(exposure(1))
    log.close()
    assert [line["request_id"] for line in lines(folder)] == ["request-1"]
    assert (log.written, log.dropped) == (1, 1)


def test_a_write_that_the_system_cuts_short_leaves_no_torn_line(tmp_path):
    # The limit on file sizes stops a write in its middle, as a full disk does.
    program = """
        import resource, sys, time
        from pathlib import Path
        from serving.exposure_log import ExposureLog

        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        log = ExposureLog(Path(sys.argv[1]))
        for number in range(40):
            log.write({"request_id": f"request-{number}", "time": "2024-08-01T09:00:00+00:00",
                       "user_id": 1, "bucket": None, "model": "m",
                       "candidates": [1, 2], "probabilities": [.5, .25]})
            while log.written + log.dropped <= number:
                time.sleep(.0005)
        log.close()
        print(log.written, log.dropped, log.last_error)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    written, dropped, error = done.stdout.split(maxsplit=2)
    assert int(written) + int(dropped) == 40
    assert int(dropped) >= 2
    assert "File too large" in error
    found = lines(tmp_path)
    assert len(found) == int(written) > 20
    assert all(file.read_text().endswith("\n") for file in tmp_path.iterdir())
