"""Trainings of the ranker in processes of their own: two as one, one after two, one of two killed.

Run as a program by `test_distributed`; it imports once and forks for each process, as a new
interpreter takes longer than a training on the tiny dataset.

::

    python ranker_processes.py FOLDER

It trains on ``FOLDER/data`` with ``FOLDER/tables`` by each ``FOLDER/NAME.toml`` into
``FOLDER/NAME-PROCESSES``, and writes what only it can see to ``FOLDER/seen.json``.
"""

import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import ranking.distributed_training  # noqa: F401  (so that no child has to)
from embeddings.tables import StoredEmbeddings
from features.checkpoint import read_header
from ranking import distributed_tables, run
from ranking.cli import main

Until = Callable[[], bool]


def start(folder: Path, name: str, output: str, processes: int, *, report: bool) -> list[int]:
    """Begin a training; returns the children, whose output goes to ``OUTPUT-RANK.txt``."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if not child:
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
                os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            place = folder / f"{output}-{rank}.txt"
            printed = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            os._exit(_member(folder, name, output, rank, report=report))
        children.append(child)
    return children


def _member(folder: Path, name: str, output: str, rank: int, *, report: bool) -> int:
    """Do one process's part; returns its exit status."""
    try:
        if name.startswith("pieces"):
            distributed_tables._COPIED_BYTES = 0
        trainers = []
        read: Counter[str] = Counter()
        make, take = run._Run._trainer, StoredEmbeddings._values

        def count(self: Any, lists: Any, first: int) -> Any:
            read[self._path.stem] += len(lists)
            return take(self, lists, first)

        def note(self: Any, ranker: Any) -> Any:
            trainers.append(make(self, ranker))
            return trainers[-1]

        run._Run._trainer = note  # type: ignore[method-assign]
        StoredEmbeddings._values = count  # type: ignore[method-assign]
        places = {"data": "data", "tables": "tables", "config": f"{name}.toml", "output": output}
        status = main([part for k, v in places.items() for part in (f"--{k}", str(folder / v))])
        if report and trainers:
            (folder / f"{output}-{rank}.json").write_text(
                json.dumps(_look(trainers[0]) | {"read": read})
            )
        return status
    except BaseException:
        traceback.print_exc()
        return 1


def _look(trainer: Any) -> dict[str, Any]:
    """Return what a process holds after training."""
    ranker = trainer.ranker
    frozen = [
        buffer for bag in ranker.pretrained.embedding_bags.values() for buffer in bag.buffers()
    ]
    parts = trainer.frozen._parts
    return {
        "placements": dict(distributed_tables.placements(trainer.spread)),
        "held": {name: list(piece.rows.shape) for name, piece in trainer.spread.weights.items()},
        "momenta": list(trainer.spread.momenta),
        "pretrained_parameters": [name for name, _ in ranker.pretrained.named_parameters()],
        "frozen_gradients": [buffer.requires_grad or buffer.grad is not None for buffer in frozen],
        "adam": sum(p.numel() for g in trainer._adam.param_groups for p in g["params"]),
        "dense": sum(p.numel() for p in ranker.dense_parameters()),
        "frozen_parts": {name: len(part._own["weight"]) for name, part in parts.items()},
    }


def wait(children: list[int]) -> list[int]:
    """Wait for the children; returns their exit statuses."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def train(folder: Path, name: str, processes: int) -> None:
    """Train to the end."""
    children = start(folder, name, f"{name}-{processes}", processes, report=processes > 1)
    assert wait(children) == [0] * processes, (name, processes)


def step_of(output: Path) -> int:
    """Return the step of a run's checkpoint; 0 without one."""
    checkpoint = output / "checkpoint"
    steps = [int(re.sub(r"\D", "", path.name)) for path in checkpoint.glob("sharded-*")]
    with suppress(Exception):  # there is none, or it is being replaced
        steps.append(read_header(checkpoint / "state.safetensors")["step"])
    return max(steps, default=0)


def in_turns(folder: Path) -> list[int]:
    """Train in two processes, in one, and in two again; returns the steps of the changes."""
    steps = []
    for processes, until in ((2, 20), (1, 50), (2, 10**9)):
        children = start(folder, "turns", "turns-changing", processes, report=False)
        ended = False
        while not ended and step_of(folder / "turns-changing") < until:
            ended = (
                os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            )
            time.sleep(0.002)
        if not ended:
            for child in children:
                os.kill(child, signal.SIGKILL)
        statuses = wait(children)
        assert statuses == ([0] if ended else [-signal.SIGKILL]) * processes, statuses
        steps.append(step_of(folder / "turns-changing"))
    return steps


def kill_one(folder: Path) -> dict[str, Any]:
    """Kill one of two processes during training, then go on; returns how the other ended."""
    children = start(folder, "turns", "turns-killed", 2, report=False)
    while step_of(folder / "turns-killed") < 20:
        time.sleep(0.002)
    os.kill(children[1], signal.SIGKILL)
    killed = time.monotonic()
    statuses = wait(children)
    seconds = time.monotonic() - killed
    step = step_of(folder / "turns-killed")
    assert wait(start(folder, "turns", "turns-killed", 2, report=False)) == [0, 0]
    return {"statuses": statuses, "seconds": seconds, "step": step}


def everything(folder: Path) -> None:
    """Do all trainings."""
    seen: dict[str, Any] = {}
    for name in ("whole", "cut", "pieces", "turns"):
        train(folder, name, 2)
    for name in ("whole", "pieces", "turns"):
        train(folder, name, 1)
    seen["killed"] = kill_one(folder)
    seen["steps"] = in_turns(folder)
    (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    everything(Path(sys.argv[1]))
