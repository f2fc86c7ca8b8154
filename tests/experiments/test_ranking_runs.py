"""Runs of the ranking benchmark: what names them, what is kept, what is refused."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_ranker import tiny_config, write_tiny_tables

from experiments import ranking_runs
from experiments.ranking_runs import Plan, Run, execute
from experiments.ranking_variants import VARIANTS
from features.errors import BadInputError
from features.requests import RequestsManifest, build_requests
from features.schema import DatasetSchema
from ranking.bundle import Bundle
from ranking.run import train_ranker

BY_NAME = {variant.name: variant for variant in VARIANTS}


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of their own would cost runs of a second many more."""
    torch.set_num_threads(1)
    monkeypatch.setattr(ranking_runs, "_fitted", {})
    monkeypatch.setattr(ranking_runs, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))


@pytest.fixture(scope="module")
def data(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "data"
    shutil.copytree(tiny_dataset, folder)
    build_requests(folder, folder / "requests")
    write_tiny_tables(folder / "tables")
    return folder


@pytest.fixture
def plan(data: Path, tmp_path: Path) -> Plan:
    training = {"epochs": 1, "evaluate_week": 6, "train_weeks": 5, "checkpoint_seconds": 0}
    return Plan(
        data=data,
        tables=data / "tables",
        output=tmp_path / "out",
        config=tiny_config(training=training),
        table_fingerprint="tiny",
        data_fingerprint=RequestsManifest.load(data / "requests").fingerprint,
    )


def run_of(plan: Plan, name: str = "dcn", *, week: int = 6, seed: int = 0) -> Run:
    schema = DatasetSchema.load(plan.data)
    return Run.of(plan, BY_NAME[name], schema, week=week, seed=seed)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# Names.


def test_the_folder_tells_variant_week_and_seed(plan: Plan) -> None:
    run = run_of(plan, "history", week=5, seed=3)
    assert run.folder.parent == plan.output / "runs" / "history"
    assert run.folder.name.startswith("week-5-seed-3-")
    assert len(run.folder.name) == len("week-5-seed-3-") + 12
    assert run.folder == run_of(plan, "history", week=5, seed=3).folder
    assert run.checkpoint.parent.parent == run.folder.parent


def test_where_things_lie_and_how_often_they_are_saved_is_no_part_of_a_name(plan: Plan) -> None:
    other = replace(plan, output=Path("elsewhere"), data=plan.data.parent / "data")
    assert run_of(other).folder.name == run_of(plan).folder.name


@pytest.mark.parametrize("part", ["model", "training", "transforms", "history"])
def test_another_configuration_has_another_name(plan: Plan, part: str) -> None:
    changes = {
        "model": {"cross_layers": 3},
        "training": {"learning_rate": 0.02},
        "transforms": {"bins": 9},
        "history": {"cap": 7},
    }[part]
    config = replace(plan.config, **{part: replace(getattr(plan.config, part), **changes)})
    for name in ("dcn", "history", "logistic"):
        assert run_of(replace(plan, config=config), name).folder != run_of(plan, name).folder


def test_other_data_have_another_name(plan: Plan) -> None:
    other = replace(plan, data_fingerprint="other")
    for name in ("dcn", "history", "logistic"):
        assert run_of(other, name).folder != run_of(plan, name).folder


@pytest.mark.parametrize(
    ("name", "reads"),
    [("dcn", False), ("logistic", False), ("history", True), ("random", True)],
)
def test_other_tables_have_another_name_where_they_are_read(
    plan: Plan, name: str, reads: bool
) -> None:
    other = replace(plan, table_fingerprint="other")
    assert (run_of(other, name).folder != run_of(plan, name).folder) == reads


def test_weeks_seeds_and_variants_have_names_of_their_own(plan: Plan) -> None:
    runs = [
        run_of(plan, name, week=week, seed=seed)
        for name in BY_NAME
        for week in (5, 6)
        for seed in (0, 1)
    ]
    assert len({run.folder for run in runs}) == len(runs) == 4 * len(BY_NAME)
    rankers = [run for run in runs if run.variant.learner == "ranker"]
    digests = {run.folder.name.rpartition("-")[2] for run in rankers}
    # The tiny dataset has no counters, so that rows with and without them are the same.
    same = sum(run.variant.counters for run in rankers)
    assert len(digests) == len(rankers) - same


# Made once.


@pytest.mark.parametrize("name", ["dcn", "similar-history"])
def test_a_run_scores_as_train_ranker_does(plan: Plan, tmp_path: Path, name: str) -> None:
    run = run_of(plan, name, seed=2)
    run.execute()
    tables = plan.tables if run.config.model.embedding_tower else None
    train_ranker(plan.data, tmp_path / "run", tables=tables, config=run.config)
    bundle = Bundle.open(tmp_path / "run" / "bundle")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    scores = run.scores()
    assert scores.dtype == np.float32
    assert len(scores) == metrics["slices"]["all"]["rows"]
    assert metrics["slices"]["all"]["calibration"] == pytest.approx(
        scores.mean() * len(scores) / metrics["slices"]["all"]["positives"], rel=1e-6
    )
    facts = run.facts()
    assert facts["parameters"] == bundle.ranker.number_of_parameters()
    assert facts["model_bytes"] == bundle.ranker.number_of_bytes()
    assert facts["rows_per_second"] > 0


def test_a_run_appears_whole_and_leaves_no_checkpoint(plan: Plan) -> None:
    run = run_of(plan)
    assert not run.done
    run.execute()
    assert run.done
    assert files(plan.output) == [
        f"runs/dcn/{run.folder.name}/{name}" for name in ("probability.npy", "run.json")
    ]
    content = json.loads((run.folder / "run.json").read_text())
    assert content["identity"] == run.identity
    assert content["rows"] == sum(
        counts.rows
        for week, counts in RequestsManifest.load(plan.data / "requests").weeks.items()
        if week < 6
    )
    assert content["peak_rss_mb"] > 10


def test_a_floor_is_a_run_like_another(plan: Plan) -> None:
    run = run_of(plan, "logistic")
    run.execute()
    assert set(run.facts()) == {"rows_per_second", "model_bytes"}
    assert len(run.scores()) == RequestsManifest.load(plan.data / "requests").weeks[6].rows
    assert 0.05 < run.scores().mean() < 0.95


def test_runs_that_are_there_are_not_made_again(
    plan: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [run_of(plan, seed=seed) for seed in (0, 1)]
    execute(runs[:1], 1)
    assert "0 of 1 runs are there, 1 to make" in capsys.readouterr().err
    before = [path.stat().st_mtime_ns for path in sorted(runs[0].folder.iterdir())]
    execute(runs, 1)
    assert "1 of 2 runs are there, 1 to make" in capsys.readouterr().err
    assert [path.stat().st_mtime_ns for path in sorted(runs[0].folder.iterdir())] == before
    monkeypatch.setattr(ranking_runs, "ProcessPoolExecutor", None)
    execute(runs, 1)
    assert "2 of 2 runs are there, 0 to make" in capsys.readouterr().err
    assert (runs[0].scores() != runs[1].scores()).any()


def test_a_stopped_run_carries_on_from_its_checkpoint(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after its last epoch: carrying on trains no more, and the scores are the same."""
    whole = run_of(replace(plan, output=tmp_path / "whole"))
    whole.execute()
    run = run_of(plan)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ranking_runs, "predict", stop)
        with pytest.raises(KeyboardInterrupt):
            run.execute()
    assert run.checkpoint.is_file()
    assert not run.done
    with monkeypatch.context() as patched:
        patched.setattr("ranking.training.Trainer._step", stop)
        run.execute()
    assert run.scores().tolist() == whole.scores().tolist()
    assert not run.checkpoint.parent.exists()


def test_a_run_that_fails_ends_the_command_and_the_others_stay(plan: Plan) -> None:
    wild = replace(plan.config.training, learning_rate=1e30, warmup=0.0)
    good = run_of(plan)
    bad = run_of(replace(plan, config=replace(plan.config, training=wild)), seed=1)
    with pytest.raises(BadInputError, match="the loss became"):
        execute([good, bad, run_of(plan, seed=2)], 1)
    assert good.done
    assert not bad.done


def test_a_worker_ends_with_the_command_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    parents = iter([7, 7, 1])

    def ended(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "_exit", ended)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(SystemExit):
        ranking_runs._end_with(7)
    assert next(parents, None) is None


# Damage.


@pytest.fixture
def made(plan: Plan) -> Run:
    """A run that was made of something else than training: its scores are all a half."""
    run = run_of(plan)
    run.folder.mkdir(parents=True)
    np.save(run.folder / "probability.npy", np.full(9, 0.5, np.float32))
    (run.folder / "run.json").write_text(json.dumps({"identity": run.identity}))
    assert run.scores().tolist() == [0.5] * 9
    assert run.facts() == {}
    return run


@pytest.mark.parametrize("length", [0, 5, 60, 140])
def test_cut_scores_are_refused(made: Run, length: int) -> None:
    path = made.folder / "probability.npy"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BadInputError, match=r"not a whole run .*; remove it and") as caught:
        made.scores()
    assert str(made.folder) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"rows": 3}'])
def test_a_description_that_tells_nothing_is_refused(made: Run, text: str) -> None:
    (made.folder / "run.json").write_text(text)
    with pytest.raises(BadInputError, match="not a whole run") as caught:
        made.scores()
    assert str(made.folder) in str(caught.value)


def test_scores_that_are_gone_are_missed(made: Run) -> None:
    (made.folder / "probability.npy").unlink()
    with pytest.raises(BadInputError, match="not a whole run"):
        made.scores()


def test_pickled_scores_are_refused(made: Run) -> None:
    np.save(made.folder / "probability.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(BadInputError, match="not a whole run"):
        made.scores()


@pytest.mark.parametrize("key", ["config", "data_fingerprint", "table_fingerprint", "learner"])
def test_a_run_that_is_not_what_its_name_says_is_refused(made: Run, key: str) -> None:
    path = made.folder / "run.json"
    path.write_text(json.dumps({"identity": made.identity | {key: "other"}}))
    with pytest.raises(BadInputError, match=r"run\.json: is of another run; remove") as caught:
        made.scores()
    assert str(made.folder) in str(caught.value)


def test_a_folder_without_a_description_is_made_again(made: Run) -> None:
    (made.folder / "run.json").unlink()
    assert not made.done
    made.execute()
    assert len(made.scores()) > 9
