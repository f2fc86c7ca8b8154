"""One measurement of the ranker in a process of its own: ``python -m experiments.scaling_step``.

It prints one JSON line. The process is its own so that its peak memory is that of this case, and so
that what one case leaves in the caches and the allocator does not meet the next.

Legend: ``B`` requests, ``C`` candidates, ``H`` purchases of one history.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import torch
import tyro
from torch import Tensor

from experiments.synthetic_world import schema
from features.batch import RecordFiles, RequestBatch, level_features
from features.id_map import hash_strings
from features.record_files import ROW_GROUP, record_writer
from features.schema import LEVELS
from features.transforms import LevelTransforms, fit
from ranking.config import ModelConfig, TrainingConfig
from ranking.encoded import EncodedBatch, offsets
from ranking.pretrained_embeddings import PretrainedTable
from ranking.ranker import Ranker
from ranking.training import Progress, Trainer, seeded

if TYPE_CHECKING:
    from ranking.config import TableMode

CANDIDATES = 24
_QUERIES = 1_000
_WARM_UP_STEPS = 10
_POOL_ROUNDS = 9
_POOL_ROWS = 16_384
_BATCH_ROWS = 4_096


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Measure a training step, or the pooling of histories, over made-up requests.

    Every id is drawn evenly from the whole table: real ones repeat, and meet the caches more often.
    """

    what: Literal["step", "pooling"]
    products: int
    """Rows of the product table."""
    dimension: int
    """Of product and query embeddings."""
    history: int
    """Purchases of each request."""
    tables: Literal["frozen", "fine-tuned"]
    """How the product and query tables take part."""
    rows: int
    """Candidates to train on."""
    threads: int
    """Cores to train on."""


def main() -> None:
    """Measure and print one JSON line."""
    options = tyro.cli(Options)
    measure = train_steps if options.what == "step" else pool_histories
    print(json.dumps(measure(options)))  # noqa: T201 - the driver reads this line


def train_steps(options: Options) -> dict[str, float]:
    """Return rows/s of the training loop as it is used, reading and encoding included."""
    records = make_records(options)
    ranker = make_ranker(options, records)
    config = TrainingConfig(batch_rows=_BATCH_ROWS, chunk_groups=4, threads=options.threads)
    ticks: list[tuple[float, int]] = []

    def on_step(progress: Progress, loss: float) -> None:
        del loss
        ticks.append((time.perf_counter(), progress.rows))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.parquet"
        with record_writer(path, records.schema) as writer:
            writer.write_table(records, row_group_size=ROW_GROUP)
        rows = len(records) * CANDIDATES
        Trainer(ranker, schema(), RecordFiles.open([path]), rows, config).run(on_step=on_step)
    (begin, first), (end, last) = ticks[_WARM_UP_STEPS], ticks[-1]
    return {
        "rows_per_second": (last - first) / (end - begin),
        "table_bytes": ranker.pretrained.embedding_bags["product"].weight.nbytes,  # type: ignore[union-attr]
    }


def pool_histories(options: Options) -> dict[str, float]:
    """Return what a batch costs with each history pooled for its request, or for each candidate.

    ``request_pooling`` and ``candidate_pooling`` are seconds a row of the pooling alone,
    ``request_forward`` and ``candidate_forward`` of the whole forward pass, where the second
    computes all that belongs to the request once for each candidate.
    """
    torch.set_num_threads(1)
    records = make_records(replace(options, rows=_POOL_ROWS))
    ranker = make_ranker(options, records)
    by_request = ranker.encode(RequestBatch.from_records(records, schema()))
    by_candidate = one_candidate_each(by_request)
    pretrained = ranker.pretrained
    assert pretrained is not None

    def pool(batch: EncodedBatch) -> Tensor:
        return pretrained.pool("purchase_history", batch.history, batch.history_offsets)

    with torch.no_grad():
        torch.testing.assert_close(ranker(by_request), ranker(by_candidate), rtol=1e-3, atol=1e-3)
        return {
            "request_pooling": _seconds(lambda: pool(by_request)) / by_request.rows,
            "candidate_pooling": _seconds(lambda: pool(by_candidate)) / by_request.rows,
            "request_forward": _seconds(lambda: ranker(by_request)) / by_request.rows,
            "candidate_forward": _seconds(lambda: ranker(by_candidate)) / by_request.rows,
        }


def make_records(options: Options) -> pa.Table:
    """Return request records of `CANDIDATES` candidates and full histories, drawn evenly."""
    random = np.random.default_rng(0)
    requests = max(1, options.rows // CANDIDATES)
    candidates, purchases = requests * CANDIDATES, requests * options.history

    def lists(values: np.ndarray, length: int) -> pa.Array:
        starts = np.arange(requests + 1, dtype=np.int32) * np.int32(length)
        return pa.ListArray.from_arrays(pa.array(starts), pa.array(values))

    def shown(values: np.ndarray) -> pa.Array:
        return lists(values, CANDIDATES)

    query = random.integers(0, _QUERIES, requests)
    bought = random.integers(0, options.products, purchases)
    ages = random.integers(0, 84, purchases).astype(np.int16)
    return pa.table(
        {
            "query": pa.array([f"query {number}" for number in query]),
            "purchase_history": lists(bought, options.history),
            "purchase_age_days": lists(ages, options.history),
            "store": pa.array(random.integers(0, 50, requests)),
            "hour": pa.array(random.integers(0, 24, requests)),
            "segment": pa.array(random.integers(0, 8, requests)),
            "product_id": shown(random.integers(0, options.products, candidates)),
            "clicked": shown(random.random(candidates) < 0.1),
            "brand": shown(random.integers(0, 100, candidates)),
            "position": shown(np.tile(np.arange(CANDIDATES), requests)),
            "price": shown(random.lognormal(1, 0.7, candidates).astype(np.float32)),
            "discount": shown(random.random(candidates, np.float32)),
            "rating": shown(random.random(candidates, np.float32)),
        }
    )


def make_ranker(options: Options, records: pa.Table) -> Ranker:
    """Return a ranker of the default shape with tables of the size asked for."""
    mode: TableMode = options.tables
    random = np.random.default_rng(1)
    queries = pa.array([f"query {number}" for number in range(_QUERIES)])
    ids = {"product": np.arange(options.products), "query": hash_strings(queries)}
    vectors = {
        name: random.normal(size=(min(len(known), _QUERIES), options.dimension))
        for name, known in ids.items()
    }
    tables = {}
    for name, known in ids.items():
        # Rows may be alike: what a lookup costs depends on where they lie, not on what they hold.
        weight = vectors[name].astype(np.float16)
        if len(known) > len(weight):
            weight = np.broadcast_to(weight[0], (len(known), options.dimension))
        tables[name] = PretrainedTable(ids=known, weight=weight)
    request, candidate = _transforms(records)
    with seeded(0):
        return Ranker(ModelConfig(tables=mode), request, candidate, tables)


def one_candidate_each(batch: EncodedBatch) -> EncodedBatch:
    """Return the batch with each candidate as a request of its own, history and all."""
    of = batch.request_of_candidate()
    lengths = batch.history_offsets.diff()[of]
    starts = batch.history_offsets[of]
    places = torch.arange(int(lengths.sum())) - torch.repeat_interleave(
        offsets(lengths)[:-1] - starts, lengths
    )
    return replace(
        batch,
        request_rows=batch.request_rows[:, of],
        request_dense=batch.request_dense[of],
        candidate_offsets=torch.arange(batch.rows + 1),
        query=batch.query[of],
        history=batch.history[places],
        history_age=batch.history_age[places],
        history_offsets=offsets(lengths),
        weight=batch.weight[of],
    )


def _transforms(records: pa.Table) -> list[LevelTransforms]:
    declared = schema()
    return [
        fit(
            declared.names("sparse", level),
            declared.names("dense", level),
            [level_features(records, declared, level)],
            min_count=1,
            bins=40,
        )
        for level in LEVELS
    ]


def _seconds(work: Callable[[], Tensor]) -> float:
    """Return the median time of a call, the first one left out."""
    work()
    taken = []
    for _ in range(_POOL_ROUNDS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return median(taken)


if __name__ == "__main__":
    main()
