"""What the measurements of scale share: their setting, child processes, and ``scaling.json``."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.load_checks import Check, Part
from features.console import print_table
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
        data: a dataset folder for the parts that compare engines.
        threads: cores of a training process.
    """

    output: Path
    impressions: int
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


def run_python(arguments: Sequence[str], log: Path) -> Ended:
    """Run ``python`` with ``arguments`` to its end, its standard error added to ``log``.

    Raises:
        BadInputError: it failed; names the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        try:
            text = process.stdout.read().decode()
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BadInputError(
            f"{log}: the process failed with status {process.returncode}; see there"
        )
    return Ended(
        text=text,
        seconds=time.monotonic() - started,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * 1024,
    )


def write_part(output: Path, name: str, part: Part) -> None:
    """Put ``part`` into the output's ``scaling.json`` beside the parts that are there."""
    results = read_results(output)
    results["machine"] = {"cores": os.cpu_count(), "python": platform.python_version()}
    results.setdefault("parts", {})[name] = {
        "passed": all(check.passed for check in part.checks),
        "checks": [asdict(check) for check in part.checks],
        **part.figures,
    }
    write_text(output / RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")


def read_results(output: Path) -> dict[str, Any]:
    """Return what ``scaling.json`` holds; empty where there is none.

    Raises:
        BadInputError: it is not the file that this command writes.
    """
    file = output / RESULTS
    if not file.exists():
        return {}
    try:
        results = json.loads(file.read_bytes())
    except ValueError as error:
        raise BadInputError(f"{file}: not JSON ({error})") from error
    if not isinstance(results, dict):
        raise BadInputError(f"{file}: not a result of this command")
    return results


def print_results(output: Path) -> None:
    """Print every check of every part in ``scaling.json`` as one table."""
    rows = [
        _row(part, check)
        for part, found in read_results(output).get("parts", {}).items()
        for check in found["checks"]
    ]
    print_table("Scaling", ["part", "check", "measured", "asked", ""], rows)


def figure(name: str, measured: float | int | str | bool) -> Check:
    """Return a figure that is shown and asked nothing of."""
    return Check(name=name, measured=measured, asked="", passed=True)


def _row(part: str, check: Mapping[str, Any]) -> list[str]:
    value = check["measured"]
    shown = f"{value:,.4g}" if isinstance(value, float) else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        shown = f"{value:,}"
    verdict = "ok" if check["passed"] else "FAILED"
    return [part, check["name"], shown, check["asked"], verdict if check["asked"] else ""]
