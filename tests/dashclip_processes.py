"""Trainings in processes of their own: killed at many moments, and two as one.

Run as a program by `test_train_processes`; it imports once and forks for each training, as a new
interpreter takes longer than a training of a tiny model.

::

    python dashclip_processes.py FOLDER

It trains on ``FOLDER/photos`` by ``FOLDER/killed.toml``, whole and in pieces, and by each
``FOLDER/pair-DATA-*.toml`` on ``FOLDER/DATA`` in two processes with the environment that torchrun
gives them.
"""

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open

import embeddings.train  # noqa: F401  (so that no child has to)
from embeddings import distributed
from embeddings.train_cli import main

_CHANCE = random.Random(0)


def train(data: Path, config: Path, output: Path) -> int:
    """Run the command."""
    return main(["--data", str(data), "--config", str(config), "--output", str(output)])


# --- killed


def kill(folder: Path) -> None:
    """Train into ``folder/whole``, and into ``folder/pieces`` with a SIGKILL at each moment."""
    data, config = folder / "photos", folder / "killed.toml"
    pieces, killed = folder / "pieces", []
    assert _forked(data, config, folder / "whole", lambda: False) == 0
    moments = {
        "the folder is claimed": lambda: (pieces / "training.toml").exists(),
        "stage 1 has begun": lambda: _has_done(pieces, "stage 1", 8),
        "stage 1 is at its second epoch": lambda: _has_done(pieces, "stage 1", 32),
        "stage 1 is done": lambda: (pieces / "checkpoint" / "stage-1.safetensors").exists(),
        "stage 2 has begun": lambda: _has_done(pieces, "stage 2", 16),
        "stage 2 is about to end": lambda: _has_done(pieces, "stage 2", 112),
        "the model is being written": lambda: (pieces / "model.safetensors").exists(),
    }
    for name, reached in moments.items():
        status = _forked(data, config, pieces, reached)
        if status == -signal.SIGKILL:
            killed.append(name)
    assert _forked(data, config, pieces, lambda: False) == 0
    (folder / "killed.json").write_text(json.dumps(killed))


def _forked(data: Path, config: Path, output: Path, reached: Callable[[], bool]) -> int:
    """Train in a child that is killed a moment after ``reached``; returns how it ended."""
    child = os.fork()
    if not child:
        os._exit(train(data, config, output))
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if reached():
            time.sleep(_CHANCE.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.005)


def _has_done(folder: Path, stage: str, examples: int) -> bool:
    path = folder / "checkpoint" / "state.safetensors"
    if not path.exists():
        return False
    # With "pt" the file is opened twice, and another may take its place in between.
    with safe_open(path, framework="np") as file:
        header = json.loads(file.metadata()["dashclip"])
    return header["stage"] == stage and header["progress"]["examples"] >= examples


# --- two as one


def pair(folder: Path) -> None:
    """Train in two processes; what they print goes to ``folder/rank-*.txt``."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            os.environ |= place | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            printed = os.open(folder / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT)
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            os._exit(_member(folder))
        children.append(child)
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _member(folder: Path) -> int:
    """Do one process's part; returns its exit status."""
    try:
        with distributed.process_group():
            assert distributed.world() == 2
            _check_gather()
            _check_gradients()
        for config in sorted(folder.glob("pair-*.toml")):
            data = folder / config.stem.split("-")[1]
            assert train(data, config, config.with_suffix("")) == 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _check_gather() -> None:
    """Each process weighs all rows by numbers of its own; a row's gradient sums what it got."""
    rank = distributed.rank()
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).add(10 * rank).requires_grad_()
    everyone = distributed.gather(rows)
    assert everyone.tolist() == [[1, 2], [3, 4], [11, 12], [13, 14]]
    weights = torch.arange(8.0).reshape(4, 2) * (rank + 1)
    (everyone * weights).sum().backward()
    own = distributed.own_slice(4)
    assert own == slice(2 * rank, 2 * rank + 2)
    assert rows.grad is not None
    assert rows.grad.tolist() == (3 * torch.arange(8.0).reshape(4, 2))[own].tolist()
    assert distributed.total(torch.tensor(rank + 1.0)).item() == 3


def _check_gradients() -> None:
    """A parameter that one process used gets its gradient; one that none used gets none."""
    rank = distributed.rank()
    both, one, none = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    both.grad = torch.tensor([1.0, rank])
    if rank:
        one.grad = torch.tensor([5.0, 6.0])
    distributed.sum_gradients([both, one, none])
    assert both.grad.tolist() == [2, 1]
    assert one.grad is not None
    assert one.grad.tolist() == [5, 6]
    assert none.grad is None
    distributed.sum_gradients([none])
    assert dist.is_initialized()


if __name__ == "__main__":
    torch.set_num_threads(1)
    pair(Path(sys.argv[1]))
    kill(Path(sys.argv[1]))
