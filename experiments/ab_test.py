"""``python -m experiments.ab_test``: the lifts of an online test, as the paper's Table 3 has them.

The paper's test (Section 4.3.1) is consumer-bucketed: users are dealt to control and treatment, as
`serving.ab_routing` does, and the service logs what it showed. Outcomes come from elsewhere.
"""

import math
import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

from features.console import run_command, say
from features.errors import BadInputError

PROG = "python -m experiments.ab_test"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Report what a treatment did to click-through rate, conversion rate and revenue.

    Reads the exposures that serve-ranker logged and their outcomes; writes ab_test.json and
    ab_test.md. Intervals are at 95 %, by the delta method, clustered by user.
    """

    exposures: Annotated[Path, tyro.conf.arg(metavar="PATH")]
    """Exposure log: a file, or a folder of .jsonl and .parquet files."""
    outcomes: Annotated[Path, tyro.conf.arg(metavar="PATH")]
    """Parquet file or folder with request_id, product_id, clicked and, where known, converted and
    revenue; products that nothing came of may be left out."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The folder to write."""
    treatment_share: float = 0.5
    """Share of the users that was to get the treatment."""
    plan_lift: float = 0.01
    """Relative lift for which to say how many users show it."""
    shown: int | None = None
    """How many of the ranked candidates the users saw; all where not given."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(Options, _evaluate, prog=PROG, arguments=arguments)


def _evaluate(options: Options) -> None:
    _check(options)
    from experiments.ab_test_data import read_observations
    from experiments.ab_test_metrics import evaluate
    from experiments.ab_test_report import print_results, write_results

    say(f"reading {options.exposures} and {options.outcomes}")
    observations = read_observations(
        options.exposures, options.outcomes, options.output / ".scratch", shown=options.shown
    )
    found = evaluate(
        observations, treatment_share=options.treatment_share, plan_lift=options.plan_lift
    )
    origin = {"exposures": str(options.exposures), "outcomes": str(options.outcomes)}
    document = origin | {"shown": options.shown} | found | {"command": _command(options)}
    write_results(options.output, document)
    print_results(document)


def _check(options: Options) -> None:
    if not 0 < options.treatment_share < 1:
        share = options.treatment_share
        raise BadInputError(f"--treatment-share must be between 0 and 1, got {share}")
    if not math.isfinite(options.plan_lift) or options.plan_lift <= -1 or options.plan_lift == 0:
        lift = options.plan_lift
        raise BadInputError(f"--plan-lift must be above -1 and other than 0, got {lift}")
    if options.shown is not None and options.shown < 1:
        raise BadInputError(f"--shown must be 1 or more, got {options.shown}")


def _command(options: Options) -> str:
    """Return the command line that gives these options."""
    words = PROG.split()
    for field in fields(options):
        value = getattr(options, field.name)
        if value != field.default:
            words += [f"--{field.name.replace('_', '-')}", str(value)]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())
