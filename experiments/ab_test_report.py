"""What an A/B test has to show: ``ab_test.json``, ``ab_test.md`` and tables on the terminal."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.ab_test_statistics import Interval
from features.console import print_table, stdout
from features.files import write_text

AB_TEST_JSON = "ab_test.json"
AB_TEST_MD = "ab_test.md"
_NOTHING = "–"  # noqa: RUF001
_POWER = (("detectable_lift", "{:.2%}"), ("users_needed", "{:,}"))


def write_results(output: Path, document: Mapping[str, Any]) -> None:
    """Write ``ab_test.md`` and ``ab_test.json`` to a folder."""
    write_text(output / AB_TEST_MD, _markdown(document))
    write_text(output / AB_TEST_JSON, json.dumps(document, indent=2, allow_nan=False) + "\n")


def print_results(document: Mapping[str, Any]) -> None:
    """Print the tables and the warnings to standard output."""
    for title, header, rows in _tables(document):
        print_table(title, header, rows)
    for warning in document["warnings"]:
        stdout.print(
            f"WARNING: {warning}", style="bold red", markup=False, highlight=False, soft_wrap=True
        )


def _tables(document: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    metrics = document["metrics"]
    plan = f"{document['plan_lift']:+.1%}"
    return [
        (
            "Lift of the treatment",
            [
                *("metric", "control", "treatment", "lift", "95 % interval", "p"),
                *("absolute lift", "95 % interval"),
            ],
            [_lift_row(metric) for metric in metrics],
        ),
        (
            "Power of 80 % at the 5 % level",
            ["metric", "smallest lift seen with these users", f"users to see {plan}"],
            [
                [metric["title"], *(_or_nothing(metric.get(name), form) for name, form in _POWER)]
                for metric in metrics
            ],
        ),
        ("Users", ["", "control", "treatment", "share", "planned", "p"], [_users_row(document)]),
    ]


def _lift_row(metric: Mapping[str, Any]) -> list[str]:
    values = [metric[bucket] and metric[bucket]["value"] for bucket in ("control", "treatment")]
    absolute, relative = metric.get("absolute_lift"), metric.get("relative_lift")
    return [
        metric["title"],
        *(_or_nothing(value, "{:.5g}") for value in values),
        _or_nothing(relative and relative["value"], "{:+.2%}"),
        _interval(relative and relative["interval"], "{:+.2%}"),
        _or_nothing(metric.get("p_value"), "{:.2g}"),
        _or_nothing(absolute and absolute["value"], "{:+.3g}"),
        _interval(absolute and absolute["interval"], "{:+.3g}"),
    ]


def _users_row(document: Mapping[str, Any]) -> list[str]:
    users, found = document["users"], document["sample_ratio"]
    return [
        "users",
        *(f"{users[bucket]:,}" for bucket in ("control", "treatment")),
        f"{found['share']:.2%}",
        f"{found['planned_share']:.2%}",
        f"{found['p_value']:.2g}",
    ]


def _or_nothing(value: float | None, form: str) -> str:
    return _NOTHING if value is None else form.format(value)


def _interval(interval: Interval | None, form: str) -> str:
    return _NOTHING if interval is None else " to ".join(form.format(end) for end in interval)


def _markdown(document: Mapping[str, Any]) -> str:
    period, counts = document["period"], document["counts"]
    lines = ["# A/B test", "", f"{period['first']} to {period['last']}.", ""]
    for warning in document["warnings"]:
        lines += [f"> **Warning.** {warning}", ""]
    for title, header, rows in _tables(document):
        lines += [
            f"## {title}",
            "",
            _row(header),
            _row(["---"] * len(header)),
            *map(_row, rows),
            "",
        ]
    lines += ["## What the metrics are", ""]
    lines += [f"- **{metric['title']}**: {metric['definition']}." for metric in document["metrics"]]
    lines += [
        "",
        "Intervals and p values: delta method, clustered by user; p is of the absolute lift and is "
        "not corrected for the number of metrics. The interval of a relative lift is also of the "
        "control's own error, so that where p is close to .05 the two may disagree. The sample "
        "ratio is a chi-square test of the users against the planned share.",
        "",
        f"Read: {counts['exposures']:,} exposures, of which {counts['repeated']:,} repeat a "
        f"request and {counts['outside']:,} belong to no bucket; {counts['outcomes']:,} outcomes, "
        f"of which {counts['outcomes_not_shown']:,} belong to no exposure.",
        "",
        f"`{document['command']}`",
    ]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
