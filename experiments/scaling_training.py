"""How the measurements of scale start ``train-ranker`` in one process and in several."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from features.errors import BadInputError

METRICS = ("auc", "log_loss", "normalized_log_loss")
TOLERANCE = 2e-5  # in a metric; one process that adds in another order shows up to a third of it
_SAYS = "train-ranker:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One run of the command.

    Attributes:
        data: dataset folder.
        tables: folder of embedding tables.
        config: configuration of the ranker.
        output: the run's folder.
    """

    data: Path
    tables: Path
    config: Path
    output: Path

    def start(self, processes: int, module: str = "ranking.cli") -> "subprocess.Popen[str]":
        """Start it in some processes with one thread each; what they say on stderr is piped."""
        launcher = ["-m", module]
        if processes > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone"]
            launcher = [*torchrun, "--nproc-per-node", str(processes), *launcher]
        inputs = ["--data", self.data, "--tables", self.tables]
        inputs += ["--config", self.config, "--output", self.output]
        root = str(Path(__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        return subprocess.Popen(
            [sys.executable, *launcher, *map(str, inputs)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, processes: int, module: str = "ranking.cli") -> dict[str, Any]:
        """Run it to its end; returns the content of ``metrics.json``.

        Raises:
            BadInputError: it failed; the message has the last line that it said.
        """
        with self.start(processes, module) as process:
            said = process.communicate()[1]
        if process.returncode:
            reason = (sentences(said) or said.splitlines() or ["no message"])[-1]
            raise BadInputError(f"training in {processes} process(es) ended with {reason}")
        metrics: dict[str, Any] = json.loads((self.output / "metrics.json").read_bytes())
        return metrics


def sentences(said: str) -> list[str]:
    """Return what the command itself said of an end, without what its launcher did."""
    return [line for line in said.splitlines() if line.startswith(_SAYS)]


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Return how far the metrics of all evaluation rows of two runs are apart."""
    figures, others = one["slices"]["all"], other["slices"]["all"]
    return {name: abs(figures[name] - others[name]) for name in METRICS}
