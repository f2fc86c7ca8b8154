"""Fine-tuning jobs, against a server of the tests with the published interface."""

import json

import pytest

from embeddings.labeling import endpoint_jobs, pace
from embeddings.labeling.cli import main
from embeddings.labeling.config import read_grader_config
from embeddings.labeling.judgements import read_judgements
from embeddings.labeling.open_grader import open_grader
from tests.jobs_server import TUNED, JobsServer
from tests.tiny_labels import write_tiny_split

KEY = "sk-secret-of-the-test-1234567890"


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(pace, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(endpoint_jobs, "_FIRST_LOOK", 0.01)


@pytest.fixture
def server():
    with JobsServer() as server:
        yield server


@pytest.fixture
def fine_tune(server, tmp_path):
    """Give the command, and return its status."""
    split = write_tiny_split(tmp_path)
    grader = tmp_path / "endpoint.toml"
    settings = f'kind = "endpoint"\nmodel = "tiny"\nbase_url = "{server.url}"\n'
    grader.write_text(settings + "training_price = 2.0\nepochs = 2\n")

    def give(*more):
        return main(
            [
                "fine-tune",
                f"--split={split}",
                f"--grader={grader}",
                f"--output={tmp_path / 'tuned'}",
                *more,
            ]
        )

    return give


def test_a_job_leaves_a_grader_with_the_new_name(server, fine_tune, tmp_path, capsys):
    assert fine_tune("--yes") == 0
    config = read_grader_config(tmp_path / "tuned")
    assert (config.model, config.base_url) == (TUNED, server.url)
    assert open_grader(tmp_path / "tuned").prompt_version.startswith("relevance-1-")
    job = server.jobs["ftjob-0"]
    assert job["method"] == {
        "type": "supervised",
        "supervised": {"hyperparameters": {"n_epochs": 2}},
    }
    figures = json.loads((tmp_path / "tuned" / "metrics.json").read_text())
    judged = read_judgements(tmp_path / "split", "fine_tuning")
    assert figures["pairs"] == len(judged) == len(server.files[job["training_file"]].splitlines())
    assert figures["cost"] == pytest.approx(12_000 * 2 / 1e6)
    assert figures["estimate"]["cost"] == pytest.approx(figures["estimate"]["tokens"] * 2 * 2 / 1e6)
    told = capsys.readouterr()
    assert "job ftjob-0: running: the job is running" in told.err
    assert KEY not in told.err + told.out
    for path in (tmp_path / "tuned").rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()


def test_what_is_handed_in_has_the_standard_form(server, fine_tune, tmp_path):
    fine_tune("--yes")
    judged = read_judgements(tmp_path / "split", "validation")
    lines = server.files[server.jobs["ftjob-0"]["validation_file"]].decode().splitlines()
    names = ["irrelevant", "moderately relevant", "highly relevant"]
    for line, query, label in zip(lines, judged.pairs.queries, judged.label, strict=True):
        (messages,) = json.loads(line).values()
        assert [message["role"] for message in messages] == ["system", "user", "assistant"]
        assert query in messages[1]["content"]
        assert json.loads(messages[2]["content"]) == {"label": names[label]}


def test_nothing_starts_unasked(server, fine_tune, capsys):
    assert fine_tune() == 2
    assert "epochs of them at most, cost 0." in capsys.readouterr().err.replace("\n", " ")
    assert not server.calls
    assert fine_tune("--yes") == 0


class KilledError(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.parametrize("ends_at", range(7))
def test_a_killed_run_finds_its_job_again(server, fine_tune, monkeypatch, ends_at):
    """The process ends after some call; see `tests.jobs_server` for how work goes on."""
    send, calls = endpoint_jobs.Jobs.call, []

    def call_or_end(self, function):
        result = send(self, function)
        calls.append(result)
        if len(calls) > ends_at:
            raise KilledError
        return result

    with monkeypatch.context() as patch:
        patch.setattr(endpoint_jobs.Jobs, "call", call_or_end)
        with pytest.raises(KilledError):
            fine_tune("--yes")
    assert fine_tune("--yes") == 0
    assert len(server.jobs) == 1


def test_a_job_that_fails_says_why_and_can_be_started_again(server, fine_tune, capsys):
    server.end, server.refusal = "failed", "the file has too few examples"
    assert fine_tune("--yes") == 2
    told = capsys.readouterr().err.replace("\n", " ")
    assert "job ftjob-0 failed: the file has too few examples" in told
    server.end = ""
    assert fine_tune("--yes") == 0
    assert len(server.jobs) == 2


def test_a_wrong_key_is_said(server, fine_tune, capsys):
    server.fault = lambda _call, _number: "401"
    assert fine_tune("--yes") == 2
    assert "is OPENAI_API_KEY the right key?" in capsys.readouterr().err
