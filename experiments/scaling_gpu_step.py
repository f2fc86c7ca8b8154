"""Training on one device, its lookups and its dense layers, each against what the device can do.

``python -m experiments.scaling_gpu_step`` prints one JSON line; the process is its own so that no
case meets the memory of another. What the device can do is measured in the same process, as the
speed of a copy and of a large matrix product.

Legend: ``B`` requests, ``C`` candidates, ``H`` purchases of all histories, ``E`` embedding dim.
"""

import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any, Literal

import pyarrow as pa
import torch
import tyro
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from experiments.scaling_step import CANDIDATES, make_ranker, make_records
from experiments.scaling_step import Options as Sizes
from experiments.synthetic_world import schema
from features.batch import RecordFiles, RequestBatch
from features.record_files import ROW_GROUP, record_writer
from ranking.config import TrainingConfig
from ranking.device import training_device, training_precision
from ranking.device_model import DeviceModel
from ranking.device_step import DeviceStep
from ranking.device_training import DeviceTrainer
from ranking.encoded import EncodedBatch
from ranking.parallel import ParallelStep
from ranking.ranker import Ranker
from ranking.step import Step, StepInput
from ranking.training import Progress, Trainer, one_thread

_WARM_UP = 5  # steps or calls that are not timed
_CALLS = 5  # between two looks at the clock
_COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
_MATRIX = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Measure training on a device over made-up requests, every id drawn evenly from its table."""

    device: Literal["cpu", "cuda"]
    """Where to train."""
    batch_rows: int
    """Candidates in a batch."""
    rows: int
    """Candidates to train on."""
    products: int
    """Rows of the product table."""
    dimension: int
    """Of product and query embeddings."""
    history: int
    """Purchases of each request."""
    tables: Literal["frozen", "fine-tuned"]
    """How the product and query tables take part."""
    on_device: float
    """Share of all tables' bytes that a GPU's memory may take up."""
    threads: int
    """Cores to train on."""
    rounds: int = 9
    """How often each lookup and layer is timed."""


def main() -> None:
    """Measure and print one JSON line."""
    print(json.dumps(measure_device(tyro.cli(Options))))  # noqa: T201 - the driver reads this line


def measure_device(options: Options) -> dict[str, Any]:
    """Return the figures of a device.

    Returns:
        ``device``: its name; ``rows_per_second`` of the training loop as it is used, reading and
        encoding included; ``step_rows_per_second`` of its steps on batches that are encoded;
        ``places``: how many tables lie where; ``lookup``: bytes/s read and written by the lookups
        of product and query tables, of a copy (``peak``), and the ``share``; ``dense``: the same
        in operations/s of the dense layers' forward and backward pass against a matrix product.
    """
    device = training_device(options.device)
    records = make_records(_sizes(options))
    found: dict[str, Any] = {"device": _name(device), "batch_rows": options.batch_rows}
    found["rows_per_second"] = _training(options, records, device)
    ranker = make_ranker(_sizes(options), records)
    batches = _batches(ranker, records, options)
    model = None
    if device.type == "cuda":
        model = DeviceModel(ranker, device, _budget(ranker, options))
        found["places"] = _counts([place.where for place in model.places.values()])
    found["step_rows_per_second"] = _steps(ranker, batches, options, device)
    moved = [step.batch.to(device) for step in batches]
    with one_thread():
        torch.set_num_threads(options.threads)
        found["lookup"] = _lookup(ranker, moved, device, options.rounds)
        found["dense"] = _dense(ranker, moved, device, options.rounds)
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return found


def _sizes(options: Options) -> Sizes:
    return Sizes(
        what="step",
        products=options.products,
        dimension=options.dimension,
        history=options.history,
        tables=options.tables,
        rows=options.rows,
        threads=options.threads,
    )


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _counts(names: list[str]) -> dict[str, int]:
    return {name: names.count(name) for name in sorted(set(names))}


def _budget(ranker: Ranker, options: Options) -> int | None:
    """Return how many bytes tables may take of a GPU; None where they may take what is free."""
    if options.on_device >= 1:
        return None
    values = options.products * options.dimension * (2 if options.tables == "frozen" else 4)
    beside = 16 * sum(len(ids) for ids in _ids(ranker))
    return int(options.on_device * values) + beside + (64 << 20)


def _ids(ranker: Ranker) -> list[Tensor]:
    assert ranker.pretrained is not None
    return [found.get_buffer("ids") for found in ranker.pretrained.id_maps.values()]


def _training(options: Options, records: pa.Table, device: torch.device) -> float:
    """Return rows/s of the training loop, the first steps left out."""
    ranker = make_ranker(_sizes(options), records)
    config = TrainingConfig(
        batch_rows=options.batch_rows, chunk_groups=32, threads=options.threads, device="cpu"
    )
    ticks: list[tuple[float, int]] = []

    def on_step(progress: Progress, loss: float) -> None:
        del loss
        ticks.append((time.perf_counter(), progress.rows))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.parquet"
        with record_writer(path, records.schema) as writer:
            writer.write_table(records, row_group_size=ROW_GROUP)
        arguments = (ranker, schema(), RecordFiles.open([path]), len(records) * CANDIDATES, config)
        if device.type == "cuda":
            budget = _budget(ranker, options)
            trainer: Trainer = DeviceTrainer(*arguments, device=device, budget=budget)
        else:
            trainer = Trainer(*arguments)
        trainer.run(on_step=on_step)
    (begin, first), (end, last) = ticks[min(_WARM_UP, len(ticks) // 2)], ticks[-1]
    return (last - first) / (end - begin)


def _batches(ranker: Ranker, records: pa.Table, options: Options) -> list[StepInput]:
    encoded = ranker.encode(RequestBatch.from_records(records, schema()))
    return [
        StepInput(batch=batch, rows=batch.rows, weight=batch.total_weight())
        for batch in encoded.split(options.batch_rows)
    ]


def _steps(
    ranker: Ranker, batches: list[StepInput], options: Options, device: torch.device
) -> float:
    """Return rows/s of steps whose batches lie encoded in the machine's memory."""
    bfloat16 = training_precision("auto", device) == "bfloat16"
    adam = torch.optim.AdamW(ranker.dense_parameters(), lr=1e-3, fused=True)
    step: Step = (
        DeviceStep(ranker, device, bfloat16=bfloat16)
        if device.type == "cuda"
        else ParallelStep(ranker, options.threads, bfloat16=bfloat16)
    )

    def losses(given: list[StepInput]) -> Iterator[tuple[int, Any]]:
        for one in step.ahead(given):
            yield one.rows, step(one.batch, one.weight)
            adam.step()

    with one_thread(), closing(step):
        for _ in step.behind(losses(batches[:_WARM_UP])):
            pass
        started = time.perf_counter()
        rows = sum(rows for rows, _ in step.behind(losses(batches)))
        return rows / (time.perf_counter() - started)


def _lookup(
    ranker: Ranker, batches: list[EncodedBatch], device: torch.device, rounds: int
) -> dict[str, float]:
    turns = cycle(batches)  # other rows each time, or they would lie in the caches
    with torch.no_grad():
        taken = seconds(lambda: ranker._pretrained(next(turns)), device, rounds)
    speed = sum(map(lookup_bytes, batches, [ranker] * len(batches))) / len(batches) / taken
    source = torch.empty(_COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    peak = 2 * source.nbytes / seconds(lambda: target.copy_(source), device, rounds)
    return {"bytes_per_second": speed, "peak": peak, "share": speed / peak}


def lookup_bytes(batch: EncodedBatch, ranker: Ranker) -> int:
    """Return what the lookups of product and query tables read and write, rows and results."""
    assert ranker.pretrained is not None
    dims = {c.name: c.embedding_dim for c in ranker.pretrained.embedding_bag_configs()}
    frozen = ranker.config.tables == "frozen"
    size = 4
    if frozen:
        size = ranker.pretrained.embedding_bags["product"].get_buffer("weight").element_size()
    requests, products = len(batch.query), len(batch.product)
    read = (products + len(batch.history)) * dims["product"] + requests * dims["query"]
    written = (products + requests) * dims["product"] + requests * dims["query"]
    return size * read + 4 * written


def _dense(
    ranker: Ranker, batches: list[EncodedBatch], device: torch.device, rounds: int
) -> dict[str, float]:
    batch = batches[0]
    with torch.no_grad():
        inputs = ranker.trained_lookups(batch) | ranker.frozen_lookups(batch)
    request_c = batch.request_of_candidate()
    bfloat16 = training_precision("auto", device) == "bfloat16"

    def work() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            logits = ranker.dense(inputs, request_c)
        return torch.autograd.grad(logits.float().sum(), ranker.dense_parameters())[0]

    with FlopCounterMode(display=False) as counter:
        work()
    speed = counter.get_total_flops() / seconds(work, device, rounds)
    size, kind = _MATRIX[device.type], torch.bfloat16 if bfloat16 else torch.float32
    matrix = torch.ones(size, size, dtype=kind, device=device)
    peak = 2 * size**3 / seconds(lambda: matrix @ matrix, device, rounds)
    return {"operations_per_second": speed, "peak": peak, "share": speed / peak}


def seconds(work: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Return the median time of a call, the first ones left out; a GPU is waited for."""
    taken = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        for _ in range(_CALLS):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append((time.perf_counter() - started) / _CALLS)
    return median(taken[1:])


if __name__ == "__main__":
    main()
