"""Measures how fast DashCLIP's own training steps and encoder are, and against which peak.

A stage is stepped by the loop that trains it. The arithmetic of a step is counted by torch's
``FlopCounterMode``: matrix products, convolutions and attention, forward and backward, as executed;
the peak is what one large matrix product reaches on the same machine in the same run.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop
from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig

from embeddings import distributed
from embeddings.alignment import Alignment
from embeddings.catalog import CATALOG, RELEVANCE, Catalog, read_catalog
from embeddings.config import DashClipTraining, StageConfig
from embeddings.corpus import Corpus
from embeddings.dashclip import DashClip, DashClipConfig
from embeddings.dashclip_encoder import DashClipEncoder
from embeddings.freezing import freeze
from embeddings.images import ImageFaults
from embeddings.pretraining import Pretraining
from embeddings.products import Products
from embeddings.relevance import MODERATE, Relevance, read_relevance
from embeddings.sampling import TupleSampler
from embeddings.stage import Progress, Stage, StageLoop
from embeddings.starts import Start
from embeddings.text_encoder import TextEncoder
from features import columns
from features.errors import BadInputError
from features.hardware import Precision
from features.parquet import parquet_files

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_COUNTED = 3  # steps whose arithmetic is counted
_PRODUCTS_TO_ENCODE = {"cpu": 512, "cuda": 8192}  # at least, if the sample has as many
_QUERIES_TO_ENCODE = 2048
_PEAK_ROUNDS = 5
_VOCABULARY = 30_524  # BERT's and [DEC], [ENC]

# Attention on the CPU has a name of its own, which the counter does not know.
_aten = torch.ops.aten
_ATTENTION_ON_CPU: dict[Any, Any] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


class _EnoughError(Exception):
    """The steps are done; the loop would save and evaluate next, which is not measured."""


class Trial:
    """The stages of a training on a sample of a dataset, set up as ``train-dashclip`` does.

    Args:
        start: the model to train.
        config: of the training.
        data: the sample, of `sample_dataset`.
        work: folder for scratch files.
        bfloat16: whether matrix products are in bfloat16.
    """

    def __init__(
        self, start: Start, config: DashClipTraining, data: Path, work: Path, *, bfloat16: bool
    ) -> None:
        self.catalog = read_catalog(data)
        self.relevance: Relevance | None = None
        if (data / RELEVANCE).exists():
            self.relevance = read_relevance(data, self.catalog)
        self._start = start
        self._model = start.model.to(distributed.device())
        self._config = config
        self._work = work
        self._bfloat16 = bfloat16
        self._corpus = Corpus(self.catalog, start, config, work, bfloat16)

    def stage_1(self, steps: int) -> dict[str, Any] | None:
        """Return the figures of stage 1, as `measure_stage` does; ``None`` without images."""
        config = _one_epoch(self._config.pretraining)
        if not self._model.config.reads_images:
            return None
        depth = freeze(self._model, config.frozen_layers, Pretraining.name)
        self._model.eval()
        started = time.perf_counter()
        products = self._corpus.products(self._model, depth)
        frozen = self._frozen(products, time.perf_counter() - started)
        rows, none = self._corpus.pairs(0.0)
        if not len(rows):
            return None
        stage = Pretraining(self._model, config, products, rows, none, seed=self._config.seed)
        return self._measure(stage, steps) | frozen

    def stage_2(self, steps: int) -> dict[str, Any] | None:
        """Return the figures of stage 2; ``None`` without relevance labels."""
        config = _one_epoch(self._config.alignment)
        if self.relevance is None:
            return None
        depth = freeze(self._model, config.frozen_layers, Alignment.name)
        self._model.eval()
        started = time.perf_counter()
        products = self._corpus.products(self._model, depth)
        frozen = self._frozen(products, time.perf_counter() - started)
        queries = self._corpus.queries(self._model, depth, self.relevance.queries)
        sampler = TupleSampler(
            self.relevance, self.catalog.aisles(), config.sampling, seed=self._config.seed
        )
        stage = Alignment(self._model, config, products, queries, sampler)
        return self._measure(stage, steps) | frozen

    def encoding(self) -> dict[str, float | None]:
        """Return what `measure_encoding` does, of the model as it is."""
        precision: Precision = "bfloat16" if self._bfloat16 else "float32"
        encoder = DashClipEncoder.of(
            self._model, self._start.tokenizer, "measured", precision=precision
        )
        queries = self.relevance.queries if self.relevance else []
        return measure_encoding(encoder, self.catalog, queries)

    def _measure(self, stage: Stage, steps: int) -> dict[str, Any]:
        return measure_stage(
            stage, self._model, steps=steps, bfloat16=self._bfloat16, scratch=self._work
        )

    def _frozen(self, products: Products, seconds: float) -> dict[str, Any]:
        """Return what it took to compute once what frozen layers say of the sample's products."""
        kept = products.titles.bytes + (products.images.bytes if products.images else 0)
        return {
            "frozen_kept": bool(kept),
            "frozen_bytes_per_product": kept / len(self.catalog),
            "frozen_seconds_per_product": seconds / len(self.catalog),
        }


def measure_stage(
    stage: Stage, model: DashClip, *, steps: int, bfloat16: bool, scratch: Path
) -> dict[str, Any]:
    """Return the speed of a stage's training steps and their arithmetic.

    The first steps are taken twice: under the counter, which also warms up, and on the clock.

    Args:
        stage: what to train; its epoch is long enough for 2 steps or more, and it has nothing to
            evaluate.
        model: the encoders; changed in place.
        steps: how many to time, fewer if the epoch is shorter.
        bfloat16: whether matrix products are in bfloat16.
        scratch: folder for the loop.

    Raises:
        BadInputError: the sample is smaller than two batches.
    """

    def run(count: int) -> tuple[int, list[float]]:
        """Take ``count`` steps and return the batch and the time at the end of each."""
        ends: list[float] = []

        def on_step(progress: Progress, figures: dict[str, float]) -> None:
            _synchronize(model.device)
            ends.append(time.perf_counter())
            if len(ends) == count:
                raise _EnoughError

        loop = StageLoop(
            stage,
            model,
            checkpoint=scratch / "none.safetensors",
            seconds=math.inf,
            patience=0,
            bfloat16=bfloat16,
            seed=0,
        )
        if loop.steps < 2:
            raise BadInputError(
                f"{stage.name}: {stage.examples:,} examples make one batch of {loop.batch}; "
                "measure more products or smaller batches"
            )
        count = min(count, loop.steps)
        with suppress(_EnoughError):
            loop.run(on_step)
        return loop.batch, ends

    run(1)  # what precedes the first step (mining) is no part of a step
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU) as counter:
        _, counted = run(_COUNTED)
    batch, ends = run(steps + 1)
    seconds = np.diff(ends)
    flops = counter.get_total_flops() / len(counted)
    return {
        "name": stage.name,
        "batch": batch,
        "steps": len(seconds),
        "seconds_per_step": float(seconds.mean()),
        "median_seconds_per_step": float(np.median(seconds)),
        "pairs_per_second": batch / float(seconds.mean()),
        "flops_per_pair": flops / batch,
        "flops_per_second": flops / float(seconds.mean()),
    }


def measure_peak(device: torch.device, side: int) -> dict[str, float]:
    """Return the FLOP/s of a product of two square matrices by precision, the best of a few.

    Args:
        device: where to multiply.
        side: of the matrices.
    """
    peak = {}
    for name, dtype in PRECISIONS.items():
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        torch.mm(a, b)
        best = min(_timed(partial(torch.mm, a, b), device) for _ in range(_PEAK_ROUNDS))
        peak[name] = 2 * side**3 / best
    return peak


def measure_encoding(
    encoder: DashClipEncoder, catalog: Catalog, queries: Sequence[str]
) -> dict[str, float | None]:
    """Return texts or products a second; ``None`` for what there is nothing of.

    ``products_with_image`` counts the decoding of the image files, ``images_decoded`` that alone.
    """
    ids: list[int] = []
    titles: list[str] = []
    blobs: list[bytes | None] = []
    for batch in catalog.with_images():
        ids += batch[0]
        titles += batch[1]
        blobs += batch[2]
        if len(ids) >= _PRODUCTS_TO_ENCODE[encoder.device.type]:
            break
    pictured = [row for row, blob in enumerate(blobs) if blob is not None and encoder.reads_images]
    names = [titles[row] for row in pictured]

    def decode() -> list[Any]:
        faults = ImageFaults(1.0)
        return faults.decode([ids[row] for row in pictured], [blobs[row] for row in pictured])

    def rate(count: int, work: Callable[[], object]) -> float | None:
        return count / _timed(work, encoder.device) if count else None

    encoder.encode_products(titles[:32])
    encoder.encode_queries(titles[:32])
    if pictured:
        encoder.encode_products(names[:32], decode()[:32])
    asked = list(queries[:_QUERIES_TO_ENCODE])
    return {
        "products_with_image": rate(
            len(pictured), lambda: encoder.encode_products(names, decode())
        ),
        "products_text_only": rate(len(titles), lambda: encoder.encode_products(titles)),
        "queries": rate(len(asked), lambda: encoder.encode_queries(asked)),
        "images_decoded": rate(len(pictured), decode),
    }


def sample_dataset(data: Path, folder: Path, products: int) -> Path:
    """Write a dataset folder of some products, those with a relevant query first; returns it.

    Args:
        data: the whole dataset.
        folder: is made where missing.
        products: how many; all where the dataset has fewer.
    """
    catalog = read_catalog(data)
    order = np.random.default_rng(0).permutation(len(catalog))
    if (data / RELEVANCE).exists():
        found = read_relevance(data, catalog)
        lacking = ~np.isin(order, found.product[found.label >= MODERATE])
        order = order[np.argsort(lacking, kind="stable")]
    rows = np.sort(order[:products])
    ids = catalog.product_ids.take(pa.array(rows))
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CATALOG, RELEVANCE):
        if not (data / name).exists():
            continue
        parts = []
        for path in parquet_files(data / name):
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(4096):
                    ours = pc.is_in(batch.column(columns.PRODUCT_ID).cast(pa.int64()), ids)
                    parts.append(batch.filter(ours))
        pq.write_table(pa.Table.from_batches(parts), folder / name)
    return folder


def blip_base(image_size: int, seed: int) -> Start:
    """Return encoders in the shape of BLIP-base, with random weights: it has their speed.

    ViT-B/16 and BERT-base with cross-attention, as in ``Salesforce/blip-itm-base-coco``.

    Args:
        image_size: side of the images in pixels: 224 in BLIP-14M, 384 in its fine-tuned kin.
        seed: of the weights.
    """
    shape = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }
    tokenizer = AutoTokenizer.from_pretrained(TextEncoder.packaged().folder)
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DashClip(
            DashClipConfig(
                text_config=BlipTextConfig(vocab_size=_VOCABULARY, **shape),
                vision_config=BlipVisionConfig(image_size=image_size, patch_size=16, **shape),
                grounded_token_id=tokenizer.convert_tokens_to_ids("[ENC]"),
            )
        )
    return Start(model=model.eval(), tokenizer=tokenizer)


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, threads, versions, other work at the time."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def _cpu_name() -> str:
    """Return the processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((s.partition(":")[2].strip() for s in lines if s.startswith("model name")), "?")


def _one_epoch(config: Any) -> Any:
    """Return a stage's configuration without limits of its own."""
    assert isinstance(config, StageConfig)
    return replace(config, epochs=1, limit=0)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that ``work`` takes on its device."""
    _synchronize(device)
    started = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
