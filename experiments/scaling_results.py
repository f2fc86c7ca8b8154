"""What the measurements of scale share: their setting, child processes, and ``scaling.json``."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.load_checks import Check, Part, print_checks, read_file, with_part
from features.errors import BadInputError
from features.files import write_text

RESULTS = "scaling.json"
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingConfig:
    """What a part is told.

    Attributes:
        output: folder of ``scaling.json``; a part keeps its files in a folder of its name there.
        impressions: how many to generate for the part ``large``.
        seed: of what is generated.
        data: a dataset folder for the parts that compare engines.
        threads: cores of a training process.
    """

    output: Path
    impressions: int
    seed: int
    data: Path
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A command that ended well.

    Attributes:
        text: its standard output.
        seconds: wall time.
        cpu_seconds: of all its cores together.
        peak_bytes: the most memory that it, or the largest of its children, held at a time.
    """

    text: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int


# A process begins with the peak memory of the one that started it, so a small one starts it.
_LAUNCHER = """\
import json, os, signal, sys
command = [sys.executable, *sys.argv[2:]]
process = os.posix_spawn(sys.executable, command, os.environ)
signal.signal(signal.SIGTERM, lambda *_: os.kill(process, signal.SIGTERM))
signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command takes it and ends by itself
_, status, usage = os.wait4(process, 0)
with os.fdopen(int(sys.argv[1]), "w") as told:
    json.dump([usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024], told)
sys.exit(max(os.waitstatus_to_exitcode(status), -1) % 256)
"""


def run_python(arguments: Sequence[str]) -> Ended:
    """Run ``python`` with ``arguments`` to its end; what it says on standard error is shown.

    Raises:
        BadInputError: it failed.
    """
    root = str(Path(__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    started = time.monotonic()
    reads, writes = os.pipe()
    with os.fdopen(reads) as told:
        try:
            process = subprocess.Popen(
                [sys.executable, "-S", "-c", _LAUNCHER, str(writes), *arguments],
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                pass_fds=(writes,),
                text=True,
            )
        finally:
            os.close(writes)
        text = _output(process)
        if process.returncode:
            command = " ".join(["python", *arguments])
            raise BadInputError(f"{command}: ended with status {process.returncode}, see above")
        cpu_seconds, peak_bytes = json.load(told)
    seconds = time.monotonic() - started
    return Ended(text=text, seconds=seconds, cpu_seconds=cpu_seconds, peak_bytes=peak_bytes)


def _output(process: "subprocess.Popen[str]") -> str:
    """Return what a process prints until its end; it ends with this one."""
    with process:
        try:
            text, _ = process.communicate()
        except BaseException:
            process.terminate()
            raise
    return text


def write_part(output: Path, name: str, part: Part) -> None:
    """Put ``part`` into the output's ``scaling.json`` beside the parts that are there."""
    results = with_part(read_results(output), name, part)
    write_text(output / RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")


def read_results(output: Path) -> dict[str, Any]:
    """Return what ``scaling.json`` holds; see `experiments.load_checks.read_file`."""
    return read_file(output / RESULTS)


def print_results(output: Path) -> None:
    """Print every check of every part in ``scaling.json`` as one table."""
    print_checks("Scaling", read_results(output))


def figure(name: str, measured: float | int | str | bool) -> Check:
    """Return a figure that is shown and asked nothing of."""
    return Check(name=name, measured=measured, asked="", passed=True)
