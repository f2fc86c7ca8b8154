r"""Training throughput of the ranker beside FuxiCTR's DCNv2 and DeepCTR-Torch's DCN.

All train on the same features with the same embedding dim, cross and deep sizes, batch and number
of threads, in their own training loops. The peers live in environments of their own (see
``experiments/throughput_peers``); one that is not given is left out::

    python -m experiments.throughput --data data/complete-journey --output runs/throughput \
        --fuxictr-python .venv-peers/fuxictr/bin/python \
        --deepctr-python .venv-peers/deepctr/bin/python

The contestants take turns, so that a slow spell of the machine meets all of them; the table shows
medians over the rounds.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from features.console import print_table, run_command, say
from features.errors import BadInputError
from features.files import atomic_file, write_text
from features.schema import DatasetSchema

if TYPE_CHECKING:
    from experiments.flat_table import FlatTable, Vocabularies

_SCRIPTS = Path(__file__).parent / "throughput_peers"
# Name, environment, script and its arguments.
_PEERS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("FuxiCTR DCNv2", "fuxictr", "fuxictr_dcnv2.py", ()),
    ("FuxiCTR DCNv2, ready batches", "fuxictr", "fuxictr_dcnv2.py", ("--loader", "memory")),
    ("DeepCTR-Torch DCN, matrix", "deepctr", "deepctr_dcn.py", ("--cross", "matrix")),
    ("DeepCTR-Torch DCN, vector", "deepctr", "deepctr_dcn.py", ("--cross", "vector")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Compare the training throughput of the ranker with that of its peers."""

    data: Path
    """Dataset folder, with its request records in `requests/`."""
    output: Path
    """Folder that receives throughput.json and the rows for the peers."""
    fuxictr_python: Path | None = None
    """Python of an environment with FuxiCTR."""
    deepctr_python: Path | None = None
    """Python of an environment with DeepCTR-Torch."""
    weeks: int = 8
    """Number of training weeks, the last before the evaluation week, to take rows from."""
    rounds: int = 3
    """How often each contestant runs."""
    embedding_dim: int = 16
    """Width of each sparse feature's embedding."""
    cross_layers: int = 2
    """Full-matrix cross layers."""
    deep: tuple[int, ...] = (128, 64)
    """Widths of the deep network."""
    batch_size: int = 8192
    """Rows a step."""
    threads: int = 2
    """Threads of each contestant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A command that trains and prints one JSON line with ``rows_per_second``.

    Attributes:
        name: as the table shows it.
        command: program and arguments.
    """

    name: str
    command: tuple[str, ...]


def export_rows(table: "FlatTable", vocabularies: "Vocabularies", target: Path) -> None:
    """Write what the peers train on, as one ``.npz``.

    Arrays: ``codes`` int32 ``[C, F]``, ``vocabulary`` int64 ``[F]`` (number of codes of each
    sparse feature), ``dense`` float32 ``[C, D]`` (standardised, missing values at the mean, 0),
    ``clicked`` bool ``[C]``.
    """
    mean = np.nanmean(table.values, axis=0, dtype=np.float64)
    spread = np.nanstd(table.values, axis=0, dtype=np.float64)
    dense = (table.values - mean) / np.where(spread > 0, spread, 1)
    with atomic_file(target) as scratch, scratch.open("wb") as file:
        np.savez(
            file,
            codes=table.codes,
            vocabulary=vocabularies.sizes,
            dense=np.nan_to_num(dense).astype(np.float32),
            clicked=table.clicked,
        )


def contestants(options: Options, rows: Path, weeks: range) -> list[Contestant]:
    """Return who takes part; a peer without an environment is told on standard error.

    Args:
        options: of the command.
        rows: the ``.npz`` of `export_rows`.
        weeks: training weeks of those rows.
    """
    sizes = (
        *("--embedding-dim", str(options.embedding_dim)),
        *("--cross-layers", str(options.cross_layers)),
        *("--deep", ",".join(map(str, options.deep))),
        *("--batch-size", str(options.batch_size)),
        *("--threads", str(options.threads)),
    )
    found = [
        Contestant(
            name=f"ours, {variant}",
            command=(
                *(sys.executable, "-m", "experiments.throughput_ours"),
                *("--records", str(options.data / "requests")),
                *("--weeks", *map(str, weeks)),
                *("--variant", variant),
                *sizes,
            ),
        )
        for variant in ("dcn", "two-tower", "recipe")
    ]
    pythons = {"fuxictr": options.fuxictr_python, "deepctr": options.deepctr_python}
    for name, environment, script, extra in _PEERS:
        python = pythons[environment]
        if python is None:
            say(f"{name}: left out, --{environment}-python is not given")
            continue
        command = (str(python), str(_SCRIPTS / script), "--data", str(rows), *sizes, *extra)
        found.append(Contestant(name=name, command=command))
    return found


def measure(contestant: Contestant, threads: int) -> dict[str, Any]:
    """Run one contestant and return the JSON object of its last line.

    Raises:
        BadInputError: it failed, or its last line is no such object.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(
        contestant.command, env=environment, capture_output=True, text=True, check=False
    )
    lines = done.stdout.strip().splitlines()
    try:
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(lines[-1])
            found["rows_per_second"] = float(found["rows_per_second"])
            return found
    except (IndexError, ValueError, KeyError, TypeError):
        pass
    said = (done.stderr.strip().splitlines() or lines or ["nothing"])[-1]
    raise BadInputError(
        f"{contestant.name}: '{contestant.command[0]}' ended with status {done.returncode} "
        f"without a result; it said: {said}"
    )


def summarize(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return for each contestant its median and the ratio of the first one's median to it."""
    medians = {
        name: median(run["rows_per_second"] for run in found) for name, found in runs.items()
    }
    first = next(iter(medians.values()))
    return [
        {
            "name": name,
            "rows_per_second": value,
            "first_to_this": round(first / value, 3),
            "runs": runs[name],
        }
        for name, value in medians.items()
    ]


def run(options: Options) -> None:
    """Export rows, let the contestants take turns, print the table, write ``throughput.json``."""
    rows, weeks = _export(options)
    taking_part = contestants(options, rows, weeks)
    runs: dict[str, list[dict[str, Any]]] = {one.name: [] for one in taking_part}
    for turn in range(1, options.rounds + 1):
        for one in taking_part:
            found = measure(one, options.threads)
            runs[one.name].append(found)
            say(f"round {turn}: {one.name}: {found['rows_per_second']:,.0f} rows/s")
    summary = summarize(runs)
    print_table(
        f"Training throughput, {options.threads} threads, batch {options.batch_size}",
        ("", "rows/s", f"{taking_part[0].name} / this"),
        [
            (one["name"], f"{one['rows_per_second']:,.0f}", f"{one['first_to_this']:.2f}")
            for one in summary
        ],
    )
    settings = {k: v for k, v in asdict(options).items() if not isinstance(v, Path)}
    document = {"settings": settings, "rows": summary}
    write_text(options.output / "throughput.json", json.dumps(document, indent=2) + "\n")


def _export(options: Options) -> tuple[Path, range]:
    from experiments.flat_table import FlatTable, Vocabularies
    from features.requests import RequestsManifest

    schema = DatasetSchema.load(options.data)
    manifest = RequestsManifest.load(options.data / "requests")
    end = schema.weeks.evaluate if schema.weeks else max(manifest.weeks)
    weeks = range(end - options.weeks, end)
    vocabularies = Vocabularies.fit(manifest, weeks, schema)
    table = FlatTable.read(manifest, weeks, schema, vocabularies)
    say(f"{len(table):,} rows of weeks {weeks[0]} to {weeks[-1]}")
    rows = options.output / "rows.npz"
    export_rows(table, vocabularies, rows)
    return rows, weeks


def main() -> int:
    """Run the command line."""
    return run_command(Options, run, prog="python -m experiments.throughput")


if __name__ == "__main__":
    sys.exit(main())
