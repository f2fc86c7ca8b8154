"""``label-relevance label`` against a real server, with faults in between and killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embeddings.labeling.ledger import Ledger
from tests.chat_server import FAULTS, FaultyProxy
from tests.jobs_server import JobsServer
from tests.tiny_causal import rule_pairs

PAIRS = 48
WORKERS = 4
FIRST_ID = 100
KEY = "sk-secret-of-the-test-1234567890"

# The command, which waits less.
PROGRAM = """
import sys
from embeddings.labeling import cli, endpoint_jobs, pace
pace._FIRST_WAIT, endpoint_jobs._FIRST_LOOK = 0.05, 0.2
sys.exit(cli.main())
"""


@pytest.fixture
def label(tmp_path):
    """Start the command on some pairs, in a process of its own."""
    pairs, _ = rule_pairs(PAIRS)
    ids = range(FIRST_ID, FIRST_ID + PAIRS)
    data = tmp_path / "data"
    data.mkdir()
    pq.write_table(pa.table({"product_id": ids, "title": pairs.titles}), data / "catalog.parquet")
    pq.write_table(
        pa.table({"query": pairs.queries, "product_id": ids}), tmp_path / "pairs.parquet"
    )

    def start(model, url, *, mode="chat"):
        settings = {
            "kind": "endpoint",
            "model": model,
            "base_url": url,
            "mode": mode,
            "concurrency": WORKERS,
            "timeout_seconds": 5.0,
        }
        lines = [f"{name} = {json.dumps(value)}\n" for name, value in settings.items()]
        (tmp_path / "grader.toml").write_text("".join(lines))
        arguments = [
            "label",
            f"--data={data}",
            f"--pairs={tmp_path / 'pairs.parquet'}",
            f"--grader={tmp_path / 'grader.toml'}",
            f"--output={tmp_path / 'labels'}",
            "--yes",
        ]
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            env=os.environ | {"OPENAI_API_KEY": KEY, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def kill_when(process, reached):
    while not reached():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def finish(process):
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert KEY not in told


def check_labels(folder, model):
    """Every pair has its label, once, and every row says where it is from."""
    pairs, labels = rule_pairs(PAIRS)
    rows = [
        row for part in folder.glob("part-*.parquet") for row in pq.read_table(part).to_pylist()
    ]
    found = sorted((row["product_id"], row["query"], row["label"]) for row in rows)
    ids = range(FIRST_ID, FIRST_ID + PAIRS)
    assert found == list(zip(ids, pairs.queries, labels.tolist(), strict=True))
    assert {row["source"] for row in rows} == {"llm"}
    assert {row["model"] for row in rows} == {model}
    assert all(row["prompt_version"].startswith("relevance-1-") for row in rows)
    figures = json.loads((folder / "labels.json").read_text())
    assert (figures["complete"], figures["labelled"]) == (True, PAIRS)
    for path in folder.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()


def faults(number):
    """Every fourth request fails, each time in another way; once it times out."""
    kinds = [fault for fault in FAULTS if fault != "time-out"]
    if number == 30:
        return "time-out"
    return kinds[number // 4 % len(kinds)] if number % 4 == 1 else ""


def test_every_pair_is_labelled_exactly_once(chat_server, label, tmp_path):
    with FaultyProxy(chat_server, faults, delay=0.02) as proxy:
        for answered in (10, 25):
            process = label(proxy.model, proxy.url)
            kill_when(process, lambda enough=answered: len(proxy.answered) >= enough)
        finish(label(proxy.model, proxy.url))
    check_labels(tmp_path / "labels", proxy.model)
    assert len(proxy.answered) == PAIRS
    # Twice is asked at most what was under way when the process was killed.
    counts = Counter(proxy.answered.values())
    assert set(counts) <= {1, 2, 3}
    assert sum(proxy.answered.values()) - PAIRS <= 2 * WORKERS
    ledger = Ledger(tmp_path / "labels" / "spending.sqlite")
    assert 0 <= ledger.requests - proxy.requests <= 2 * WORKERS
    figures = json.loads((tmp_path / "labels" / "labels.json").read_text())
    assert figures["spending"]["requests"] == ledger.requests
    assert figures["spending"]["unreadable"] > 0
    ledger.close()


def test_every_pair_of_a_batch_is_labelled_exactly_once(chat_server, label, tmp_path):
    with JobsServer(chat_server) as server:
        process = label(chat_server.model, server.url, mode="batch")
        kill_when(process, lambda: server.calls["GET /batches/batch_0"])
        finish(label(chat_server.model, server.url, mode="batch"))
    check_labels(tmp_path / "labels", chat_server.model)
    assert len(server.batches) == 1
    assert set(server.asked.values()) == {1}
    ledger = Ledger(tmp_path / "labels" / "spending.sqlite")
    assert ledger.requests == PAIRS
    ledger.close()
