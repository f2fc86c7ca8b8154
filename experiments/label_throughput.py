r"""How fast ``label-relevance label`` goes over pairs whose answers are known, and in what memory.

::

    label-relevance fine-tune --split SPLIT --grader similarity.toml --output runs/similarity
    python -m experiments.label_throughput --data data/home-depot --grader runs/similarity \
        --output runs/label-throughput

Distinct pairs of the dataset's queries and titles are graded once, which fills a cache; that part
carries on where it was stopped. The command then labels a tenth of them, and all, into new folders,
each in a process of its own whose time and memory are measured. Any grader will do; one that is
quick saves waiting. Keep the machine free of other work.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from features.console import print_table, run_command, say
from features.errors import BadInputError
from features.files import atomic_file, write_text

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

JSON = "label_throughput.json"

_PAIRS = "pairs-{:d}.parquet"
_CACHE = "answers.sqlite"
_TILE = 64  # queries, and titles, that follow each other: graders encode each text once


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Measure how fast known pairs are labelled, and the memory that it takes."""

    data: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Dataset folder whose queries and titles make the pairs."""
    grader: Annotated[Path, tyro.conf.arg(metavar="TOML|DIR")]
    """The grader that fills the cache."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of label_throughput.json, the cache and the labels."""
    pairs: int = 1_000_000
    """How many pairs; a tenth of them is labelled too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""

    def action(options: Options) -> None:
        _show(label_throughput(options, command=" ".join(sys.argv)))

    return run_command(Options, action, prog="label_throughput", arguments=arguments)


def label_throughput(options: Options, *, command: str = "") -> dict[str, Any]:
    """Measure and write ``label_throughput.json``; returns its content.

    Raises:
        BadInputError: the dataset cannot be read or has too few queries and titles, or the command
            fails.
    """
    from embeddings.catalog import read_catalog, read_queries

    if options.pairs < 10:
        raise BadInputError(f"--pairs must be 10 or more, got {options.pairs}")
    options.output.mkdir(parents=True, exist_ok=True)
    catalog, queries = read_catalog(options.data), read_queries(options.data)
    sizes = (options.pairs // 10, options.pairs)
    pairs = _distinct_pairs(queries, _one_of_each_title(catalog.product_ids, catalog.titles), sizes)
    for size in sizes:
        with atomic_file(options.output / _PAIRS.format(size)) as scratch:
            _write_pairs(scratch, pairs.slice(0, size))
    say(f"filling the cache with {options.pairs:,} answers")
    filled = _label(options, options.pairs, options.output / "filled", fresh=False)
    figures: dict[str, Any] = {"command": command, "filled": filled}
    runs = [_label(options, size, options.output / f"warm-{size}", fresh=True) for size in sizes]
    content = figures | {"runs": runs, "seconds_by_stage": _stages(options, catalog)}
    write_text(options.output / JSON, json.dumps(content, indent=2) + "\n")
    return content


def _one_of_each_title(product_ids: "pa.Array", titles: "pa.Array") -> "np.ndarray":
    """Return the id of one product of each title."""
    found = dict(zip(titles.to_pylist(), product_ids.to_pylist(), strict=True))
    found.pop(None, None)
    import numpy as np

    return np.array(list(found.values()), np.int64)


def _distinct_pairs(
    queries: Sequence[str], products: "np.ndarray", sizes: Sequence[int]
) -> "pa.Table":
    """Return the most pairs asked for, each once: tiles of queries and products, one after another.

    Raises:
        BadInputError: there are too few queries and products.
    """
    import numpy as np
    import pyarrow as pa

    pairs = sizes[-1]
    across, along = -(-len(queries) // _TILE), -(-len(products) // _TILE)
    if len(queries) * len(products) < pairs:
        raise BadInputError(
            f"{len(queries):,} queries and {len(products):,} titles make fewer than {pairs:,} pairs"
        )
    query, product, found = [], [], 0
    # Along the diagonals, so that few tiles meet many queries and many titles.
    for number in range(across * along):
        tile = np.arange(_TILE)
        row = number % across
        column = (number // across + row) % along
        q, p = np.meshgrid(row * _TILE + tile, column * _TILE + tile, indexing="ij")
        inside = (q < len(queries)) & (p < len(products))
        query.append(q[inside])
        product.append(products[p[inside]])
        found += int(inside.sum())
        if found >= pairs:
            break
    texts = pa.array(queries).take(pa.array(np.concatenate(query)[:pairs]))
    return pa.table({"query": texts, "product_id": np.concatenate(product)[:pairs]})


def _write_pairs(path: Path, pairs: "pa.Table") -> None:
    import pyarrow.parquet as pq

    pq.write_table(pairs, path)


def _label(options: Options, pairs: int, output: Path, *, fresh: bool) -> dict[str, Any]:
    """Run the command in a process of its own; return its time, its speed and its memory."""
    if fresh:
        shutil.rmtree(output, ignore_errors=True)
    arguments = {
        "--data": options.data,
        "--grader": options.grader,
        "--output": output,
        "--pairs": options.output / _PAIRS.format(pairs),
        "--cache": options.output / _CACHE,
    }
    command = [sys.executable, "-m", "embeddings.labeling.cli", "label", "--yes"]
    command += [str(part) for pair in arguments.items() for part in pair]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BadInputError(f"label-relevance label ended with status {process.returncode}")
    found = json.loads((output / "labels.json").read_text(encoding="utf-8"))
    run = found["run"]
    return {
        "pairs": pairs,
        "labelled": found["labelled"],
        "from_cache": run["from_cache"],
        "asked": run["asked"],
        "asked_per_second": run["asked_per_second"],
        "process_seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "seconds": run["seconds"],
        "pairs_per_second": run["pairs_per_second"],
        "peak_rss_mib": usage.ru_maxrss / 1024,
        "model": found["grader"]["model"],
    }


@dataclass(slots=True)
class _Timer:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def _stages(options: Options, catalog: Any) -> dict[str, float]:
    """Return the seconds of each stage of labelling all pairs from the cache, in this process."""
    from embeddings.labeling.cache import AnswerCache, answer_keys
    from embeddings.labeling.grades import Pairs
    from embeddings.labeling.label_files import part_path, write_part
    from embeddings.labeling.open_grader import open_grader
    from embeddings.labeling.pair_files import Titles, select_given

    grader, titles, timer = open_grader(options.grader), Titles(catalog), _Timer()
    output = options.output / "stages"
    shutil.rmtree(output, ignore_errors=True)
    with timer.of("choosing pairs"):
        pairs = options.output / _PAIRS.format(options.pairs)
        selection = select_given(pairs, catalog, output)
    with AnswerCache(options.output / _CACHE) as cache:
        for number, size in enumerate(selection.chunks()):
            with timer.of("reading pairs and titles"):
                table = selection.read(number, size)
                asked = Pairs(
                    queries=table.column("query").to_pylist(),
                    titles=titles.of(table.column("product_id").to_numpy()),
                )
            with timer.of("hashing"):
                keys = answer_keys(grader.fingerprint, asked)
            with timer.of("look-up"):
                grades = cache.look_up(keys)
            with timer.of("writing labels"):
                write_part(part_path(output, number), table, grades, grader)
    shutil.rmtree(output)
    return timer.seconds


def _show(figures: dict[str, Any]) -> None:
    runs = [("filling the cache", figures["filled"])]
    runs += [(f"{run['pairs']:,} known pairs", run) for run in figures["runs"]]
    rows = [
        (
            name,
            f"{run['labelled']:,}",
            f"{run['asked']:,}",
            f"{run['pairs_per_second']:,.0f}",
            f"{run['process_seconds']:,.1f}",
            f"{run['processor_seconds']:,.1f}",
            f"{run['peak_rss_mib']:,.0f}",
        )
        for name, run in runs
    ]
    header = [
        "run",
        "labelled",
        "asked",
        "pairs/s",
        "s of the process",
        "s of processor",
        "peak MiB",
    ]
    print_table("label-relevance label", header, rows)
    stages = figures["seconds_by_stage"]
    total = sum(stages.values())
    shares = [(stage, f"{took:.2f}", f"{took / total:.0%}") for stage, took in stages.items()]
    print_table("where the time goes, all pairs", ["stage", "s", "share"], shares)


if __name__ == "__main__":
    sys.exit(main())
