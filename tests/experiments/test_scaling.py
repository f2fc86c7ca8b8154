"""The figures of scale: small runs of each part, speed over time, and the document."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments import (
    scaling,
    scaling_history,
    scaling_interrupted,
    scaling_large,
    scaling_step,
    scaling_tables,
    scaling_training,
)
from experiments.load_checks import Part, at_least
from experiments.scaling_rates import Mark, rates
from experiments.scaling_results import (
    ScalingConfig,
    figure,
    read_results,
    run_python,
    write_part,
)
from experiments.scaling_step import CANDIDATES, make_ranker, make_records, one_candidate_each
from features.batch import RequestBatch
from features.errors import BadInputError


def options(**changes: object) -> scaling_step.Options:
    chosen = {
        "what": "step",
        "products": 5_000,
        "dimension": 8,
        "history": 7,
        "tables": "frozen",
        "rows": 60_000,  # 15 steps, of which 10 warm up
        "threads": 1,
    }
    return scaling_step.Options(**chosen | changes)


def config(output: Path) -> ScalingConfig:
    return ScalingConfig(output=output, impressions=200_000, seed=0, data=output, threads=1)


def marks(*pairs: tuple[float, int]) -> list[Mark]:
    return [Mark(seconds=seconds, rows=rows) for seconds, rows in pairs]


def test_rates_of_parts_by_hand() -> None:
    # 100 rows in 10 s, 100 in 20, 100 in 5, 100 in 5.
    stretch = marks((0, 0), (10, 100), (30, 200), (35, 300), (40, 400))
    assert rates([stretch], parts=4) == [10, 5, 20, 20]
    assert rates([stretch], parts=2) == [pytest.approx(200 / 30), 20]
    assert rates([stretch], parts=1) == [10]


def test_time_between_two_runs_does_not_count() -> None:
    before, after = marks((0, 0), (10, 100)), marks((1000, 100), (1010, 200))
    assert rates([before, after], parts=2) == [10, 10]


def test_no_marks_have_no_rates() -> None:
    assert rates([]) == rates([marks((5, 100))]) == []


@pytest.mark.parametrize("tables", ["frozen", "fine-tuned"])
def test_a_step_is_timed(tables: str) -> None:
    found = scaling_step.train_steps(options(tables=tables))
    assert found["rows_per_second"] > 1_000
    assert found["table_bytes"] == 5_001 * 8 * (2 if tables == "frozen" else 4)


def test_records_are_of_the_size_asked_for() -> None:
    records = make_records(options(rows=2_400, history=3))
    assert len(records) == 100
    assert {len(ids) for ids in records["product_id"].to_pylist()} == {CANDIDATES}
    assert {len(ids) for ids in records["purchase_history"].to_pylist()} == {3}


def test_one_candidate_each_gives_the_same_scores() -> None:
    records = make_records(options(rows=480))
    ranker = make_ranker(options(), records)
    batch = ranker.encode(RequestBatch.from_records(records, scaling_step.schema()))
    each = one_candidate_each(batch)
    assert each.candidate_offsets.tolist() == list(range(481))
    assert (
        each.history.tolist() == batch.history.view(20, 1, 7).expand(20, 24, 7).flatten().tolist()
    )
    torch.testing.assert_close(ranker(each), ranker(batch), rtol=1e-4, atol=1e-5)


def test_pooling_once_a_request_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling_step, "_POOL_ROWS", 4_096)
    found = scaling_step.pool_histories(options(what="pooling", history=100))
    assert found["candidate_pooling"] > 2 * found["request_pooling"] > 0
    assert found["candidate_forward"] > found["request_forward"] > 0


def test_a_child_reports_its_text_and_its_memory() -> None:
    small = run_python(["-c", "print('done')"])
    large = run_python(["-c", "held = bytearray(300_000_000); print('done')"])
    assert small.text == large.text == "done\n"
    assert small.peak_bytes < 50e6
    assert 280e6 < large.peak_bytes - small.peak_bytes < 320e6
    with pytest.raises(BadInputError, match="ended with status 3"):
        run_python(["-c", "import sys; sys.exit(3)"])


def test_parts_are_kept_side_by_side(tmp_path: Path) -> None:
    write_part(tmp_path, "one", Part(checks=(at_least("speed", 1.0, 2.0),), figures={"rows": 5}))
    write_part(tmp_path, "two", Part(checks=(figure("rows", 7),), figures={}))
    found = read_results(tmp_path)["parts"]
    assert (found["one"]["passed"], found["one"]["rows"], found["two"]["passed"]) == (
        False,
        5,
        True,
    )


@pytest.mark.parametrize("content", ["[]", "{"])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "scaling.json").write_text(content)
    with pytest.raises(BadInputError, match=r"scaling\.json"):
        read_results(tmp_path)


def test_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the part's own process, with one small table and few rows."""
    monkeypatch.setattr(scaling_tables, "SIZES", (1_000,))
    monkeypatch.setattr(scaling_tables, "_MODES", ("frozen",))
    monkeypatch.setattr(scaling_tables, "_ROUNDS", 1)
    monkeypatch.setattr(scaling_tables, "_ROWS", 50_000)
    part = scaling_tables.measure(config(tmp_path))
    assert [check.passed for check in part.checks] == [True, True]  # 1 times itself, and memory
    assert part.figures["frozen"]["1000"]["rounds"][0]["table_bytes"] == 1_001 * 32 * 2


def test_histories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(what: str, length: int, threads: int) -> dict[str, float]:
        measure = scaling_step.train_steps if what == "step" else scaling_step.pool_histories
        return measure(options(what=what, history=length, threads=threads))

    monkeypatch.setattr(scaling_step, "_POOL_ROWS", 4_096)
    monkeypatch.setattr(scaling_history, "_run", run)
    monkeypatch.setattr(scaling_history, "_ROUNDS", 1)
    monkeypatch.setattr(scaling_history, "LENGTHS", (10, 100))
    part = scaling_history.measure(config(tmp_path))
    assert len(part.checks) == 8
    found = part.figures["100"]
    assert found["pooling_saves"] == found["candidate_pooling"] / found["request_pooling"] > 1


def test_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated, built and trained end to end, and not again when asked again."""
    monkeypatch.setattr(scaling, "_LEAST_IMPRESSIONS", 60_000)
    monkeypatch.setattr(scaling_large, "_FEWEST", 60_000)
    arguments = ["--output", str(tmp_path), "--parts", "large", "--impressions", "60000"]
    arguments += ["--seed", "3", "--threads", "1"]
    assert scaling.main(arguments) == 1  # too few rows for .002 AUC
    part = json.loads((tmp_path / "scaling.json").read_text())["parts"]["large"]
    assert set(part["sizes"]) == {"60000"}
    largest = part["sizes"]["60000"]
    assert set(largest["stages"]) == {"generate", "features", "train"}
    assert 0 < largest["auc_short"] < 0.3
    assert len(largest["features_over_time"]) in (9, 10)
    failed = [check["name"] for check in part["checks"] if not check["passed"]]
    assert "60,000 impressions: AUC short of the reachable one" in failed
    generator = tmp_path / "large" / "60000-seed-3" / "data" / "generator.json"
    assert part["seed"] == json.loads(generator.read_text())["seed"] == 3
    before = largest["stages"]
    assert scaling.main(arguments) == 1
    again = json.loads((tmp_path / "scaling.json").read_text())["parts"]["large"]
    assert again["sizes"]["60000"]["stages"] == before


class Pretended(scaling_training.Training):
    """A training that writes the checkpoint of step 7, and ends once it is told to, or at once."""

    def start(self, processes: int, module: str = "ranking.cli") -> "subprocess.Popen[str]":
        goes_on = self.output.name != "early"
        program = (
            "import sys, time; print('train-ranker: told to end', 'by torchrun', file=sys.stderr,"
            f" sep='\\n', flush=True); time.sleep(60 * {goes_on})"
        )
        return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)


def test_a_training_is_stopped_at_a_step(tmp_path: Path) -> None:
    job = Pretended(data=tmp_path, tables=tmp_path, config=tmp_path, output=tmp_path / "run")
    assert scaling_interrupted.step_of(job.output) == 0
    for name in ("sharded-000000005", "sharded-000000007", ".sharded-partial"):
        (job.output / "checkpoint" / name).mkdir(parents=True)
    assert scaling_interrupted.step_of(job.output) == 7

    def stop(process: "subprocess.Popen[str]") -> None:
        assert process.stderr is not None
        process.stderr.readline()  # it has begun
        process.terminate()

    found = scaling_interrupted._stop(job, 2, 7, stop)
    assert (found["status"], found["said"]) == (-15, [])
    early = dataclasses.replace(job, output=tmp_path / "early")
    with pytest.raises(BadInputError, match=r"early: training ended early: train-ranker: told"):
        scaling_interrupted._stop(early, 2, 7, stop)


def test_checks_of_interruptions_by_hand() -> None:
    one = {"slices": {"all": {"auc": 0.75, "log_loss": 0.5, "normalized_log_loss": 0.9}}}
    other = {"slices": {"all": {"auc": 0.7500001, "log_loss": 0.503, "normalized_log_loss": 0.9}}}
    apart = scaling_training.differences(one, other)
    assert apart == pytest.approx({"auc": 1e-7, "log_loss": 0.003, "normalized_log_loss": 0})
    said = scaling_training.sentences("W torchrun\ntrain-ranker: lost\n")
    assert said == ["train-ranker: lost"]
    figures = {
        "rows": 40,
        "steps": 9,
        "changed_at_steps": [3, 6],
        "killed": {"step": 5, "seconds": 2.0, "status": 1, "said": said},
        "differences": {"changing": apart, "killed": apart | {"log_loss": 0.0}, "alone": apart},
    }
    checks = list(scaling_interrupted._checks(figures, {"changing": 40, "killed": 41}))
    assert [check.name for check in checks if not check.passed] == [
        "from 2 processes to 1 and back: difference in log_loss",
        "one of 2 processes killed, and again: rows trained on",
    ]


def test_command_refuses_too_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(["--output", str(tmp_path), "--impressions", "5"]) == 2
    assert "--impressions must be at least 200000, got 5" in capsys.readouterr().err
