"""The serving benchmark's figures as tables, on the terminal, in Markdown and as a page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from experiments.ranking_plots import standalone
from experiments.serving_cases import FETCHED, FUSED, find_case
from experiments.serving_document import POPULARITIES
from experiments.serving_plots import pictures
from features.console import print_table, say
from features.files import write_text
from features.page import Table, render

SERVING_JSON = "serving.json"
SERVING_MD = "serving.md"
REPORT = "report.html"

_NOTHING = "–"  # noqa: RUF001
_PERCENTILES = ("p50_ms", "p90_ms", "p99_ms", "p999_ms")


def write_results(output: Path, document: Mapping[str, Any]) -> None:
    """Print the tables and write ``serving.json``, ``serving.md``, the plots and ``report.html``.

    Args:
        output: folder to write into.
        document: the content of ``serving.json``.
    """
    found, drawn = tables(document), pictures(document)
    title = f"Serving {document['dataset']}"
    write_text(output / SERVING_MD, _markdown(title, document, found))
    for name, picture in drawn.items():
        write_text(output / f"{name}.svg", standalone(picture.svg))
    page = render(
        Path(__file__).with_name("serving.html"),
        title=title,
        subtitle=_machine(document),
        caveat=document["caveat"],
        note=note(document),
        tables=found,
        pictures=list(drawn.values()),
        again="page",
        command=document["command"],
        origin={"Exported ranker": document["model"]},
        versions=document["versions"],
    )
    write_text(output / REPORT, page)
    write_text(output / SERVING_JSON, json.dumps(document, indent=2, allow_nan=False) + "\n")
    for table in found:
        rows = [[escape(cell) for cell in row] for row in table.rows]
        print_table(escape(table.title), table.header, rows)
    say(f"Report: {output / REPORT}")


def note(document: Mapping[str, Any]) -> str:
    """Return what the reader of the tables must know."""
    machine, plan = document["machine"], document["plan"]
    cores = (machine["model_core"], machine["redis_core"])
    where = "on cores that the system chooses"
    if cores[0] is not None:
        where = f"the model on core {cores[0]}, Redis on core {cores[1]}"
        if machine["redis"]:
            where = f"the model on core {cores[0]}, Redis at {machine['redis']}"
    return (
        f"One thread, {where}. Product and query tables of {plan['rows']:,} rows each: the run's "
        "own and random ones. Requests have features of real requests; ids are drawn by Zipf's law "
        "(the k-th most popular one in proportion to 1/k) or uniformly. Fused: ids in, tables in "
        "the model, made of the run as export-ranker makes them. Fetched: candidates, query and "
        "purchases from Redis over TCP in one pipeline of MGET, float16; redis-py "
        f"{_parser(document)}, the thinnest client parses nothing. The garbage "
        "collector of Python is off while a case is timed. p99.9 of fewer than 5,000 requests "
        "rests on few of them. The compiled model (pt2) has the run's own tables."
    )


def _parser(document: Mapping[str, Any]) -> str:
    versions = document["versions"]
    compiled = f"with the compiled parser hiredis {versions.get('hiredis')}"
    return compiled if "hiredis" in versions else "with its parser in Python (no hiredis)"


def _machine(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores; load average at the start "
        f"{machine['load_average']:.2f}"
    )


def tables(document: Mapping[str, Any]) -> list[Table]:
    """Return all tables, the one that tells the most first."""
    return [
        _headline(document),
        _compared(document),
        _stages(document),
        _variants(document),
        _load(document),
        _limits(document),
    ]


def _headline(document: Mapping[str, Any]) -> Table:
    found = document["headline"]
    lines = [
        ("fused p99, ms", "fused_p99_ms", f"≤ {found['fused_p99_ms_at_most']:g}"),
        (
            "fused p50 over the limit",
            "fused_p50_over_limit",
            f"≤ {found['fused_p50_over_limit_at_most']:g}",
        ),
        ("… over the limit with the model's own products", "fused_p50_over_limit_at_shapes", ""),
        (
            "fetched p99 over fused p99",
            "fetched_over_fused_p99",
            f"≥ {found['fetched_over_fused_p99_at_least']:g}",
        ),
        ("… delay of a network that would make it so, ms", "delay_ms_to_wanted", ""),
        ("… with the thinnest client", "fetched_thin_over_fused_p99", ""),
        ("fetching over the dense part, means", "fetching_over_dense", ""),
        ("… with the thinnest client", "fetching_thin_over_dense", ""),
    ]
    return Table(
        title=f"{found['candidates']} candidates, history of {found['history']}",
        header=["", *POPULARITIES, "wanted"],
        rows=[
            [title, *(f"{found[p][key]:.3f}" for p in POPULARITIES), wanted]
            for title, key, wanted in lines
        ],
    )


def _compared(document: Mapping[str, Any]) -> Table:
    rows = []
    for shape in _shapes(document):
        fused, fetched = (find_case(document["cases"], v, shape) for v in (FUSED, FETCHED))
        assert fused is not None
        assert fetched is not None
        rows.append(
            [
                f"{shape[0]:,}",
                str(shape[1]),
                *_percentiles(fused),
                *_percentiles(fetched),
                f"{fetched['p99_ms'] / fused['p99_ms']:.1f}",
            ]
        )
    names = ("p50", "p90", "p99", "p99.9")
    return Table(
        title="Fused and fetched, ms",
        header=[
            "candidates",
            "history",
            *(f"fused {name}" for name in names),
            *(f"fetched {name}" for name in names),
            "p99 ratio",
        ],
        rows=rows,
    )


def _shapes(document: Mapping[str, Any]) -> list[tuple[int, int]]:
    plan = document["plan"]
    return [(c, h) for h in plan["histories"] for c in plan["candidates"]]


def _stages(document: Mapping[str, Any]) -> Table:
    columns = ("lookups", "fetch", "decode", "pool", "dense", "score")
    shown = [
        case
        for case in document["cases"]
        if case["runtime"] == "torchscript"
        and (_is(case, FUSED) or case["mode"] == "fetched")
        and case["popularity"] == "zipf"
    ]
    used = [c for c in columns if any(c in case["stages_ms"] for case in shown)]
    return Table(
        title="Stages, mean ms",
        header=["", "candidates", "history", *used, "processor", "Redis's processor", "preempted"],
        rows=[
            [
                _name(case),
                f"{case['candidates']:,}",
                str(case["history"]),
                *(_number(case["stages_ms"].get(name, {}).get("mean")) for name in used),
                _number(case["cpu_ms"]),
                _number(case.get("redis_cpu_ms")),
                str(case["preempted"]),
            ]
            for case in shown
        ],
        note=(
            "Dense: all but the product and query tables, the sparse features' tables included; of "
            "a fused model it is measured by itself, and lookups are the difference. Processor: "
            "time a request. Preempted: how often other work took the core away while "
            "the case was timed; many mean that the machine was not quiet."
        ),
    )


def _variants(document: Mapping[str, Any]) -> Table:
    shape = (document["headline"]["candidates"], document["headline"]["history"])
    quality = document["quality"]
    rows = []
    for about in document["variants"]:
        case = next(
            case
            for case in document["cases"]
            if _same(case, about) and (case["candidates"], case["history"]) == shape
        )
        change = None
        if about["mode"] == "fused":
            change = quality["tables"][about["table_dtype"]]["auc_change"]
        rows.append(
            [
                _name(about),
                *_percentiles(case),
                f"{about['model_bytes'] / 1e6:,.0f}",
                _number(about["rss_mb"], "{:,.0f}"),
                _number(about.get("redis_rss_mb"), "{:,.0f}"),
                _number(change, "{:+.5f}"),
                _number(about["largest_difference"], "{:.1e}"),
            ]
        )
    return Table(
        title=f"Ways to serve, {shape[0]} candidates, history of {shape[1]}",
        header=[
            *("", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "model MB", "process MB"),
            *("Redis MB", "AUC change", "largest difference"),
        ],
        rows=rows,
        note=(
            f"AUC of {quality['requests']:,} evaluation requests: {quality['auc']:.5f} of the "
            "trained ranker; change with each type of tables. Largest difference: in probability, "
            "from the float32 TorchScript."
        ),
    )


def _load(document: Mapping[str, Any]) -> Table:
    return Table(
        title="Requests arriving at random at a fixed rate, ms from the moment planned",
        header=["", "share of capacity", "requests/s", "p50", "p90", "p99", "p99.9", "requests"],
        rows=[
            [
                _name(case),
                f"{case['load']:.0%}",
                f"{case['offered_per_second']:,.0f}",
                *_percentiles(case),
                f"{case['requests']:,}",
            ]
            for case in document["load"]
        ],
        note="The waits between arrivals are exponential, whether or not the last is answered.",
    )


def _limits(document: Mapping[str, Any]) -> Table:
    cases = [case for case in document["cases"] if _is(case, FUSED)]
    rates = document["rates"]
    return Table(
        title="The limit of a fused request",
        header=[
            *("candidates", "history", "ids", "row kB", "weights kB", "multiply-adds"),
            *("rows ms", "weights ms", "arithmetic ms", "limit ms", "p50 ms", "p50 / limit"),
            "p50 / limit, own products",
        ],
        rows=[
            [
                f"{case['candidates']:,}",
                str(case["history"]),
                case["popularity"],
                f"{case['row_bytes'] / 1e3:,.0f}",
                f"{case['weight_bytes'] / 1e3:,.0f}",
                f"{case['multiply_adds']:,}",
                *(_number(case[f"{part}_ms"]) for part in ("rows", "weights", "arithmetic")),
                _number(case["limit_ms"]),
                _number(case["p50_ms"]),
                f"{case['p50_ms'] / case['limit_ms']:.2f}",
                f"{case['p50_ms'] / case['limit_at_shapes_ms']:.2f}",
            ]
            for case in cases
        ],
        note=(
            "Rates of one core in this run: rows of 256 bytes at random "
            f"{rates['gather_gb_per_second']['zipf']:.1f} (Zipf) and "
            f"{rates['gather_gb_per_second']['uniform']:.1f} (uniform) GB/s, reading in order "
            f"{rates['stream_gb_per_second']:.1f} GB/s, the dense weights again and again "
            f"{rates['weights_gb_per_second']:.1f} GB/s, a large square product "
            f"{rates['square_product_gflop_per_second']:.0f} GFLOP/s. Own products: the limit with "
            "the time that the model's own, smaller products take."
        ),
    )


def _is(case: Mapping[str, Any], variant: Any) -> bool:
    return (case["mode"], case["runtime"], case["table_dtype"], case["client"]) == (
        *(variant.mode, variant.runtime, variant.table_dtype, variant.client),
    )


def _same(case: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
    names = ("mode", "runtime", "table_dtype", "client")
    return case["popularity"] == "zipf" and all(case[n] == about[n] for n in names)


def _name(about: Mapping[str, Any]) -> str:
    words = [about["mode"], about["runtime"], about["table_dtype"], about["client"]]
    return " ".join(word for word in words if word)


def _percentiles(case: Mapping[str, Any]) -> list[str]:
    return [_number(case[name]) for name in _PERCENTILES]


def _number(value: float | None, form: str = "{:.3f}") -> str:
    return _NOTHING if value is None else form.format(value)


def _markdown(title: str, document: Mapping[str, Any], found: Sequence[Table]) -> str:
    lines = [f"# {title}", "", _machine(document), ""]
    if document["caveat"]:
        lines += [f"**Mind the data.** {document['caveat']}", ""]
    lines += [note(document), ""]
    for table in found:
        lines += [f"## {table.title}", "", _row(table.header), _row(["---"] * len(table.header))]
        lines += [_row(row) for row in table.rows]
        lines += ["", *([table.note, ""] if table.note else [])]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines += ["## Provenance", "", f"`{document['command']}`", "", f"{versions}."]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
