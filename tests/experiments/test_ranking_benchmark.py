"""The ranking benchmark from a dataset folder to its table: the same again, resume, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score
from tiny_dataset import write_tiny_dataset
from tiny_ranker import tiny_config, write_tiny_tables

from experiments import ranking_benchmark, ranking_runs
from experiments.ranking_benchmark import (
    KEEP_UNCLICKED,
    benchmark_ranking,
    default_weeks,
    shared_config,
)
from experiments.ranking_cli import main
from features.config_file import to_toml
from features.errors import BadInputError
from features.manifest import FORMAT, RequestsManifest, WeekCounts
from features.requests import build_requests
from features.schema import DatasetSchema, Weeks
from ranking.config import RankerConfig

ROOT = Path(__file__).parents[2]
NAMES = ("logistic", "dcn", "similar-history", "dcn-counters")
CONFIG = tiny_config(training={"epochs": 1, "keep_unclicked": 0.5})
WEEKS, SEEDS = (5, 6), (0, 1)
LATE_PRODUCT = 1000  # shown from week 5 on


@pytest.fixture(scope="module", autouse=True)
def _in_this_process() -> Any:
    """Processes of their own would cost runs of a second many more."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ranking_runs, "_fitted", {})
        patched.setattr(ranking_runs, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
        yield


def write_data(folder: Path, **options: int) -> Path:
    """Write a tiny dataset with a counter and a late product, its requests and its tables."""
    write_tiny_dataset(folder, **options)
    toml = folder / "dataset.toml"
    counters = '[features]\nfrom_history = ["aisles_bought"]\n\n[features.sparse]'
    toml.write_text(toml.read_text().replace("[features.sparse]", counters))
    path = folder / "impressions.parquet"
    table = pq.read_table(path)
    early = pc.less(table["requested_at"], pa.scalar(np.datetime64("2024-01-29", "us")))
    late = pc.equal(table["product_id"], LATE_PRODUCT)
    pq.write_table(table.filter(pc.invert(pc.and_(early, late))), path)
    build_requests(folder, folder / "requests")
    write_tiny_tables(folder / "tables")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("benchmark") / "data")


def benchmark(data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    options = {"config": CONFIG, "tables": data / "tables", "weeks": WEEKS, "seeds": SEEDS}
    options |= {"names": NAMES, "processes": 1, "command": "benchmark-ranking ..."}
    return benchmark_ranking(data, output, **options | changes)


@pytest.fixture(scope="module")
def output(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished benchmark; read only."""
    folder = tmp_path_factory.mktemp("benchmark") / "out"
    benchmark(data, folder)
    return folder


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "ranking.json").read_text())


def runs_in(folder: Path) -> dict[str, int]:
    """Return the runs that are there, with the time of each."""
    return {str(path.parent): path.stat().st_mtime_ns for path in folder.glob("runs/*/*/run.json")}


# The table.


def test_every_variant_week_and_seed_has_a_run_and_every_slice_a_row(output: Path) -> None:
    found = [Path(name) for name in runs_in(output)]
    assert {path.parent.name for path in found} == set(NAMES)
    per_variant = [sum(path.parent.name == name for path in found) for name in NAMES]
    assert per_variant == [2, 4, 4, 4], "hashed logistic regression has one seed"
    document = results(output)
    assert document["weeks"] == [5, 6]
    assert [about["name"] for about in document["variants"]] == list(NAMES)
    everything = {row["variant"]: row for row in document["rows"] if row["slice"] == "all"}
    assert {name: row["seeds"] for name, row in everything.items()} == dict(
        zip(NAMES, [1, 2, 2, 2], strict=True)
    )
    assert {name: row["vs"] for name, row in everything.items()} == {
        "logistic": "dcn",
        "dcn": None,
        "similar-history": "dcn",
        "dcn-counters": "dcn",
    }
    slices = [part["name"] for part in document["slices"]]
    assert {"all", "with_history", "without_history", "unseen_products", "week_5"} <= set(slices)
    assert len(document["rows"]) == len(slices) * len(NAMES)
    assert document["command"] == "benchmark-ranking ..."
    assert document["caveat"] == "generated for tests"
    names = {path.name for path in output.iterdir()}
    assert {"ranking.json", "ranking.md", "report.html", "runs"} <= names


def test_rows_are_scored_in_the_order_of_the_records(output: Path, data: Path) -> None:
    """The AUC of the table is that of the runs' scores and the records' clicks."""
    aucs: dict[str, list[float]] = {"0": [], "1": []}
    for name in runs_in(output / "."):
        path = Path(name)
        if path.parent.name != "dcn":
            continue
        _, week, _, seed, _ = path.name.split("-")
        records = pq.read_table(data / "requests" / f"week-{int(week):04d}.parquet")
        clicked = [click for clicks in records["clicked"].to_pylist() for click in clicks]
        aucs[seed].append(roc_auc_score(clicked, np.load(path / "probability.npy")))
    by_seed = [np.mean(found) for found in aucs.values()]
    row = next(r for r in results(output)["rows"] if (r["variant"], r["slice"]) == ("dcn", "all"))
    assert row["auc_mean"] == pytest.approx(np.mean(by_seed), abs=1e-9)
    assert row["auc_std"] == pytest.approx(np.std(by_seed, ddof=1), abs=1e-9)
    manifest = RequestsManifest.load(data / "requests")
    assert row["rows"] == sum(manifest.weeks[week].rows for week in WEEKS)
    assert row["positives"] == sum(manifest.weeks[week].positives for week in WEEKS)


def test_counters_are_read_by_rows_with_counters_alone(output: Path) -> None:
    for name in runs_in(output):
        identity = json.loads((Path(name) / "run.json").read_text())["identity"]
        left_out = 'leave_out = ["aisles_bought"]' in identity["config"]
        assert left_out == (Path(name).parent.name != "dcn-counters")


def test_the_slices_know_products_and_histories(output: Path, data: Path) -> None:
    parts = {part["name"]: part for part in results(output)["slices"]}
    shown, bought = 0, 0
    for week in WEEKS:
        records = pq.read_table(data / "requests" / f"week-{week:04d}.parquet")
        lengths = [len(products) for products in records["product_id"].to_pylist()]
        histories = [len(history) for history in records["purchase_history"].to_pylist()]
        bought += sum(n for n, h in zip(lengths, histories, strict=True) if h)
        shown += sum(p.count(LATE_PRODUCT) for p in records["product_id"].to_pylist() if week == 5)
    assert shown > 0
    assert parts["unseen_products"]["rows"] == shown, "in week 6 it has been seen in week 5"
    assert parts["with_history"]["rows"] == bought
    assert parts["without_history"]["rows"] == parts["all"]["rows"] - bought > 0
    assert parts["unseen_products"]["shortage"].startswith("too few clicks: ")


def test_the_samples_are_made_before_the_runs(output: Path, data: Path) -> None:
    """Once, and not by each process for itself."""
    assert output.exists()
    assert sorted(RequestsManifest.load(data / "requests-keep-0.5").weeks) == [1, 2, 3, 4, 5]


# The same again.


@pytest.fixture
def copied(output: Path, tmp_path: Path) -> Path:
    return shutil.copytree(output, tmp_path / "out")


def forbid_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking_runs, "ProcessPoolExecutor", None)


def test_the_same_command_twice_gives_the_same_bytes_and_makes_no_run(
    data: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = runs_in(copied)
    texts = {path.name: path.read_bytes() for path in copied.iterdir() if path.is_file()}
    for name in texts:
        (copied / name).unlink()
    forbid_runs(monkeypatch)
    benchmark(data, copied)
    assert runs_in(copied) == made
    for name, content in texts.items():
        assert (copied / name).read_bytes() == content, name


def test_fewer_variants_weeks_and_seeds_need_no_run(
    data: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_runs(monkeypatch)
    document = benchmark(data, copied, names=["similar-history", "dcn"], weeks=[6], seeds=[1])
    assert [about["name"] for about in document["variants"]] == ["dcn", "similar-history"]
    assert document["weeks"] == [6]
    assert {row["seeds"] for row in document["rows"]} == {1}


def test_the_order_of_seeds_weeks_and_names_does_not_matter(
    data: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_runs(monkeypatch)
    names = ["similar-history", "dcn"]
    expected = [row for row in results(copied)["rows"] if row["variant"] in names]
    assert benchmark(data, copied, weeks=WEEKS[::-1], names=names)["rows"] == expected
    turned = benchmark(data, copied, names=["dcn"], seeds=[1, 0])
    assert turned["variants"][0]["seeds"] == [1, 0]
    assert turned["rows"][0]["auc_mean"] == pytest.approx(expected[0]["auc_mean"])


def test_runs_of_another_configuration_stand_beside(
    data: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (copied / "ranking.json").read_bytes()
    made = runs_in(copied)
    other = replace(CONFIG, training=replace(CONFIG.training, learning_rate=0.003))
    document = benchmark(data, copied, names=["dcn"], config=other)
    assert len(runs_in(copied)) == len(made) + 4
    row = next(r for r in json.loads(before)["rows"] if r["variant"] == "dcn")
    assert document["rows"][0]["auc_mean"] != row["auc_mean"]
    forbid_runs(monkeypatch)
    benchmark(data, copied)
    assert (copied / "ranking.json").read_bytes() == before
    assert made.items() <= runs_in(copied).items()


def test_runs_of_other_data_stand_beside(copied: Path, tmp_path: Path) -> None:
    before, made = results(copied), runs_in(copied)
    other = write_data(tmp_path / "other", seed=1)
    document = benchmark(other, copied, names=["dcn"], weeks=[6])
    assert len(runs_in(copied)) == len(made) + 2
    assert made.items() <= runs_in(copied).items()
    assert document["data_fingerprint"] != before["data_fingerprint"]


@pytest.mark.parametrize("damage", ["cut", "edited"])
def test_a_damaged_run_is_named_and_no_table_is_written(
    data: Path, copied: Path, damage: str
) -> None:
    (copied / "ranking.json").unlink()
    folder = Path(min(name for name in runs_in(copied) if "similar" in name))
    if damage == "cut":
        content = (folder / "probability.npy").read_bytes()
        (folder / "probability.npy").write_bytes(content[: len(content) // 2])
    else:
        text = (folder / "run.json").read_text()
        (folder / "run.json").write_text(text.replace("cross_layers = 2", "cross_layers = 3"))
    with pytest.raises(BadInputError, match="remove") as caught:
        benchmark(data, copied)
    assert str(folder) in str(caught.value)
    assert not (copied / "ranking.json").exists()
    shutil.rmtree(folder)
    benchmark(data, copied, names=["dcn", "similar-history"])
    assert folder.is_dir()


# What is refused.


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--weeks", "5", "6", "5"], "week 5 is named twice"),
        (["--seeds", "3", "1", "3"], "seed 3 is named twice"),
        (["--seeds", "-1"], "'seed' must be 0 or more, got -1"),
        (["--weeks", "9"], "holds no week 9; it holds weeks 1 to 6"),
        (["--weeks", "1"], "the training weeks (none) have 0 impressions"),
        (["--processes", "0"], "at least one seed and one process are needed"),
        (["--variants", "dnc"], "unknown variant 'dnc'; known: logistic"),
        (["--variants", "dcn", "dcn"], "variant 'dcn' is named twice"),
        (["--variants", "history"], "is against dcn: name it too"),
        (["--keep-unclicked", "1.5"], "'keep_unclicked' must be above 0 and at most 1, got 1.5"),
        (["--keep-unclicked", "0"], "'keep_unclicked' must be above 0 and at most 1, got 0.0"),
        (["--config", "nowhere.toml"], "nowhere.toml: no such configuration file"),
        (["--tables", "nowhere"], "product.parquet: no such embedding table"),
    ],
)
def test_the_command_refuses(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    sentence: str,
) -> None:
    given = ["--data", str(data), "--output", str(tmp_path / "out")]
    given += [] if "--tables" in options else ["--tables", str(data / "tables")]
    given += [] if "--variants" in options else ["--variants", "dcn", "history"]
    assert main([*given, *options]) == 2
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_lightgbm_is_missed_before_anything_is_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(BadInputError, match=r"pip install 'dashclip-ranker\[floors\]'"):
        benchmark(data, tmp_path / "out", names=["lightgbm", "dcn"])
    assert not (tmp_path / "out").exists()


def test_a_dataset_without_relevance_and_tables_has_the_rows_without(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns("relevance.parquet", "tables"))
    chosen = []
    monkeypatch.setattr(ranking_benchmark, "import_lightgbm", lambda: None)
    monkeypatch.setattr(ranking_benchmark, "execute", lambda runs, _: chosen.extend(runs))
    with pytest.raises(BadInputError, match="not a whole run"):
        benchmark(folder, tmp_path / "out", names=(), tables=None, weeks=[6], seeds=[0])
    assert [run.variant.name for run in chosen] == [
        *("logistic", "lightgbm", "dcn", "lightgbm-counters", "dcn-counters")
    ]
    with pytest.raises(BadInputError, match="variant 'history' needs embedding tables"):
        benchmark(folder, tmp_path / "out", names=["dcn", "history"], tables=None)


# Settings.


def manifest_of(weeks: range) -> RequestsManifest:
    counts = WeekCounts(requests=1, rows=2, positives=1)
    return RequestsManifest(
        folder=Path("requests"),
        format=FORMAT,
        dataset="made-up",
        fingerprint="",
        window_days=84,
        history_cap=1000,
        unknown_products=0,
        weeks=dict.fromkeys(weeks, counts),
    )


@pytest.mark.parametrize(
    ("last", "evaluate", "expected"),
    [
        (53, 44, [45, 49, 53]),
        (47, 44, [45, 46, 47]),
        (50, 44, [45, 47, 49]),
        (46, 44, [44, 45, 46]),
        (44, 44, [42, 43, 44]),
        (53, None, [51, 52, 53]),
        (2, 2, [1, 2]),
    ],
)
def test_default_weeks_follow_the_week_that_was_looked_at(
    last: int, evaluate: int | None, expected: list[int]
) -> None:
    first_day = np.datetime64("2024-01-01").astype(object)
    weeks = Weeks(first_day=first_day, evaluate=evaluate) if evaluate else None
    schema = DatasetSchema(name="made-up", weeks=weeks)
    assert default_weeks(schema, manifest_of(range(1, last + 1))) == expected


def test_runs_share_a_configuration_and_train_on_one_core(tmp_path: Path) -> None:
    config = shared_config(None, None)
    assert (config.training.keep_unclicked, config.training.threads) == (KEEP_UNCLICKED, 1)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(replace(CONFIG, training=replace(CONFIG.training, threads=3))))
    assert shared_config(path, None) == CONFIG
    assert shared_config(path, 0.25).training.keep_unclicked == 0.25
    path.write_text("[training]\nepochs = 2\n")
    assert shared_config(path, None).training.keep_unclicked == 1
    assert shared_config(None, 1).model == RankerConfig().model


# Killed and carried on.


@contextmanager
def started(arguments: list[object]) -> Iterator[subprocess.Popen[str]]:
    """Start the command in a process group of its own, which ends with the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.ranking_cli", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline and not condition():
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()[1]
    assert condition()


def without_speed(document: dict[str, Any]) -> dict[str, Any]:
    rows = [{k: v for k, v in row.items() if k != "rows_per_second"} for row in document["rows"]]
    return document | {"rows": rows, "command": ""}


def test_killed_in_the_middle_of_a_run_it_carries_on_to_the_same_table(
    data: Path, tmp_path: Path
) -> None:
    """With real processes; every process of the command is killed at once."""
    names = ["dcn", "similar-history"]
    config = replace(CONFIG, training=replace(CONFIG.training, epochs=4, checkpoint_seconds=0))
    (tmp_path / "config.toml").write_text(to_toml(config))
    without = replace(config, training=replace(config.training, checkpoint_seconds=1e6))
    options = {"names": names, "config": without, "weeks": [6], "seeds": [1]}
    expected = benchmark(data, tmp_path / "whole", **options)
    output = tmp_path / "out"
    arguments = ["--data", data, "--tables", data / "tables", "--output", output, "--weeks", 6]
    arguments += ["--seeds", 1, "--variants", *names, "--processes", 1]
    arguments += ["--config", tmp_path / "config.toml"]

    checkpoints = "runs/similar-history/.*.training/state.safetensors"
    with started(arguments) as process:
        wait_for(process, lambda: any(output.glob(checkpoints)))
    made = runs_in(output)
    assert [Path(name).parent.name for name in made] == ["dcn"]
    assert not (output / "ranking.json").exists()
    assert list(output.glob(checkpoints))

    with started(arguments) as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "1 of 2 runs are there, 1 to make" in errors
    assert made.items() <= runs_in(output).items()
    assert not list(output.glob("runs/*/.*"))
    assert without_speed(results(output)) == without_speed(expected)
