"""What the load tests measure against what was asked: checks, a table and ``load.json``."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from features.console import print_table
from features.errors import BadInputError
from features.files import write_text

RESULTS = "load.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One measured figure and what it had to be."""

    name: str
    measured: float | int | str | bool
    asked: str
    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one part of the load tests found; ``figures`` is ready for JSON."""

    checks: tuple[Check, ...]
    figures: dict[str, Any]


def at_most(name: str, measured: float, bound: float) -> Check:
    """Check that ``measured`` is at most ``bound``; a figure that is missing (NaN) fails."""
    return Check(name=name, measured=measured, asked=f"at most {bound:g}", passed=measured <= bound)


def at_least(name: str, measured: float, bound: float) -> Check:
    """Check that ``measured`` is at least ``bound``; a figure that is missing (NaN) fails."""
    return Check(
        name=name, measured=measured, asked=f"at least {bound:g}", passed=measured >= bound
    )


def equals(name: str, measured: Any, wanted: Any) -> Check:
    """Check that ``measured`` is exactly ``wanted``."""
    return Check(name=name, measured=measured, asked=str(wanted), passed=measured == wanted)


def holds(name: str, passed: bool) -> Check:
    """Check that something is so."""
    return Check(name=name, measured="yes" if passed else "no", asked="yes", passed=passed)


def write_part(output: Path, name: str, part: Part) -> None:
    """Put ``part`` into the output's ``load.json`` beside the parts that are there."""
    results = with_part(read_results(output), name, part)
    write_text(output / RESULTS, json.dumps(results, indent=1) + "\n")


def with_part(results: dict[str, Any], name: str, part: Part) -> dict[str, Any]:
    """Return ``results`` with a part beside or in place of what is there, and the machine's own."""
    results["machine"] = {"cores": os.cpu_count(), "python": platform.python_version()}
    results.setdefault("parts", {})[name] = {
        "passed": all(check.passed for check in part.checks),
        "checks": [asdict(check) for check in part.checks],
        **part.figures,
    }
    return results


def read_results(output: Path) -> dict[str, Any]:
    """Return what ``load.json`` holds; see `read_file`."""
    return read_file(output / RESULTS)


def read_file(file: Path) -> dict[str, Any]:
    """Return what a file of results holds; empty where there is none.

    Raises:
        BadInputError: it is not a file that `with_part` made.
    """
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
    """Print every check of every part in ``load.json`` as one table."""
    print_checks("Load tests", read_results(output))


def print_checks(title: str, results: Mapping[str, Any]) -> None:
    """Print every check of every part of some results as one table.

    A figure that nothing is asked of has no verdict.
    """
    rows = [
        _row(part, check)
        for part, found in results.get("parts", {}).items()
        for check in found["checks"]
    ]
    print_table(title, ["part", "check", "measured", "asked", ""], rows)


def _row(part: str, check: Mapping[str, Any]) -> list[str]:
    value = check["measured"]
    shown = f"{value:,.4g}" if isinstance(value, float) else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        shown = f"{value:,}"
    verdict = "ok" if check["passed"] else "FAILED"
    return [part, check["name"], shown, check["asked"], verdict if check["asked"] else ""]
