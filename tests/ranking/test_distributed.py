"""Training in several processes: the figures of one, whatever ends in between."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_ranker import tiny_config

from features.config_file import to_toml

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests" / "ranker_processes.py"

# Sums in another order differ in the last of float32's 7 digits; a run of 100 to 250 steps lets
# that grow by less than a hundred times. A request that is lost, or counted twice, changes a metric
# of 625 rows by more than 1e-4.
TOLERANCE = 2e-6
LARGEST_WEIGHT_DIFFERENCE = 2e-5

CONFIGS = {
    # Every table is copied to both processes, then the frozen ones are cut by rows.
    "whole": tiny_config(history_counts=True),
    "cut": tiny_config(history_counts=True, training={"whole_table_mb": 0.0}),
    # No table is copied: torchrec's planner cuts them all, those of products and queries too.
    "pieces": tiny_config(tables="random", training={"validation_week": True}),
    # Stopped and killed: a checkpoint after each chunk of one row group.
    "turns": tiny_config(
        training={"epochs": 2, "batch_rows": 64, "chunk_groups": 1, "checkpoint_seconds": 0.0}
    ),
}


@pytest.fixture(scope="module")
def folder(ranker_data, random_tables, tmp_path_factory):
    """All the trainings of `ranker_processes`; read only."""
    folder = tmp_path_factory.mktemp("processes")
    shutil.copytree(ranker_data, folder / "data")
    shutil.copytree(random_tables, folder / "tables")
    for name, config in CONFIGS.items():
        (folder / f"{name}.toml").write_text(to_toml(config))
    done = subprocess.run(
        [sys.executable, PROGRAM, folder],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    printed = "".join(path.read_text() for path in sorted(folder.glob("*.txt")))
    assert done.returncode == 0, done.stderr + printed
    return folder


def environment(**more):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | more


def metrics(run):
    return json.loads((run / "metrics.json").read_text())


def assert_same_figures(one, other, tolerance=TOLERANCE):
    first, second = metrics(one), metrics(other)
    assert first["training"]["rows"] == second["training"]["rows"]
    assert first["slices"].keys() == second["slices"].keys()
    for name, figures in first["slices"].items():
        assert second["slices"][name] == pytest.approx(figures, rel=tolerance, nan_ok=True), name


def weights(run):
    return load_file(run / "bundle" / "model.safetensors")


def assert_same_bundle(one, other, tolerance=LARGEST_WEIGHT_DIFFERENCE):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=tolerance, msg=name)


def seen(folder):
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.parametrize("name", ["whole", "pieces", "turns"])
def test_two_processes_give_the_figures_of_one(folder, name):
    one, two = folder / f"{name}-1", folder / f"{name}-2"
    assert_same_figures(one, two)
    assert_same_bundle(one, two)


def test_frozen_tables_cut_by_rows_give_the_bits_of_whole_ones(folder):
    assert metrics(folder / "whole-2")["slices"] == metrics(folder / "cut-2")["slices"]
    assert_same_bundle(folder / "whole-2", folder / "cut-2", tolerance=0)


@pytest.mark.parametrize("name", ["whole", "cut"])
def test_frozen_tables_carry_no_gradient_and_no_optimiser_state(folder, name):
    held = []
    for rank in range(2):
        found = json.loads((folder / f"{name}-2-{rank}.json").read_text())
        assert found["pretrained_parameters"] == []
        assert not any(found["frozen_gradients"])
        assert not [key for key in found["momenta"] if "pretrained" in key]
        assert found["adam"] == found["dense"]
        held.append(found["frozen_parts"])
    # Half of 60 products and of 12 queries, and the unknown row.
    assert held == [{} if name == "whole" else {"product": 31, "query": 7}] * 2


def test_a_process_reads_the_rows_that_it_keeps(folder):
    looks = [json.loads((folder / f"cut-2-{rank}.json").read_text())["read"] for rank in range(2)]
    # The first process reads all 60 products and 12 queries once more, for the bundle.
    assert looks == [{"product": 30 + 60, "query": 6 + 12}, {"product": 30, "query": 6}]


def test_small_tables_are_copied_and_others_cut_by_the_planner(folder):
    copied = json.loads((folder / "whole-2-0.json").read_text())["placements"]
    assert set(copied.values()) == {"data_parallel"}
    looks = [json.loads((folder / f"pieces-2-{rank}.json").read_text()) for rank in range(2)]
    assert looks[0]["placements"] == looks[1]["placements"]
    assert set(looks[0]["placements"].values()) <= {"row_wise", "table_wise"}
    for name, tensor in weights(folder / "pieces-1").items():
        table = name.removeprefix("trained/")
        if table in looks[0]["held"]:
            rows = [look["held"][table][0] for look in looks]
            assert sum(rows) == len(tensor), table
    assert any("pretrained" in name for name in looks[0]["held"])


def test_only_the_first_process_prints(folder):
    assert "evaluating week 6" in (folder / "whole-2-0.txt").read_text()
    assert (folder / "whole-2-1.txt").read_text() == ""


def test_a_checkpoint_is_one_folder(folder):
    names = [path.name for path in (folder / "turns-2" / "checkpoint").iterdir()]
    assert len(names) == 1
    assert re.fullmatch(r"sharded-\d{9}", names[0])


def test_a_run_goes_on_in_one_process_and_in_two_again(folder):
    steps = seen(folder)["steps"]
    assert 20 <= steps[0] < steps[1] < steps[2], "it was stopped twice on its way"
    assert_same_figures(folder / "turns-changing", folder / "turns-1")
    assert_same_bundle(folder / "turns-changing", folder / "turns-1")


def test_one_killed_process_ends_the_run_and_it_goes_on(folder):
    killed = seen(folder)["killed"]
    assert killed["statuses"][0] not in (0, killed["statuses"][1])
    assert killed["seconds"] < 10
    said = (folder / "turns-killed-0.txt").read_text().splitlines()
    assert [line for line in said if line.startswith("train-ranker:")] == [
        "train-ranker: another process of this run ended, or this one was told to; give the same "
        "command again to carry on from the last checkpoint"
    ]
    assert not [line for line in said if "Traceback" in line]
    assert_same_figures(folder / "turns-killed", folder / "turns-2")
    assert_same_bundle(folder / "turns-killed", folder / "turns-2")


# As it is started by people.


def torchrun(*options, **inputs):
    arguments = [part for name, value in inputs.items() for part in (f"--{name}", str(value))]
    launcher = [sys.executable, "-m", "torch.distributed.run", *options]
    return [*launcher, "-m", "ranking.cli", *arguments]


def test_torchrun_ends_within_seconds_of_a_killed_process(ranker_data, random_tables, tmp_path):
    training = replace(CONFIGS["turns"].training, epochs=1000)
    config = tmp_path / "config.toml"
    config.write_text(to_toml(replace(CONFIGS["turns"], training=training)))
    inputs = {"data": ranker_data, "tables": random_tables, "config": config}
    with subprocess.Popen(
        torchrun("--standalone", "--nproc-per-node=2", **inputs, output=tmp_path / "run"),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob("run/checkpoint/sharded-*")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), 9)
        killed = time.monotonic()
        said = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert time.monotonic() - killed < 15
    assert said.count("train-ranker: another process of this run ended") == 1


def test_bad_input_is_said_once(ranker_data, tmp_path):
    inputs = {"data": ranker_data, "tables": tmp_path / "nowhere", "output": tmp_path / "run"}
    done = subprocess.run(
        torchrun("--standalone", "--nproc-per-node=2", **inputs),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.count("train-ranker: ") == 1, done.stderr
    assert "no such embedding table" in done.stderr


# On several hosts.


class Hosts:
    """Two hosts on this machine: network namespaces, joined by a pair of virtual devices."""

    def __init__(self):
        self.names = [f"ranker{os.getpid()}{side}" for side in "ab"]
        self.devices = [f"rk{os.getpid() % 10**6}{side}" for side in "ab"]
        self.addresses = ["10.213.77.1", "10.213.77.2"]

    def __enter__(self):
        try:
            self._make()
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__()
            said = getattr(error, "stderr", "") or error
            pytest.skip(f"no network namespaces here: {str(said).strip()}")
        return self

    def _make(self):
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.devices[0], "type", "veth", "peer", "name", self.devices[1])
        for name, device, address in zip(self.names, self.devices, self.addresses, strict=True):
            ip("link", "set", device, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def __exit__(self, *_):
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def ip(*arguments):
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)


def test_two_hosts_give_the_figures_of_one(folder, tmp_path):
    inputs = {"data": folder / "data", "tables": folder / "tables", "config": folder / "whole.toml"}
    inputs["output"] = tmp_path / "run"
    with Hosts() as hosts, ExitStack() as running:
        processes = []
        for number, address in enumerate(hosts.addresses):
            launcher = [
                *("--nnodes=2", "--nproc-per-node=1", "--rdzv-id=1", "--rdzv-backend=c10d"),
                f"--rdzv-endpoint={hosts.addresses[0]}:29400",
                f"--rdzv-conf=is_host={1 - number}",  # no host's name leads to its address here
                f"--local-addr={address}",
            ]
            process = subprocess.Popen(
                ["ip", "netns", "exec", hosts.names[number], *torchrun(*launcher, **inputs)],
                cwd=ROOT,
                env=environment(GLOO_SOCKET_IFNAME=hosts.devices[number]),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            running.enter_context(process)
            running.callback(process.terminate)
            processes.append(process)
        said = [process.communicate(timeout=90)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    assert "evaluating week 6" in said[0]
    assert "evaluating" not in said[1]
    assert_same_figures(folder / "whole-1", tmp_path / "run")
    assert_same_bundle(folder / "whole-1", tmp_path / "run")
