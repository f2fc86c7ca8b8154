"""Load and robustness tests of the HTTP service: ``python -m experiments.load_serving``.

Starts `serve-ranker` itself, on a free port of the loopback address.
"""

import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from features.console import run_command, say
from features.errors import BadInputError

if TYPE_CHECKING:
    from experiments.load_setting import LoadConfig

PartName = Literal["saturation", "half", "overload", "swaps", "stop", "fuzz"]

_LEAST_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Test the service under load: rates, overload, swaps, stops and malformed requests.

    Prints each figure beside what it has to be and writes them to OUTPUT/load.json, where the
    parts of earlier runs are kept; exit status 1 if one of this run's parts failed. The parts
    after 'saturation' take its rate from there. For exact figures the machine should be quiet.
    """

    bundle: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder that export-ranker wrote."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder for results and logs."""
    other: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Another exported ranker that takes the same requests; 'swaps' goes to and fro."""
    parts: tuple[PartName, ...] = ("saturation", "half", "overload", "swaps", "stop", "fuzz")
    """Which parts to run."""
    seconds: float = 60.0
    """How long half load and overload last."""
    swaps: int = 1000
    """How often the model is swapped."""
    stops: int = 10
    """How often the service is stopped under load."""
    malformed: int = 100_000
    """How many malformed requests are sent."""
    examples: int = 100
    """How many requests schemathesis makes, for each operation, that fit its schema; and as many
    that do not."""
    workers: int = 2
    """Worker processes of the service."""
    candidates: int = 100
    """Candidates of each request."""
    history: int = 300
    """Purchases of each request."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    passed: list[bool] = []

    def action(options: Options) -> None:
        passed.append(_load(options))

    status = run_command(Options, action, prog="load_serving", arguments=arguments)
    return status or int(not all(passed))


def _load(options: Options) -> bool:
    """Run the parts in their order and return whether all of them passed."""
    _check(options)
    from experiments.load_checks import print_results
    from experiments.load_setting import LoadConfig

    signal.signal(signal.SIGTERM, _interrupt)
    config = LoadConfig(
        bundle=options.bundle,
        output=options.output,
        other=options.other,
        workers=options.workers,
        candidates=options.candidates,
        history=options.history,
        seconds=options.seconds,
        swaps=options.swaps,
        stops=options.stops,
        malformed=options.malformed,
        examples=options.examples,
    )
    config.requests()  # refuses a folder that is no exported ranker
    options.output.mkdir(parents=True, exist_ok=True)
    passed = _run_parts(config, options.parts)
    print_results(options.output)
    return passed


def _run_parts(config: "LoadConfig", names: Sequence[PartName]) -> bool:
    from experiments.load_checks import Part, read_results, write_part
    from experiments.load_fuzz import fuzz
    from experiments.load_rates import rates
    from experiments.load_stops import stops
    from experiments.load_swaps import swaps

    passed: list[bool] = []

    def keep(name: str, part: Part) -> None:
        write_part(config.output, name, part)
        passed.extend(check.passed for check in part.checks)
        say(f"{name}: {'passed' if all(check.passed for check in part.checks) else 'FAILED'}")

    rate = read_results(config.output).get("parts", {}).get("saturation", {}).get("rate_per_s")
    if timed := [name for name in names if name in ("saturation", "half", "overload")]:
        rate = rates(config, timed, rate, keep)
    others: dict[str, Callable[[], Part]] = {
        "swaps": lambda: swaps(config, _known(rate)),
        "stop": lambda: stops(config, _known(rate)),
        "fuzz": lambda: fuzz(config),
    }
    for name, part in others.items():
        if name in names:
            say(f"{name} ...")
            keep(name, part())
    return all(passed)


def _known(rate: float | None) -> float:
    if rate is None:
        raise BadInputError("no saturation rate is known yet: run the part 'saturation' first")
    return rate


def _check(options: Options) -> None:
    least = {"seconds": _LEAST_SECONDS, **dict.fromkeys(_COUNTS, 1)}
    for name, lowest in least.items():
        if getattr(options, name) < lowest:
            raise BadInputError(
                f"--{name} must be at least {lowest:g}, got {getattr(options, name)}"
            )


_COUNTS = ("swaps", "stops", "malformed", "examples", "workers", "candidates", "history")


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Take SIGTERM like Ctrl-C, so that the service that was started ends too."""
    del number, frame
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
