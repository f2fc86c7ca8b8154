"""A small ranker with made-up transforms and tables, and batches of made-up requests for it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tiny_dataset import KINDS, PRODUCTS

from embeddings.tables import EmbeddingTable, write_table
from features.batch import RequestBatch
from features.transforms import LevelTransforms, fit
from ranking.config import ModelConfig, RankerConfig, TrainingConfig, TransformConfig
from ranking.pretrained_embeddings import PretrainedTable
from ranking.ranker import Ranker

EMBEDDING_DIM = 8
KNOWN = 20  # products 100 … 119 and queries 500 … 519 have embeddings


def model_config(**changes: object) -> ModelConfig:
    """Return a small shape."""
    small = {
        "embedding_dim": 4,
        "cross_layers": 2,
        "cross_rank": 3,
        "deep": (8, 6),
        "projection": 4,
        "tower_deep": (7, 5),
        "head": (6,),
        "count_sharpness": (2.0, 16.0),
        "count_windows": (7, 30, 84),
    }
    return ModelConfig(**small | changes)


def tiny_config(*, training: dict[str, object] | None = None, **model: object) -> RankerConfig:
    """Return a configuration that trains on the tiny dataset in about a second."""
    chosen = {
        "epochs": 3,
        "batch_rows": 128,
        "chunk_groups": 2,
        "learning_rate": 0.01,
        "precision": "float32",
        "device": "cpu",
        "threads": 1,
    }
    return RankerConfig(
        model=model_config(**model),
        training=TrainingConfig(**chosen | (training or {})),
        transforms=TransformConfig(bins=8),
    )


def pretrained_tables(seed: int = 0, dtype: type = np.float32) -> dict[str, PretrainedTable]:
    random = np.random.default_rng(seed)
    return {
        name: PretrainedTable(
            ids=np.arange(first, first + KNOWN),
            weight=random.normal(size=(KNOWN, EMBEDDING_DIM)).astype(dtype),
        )
        for name, first in (("product", 100), ("query", 500))
    }


def tiny_ranker(seed: int = 0, dtype: type = np.float32, **changes: object) -> Ranker:
    """Return a ranker whose trained weights are all drawn anew, biases too."""
    config = model_config(**changes)
    tables = pretrained_tables(dtype=dtype) if config.embedding_tower else None
    torch.manual_seed(seed)
    ranker = Ranker(config, _transforms(1), _transforms(2), tables, sparse_learning_rate=0.1)
    for name, tensor in ranker.trained_state().items():
        if not name.startswith("pretrained"):
            with torch.no_grad():
                tensor.normal_(0, 0.4)
    return ranker


def _transforms(seed: int) -> LevelTransforms:
    random = np.random.default_rng(seed)
    part = random.integers(0, 6, (2, 300)), random.normal(size=(2, 300)).astype(np.float32)
    return fit(["a", "b"], ["x", "y"], [part], min_count=5, bins=4)


def tiny_batch(
    lengths: Sequence[int], history_lengths: Sequence[int], seed: int = 0
) -> RequestBatch:
    """Return random requests that count 1 or 2.5; one in five ids or values is not known."""
    random = np.random.default_rng(seed)
    requests, candidates, items = len(lengths), sum(lengths), sum(history_lengths)

    def ids(first: int, number: int) -> torch.Tensor:
        return torch.from_numpy(random.integers(first, first + KNOWN * 5 // 4, number))

    def sparse(number: int) -> torch.Tensor:
        return torch.from_numpy(random.integers(0, 8, (2, number)))

    def dense(number: int) -> torch.Tensor:
        values = random.normal(size=(2, number)).astype(np.float32)
        return torch.from_numpy(np.where(random.random((2, number)) < 0.2, np.nan, values)).float()

    return RequestBatch(
        lengths=torch.tensor(lengths, dtype=torch.int64),
        query=ids(500, requests),
        history=ids(100, items),
        history_lengths=torch.tensor(history_lengths, dtype=torch.int64),
        request_sparse=sparse(requests),
        request_dense=dense(requests),
        product=ids(100, candidates),
        candidate_sparse=sparse(candidates),
        candidate_dense=dense(candidates),
        clicked=torch.from_numpy(random.integers(0, 2, candidates)).float(),
        history_age=torch.from_numpy(random.integers(0, 85, items).astype(np.int16)),
        weight=torch.from_numpy(random.choice([1.0, 2.5], requests)).float(),
    )


def changed(batch: RequestBatch, **fields: torch.Tensor) -> RequestBatch:
    """Return a batch with some of its fields replaced."""
    names = RequestBatch.__dataclass_fields__
    return RequestBatch(**{name: getattr(batch, name) for name in names} | fields)


def take_requests(batch: RequestBatch, order: Sequence[int]) -> RequestBatch:
    """Return requests of a batch in an order of their places; one may come several times."""
    of_candidates = ("product", "candidate_sparse", "candidate_dense", "clicked")
    lengths = dict.fromkeys(of_candidates, batch.lengths)
    lengths |= dict.fromkeys(("history", "history_age"), batch.history_lengths)
    ones = torch.ones_like(batch.lengths)

    def taken(name: str) -> torch.Tensor:
        parts = getattr(batch, name).split(lengths.get(name, ones).tolist(), dim=-1)
        return torch.cat([parts[place] for place in order], dim=-1)

    return RequestBatch(**{name: taken(name) for name in RequestBatch.__dataclass_fields__})


def write_tiny_tables(
    folder: Path,
    *,
    seed: int = 0,
    dim: int = EMBEDDING_DIM,
    fingerprint: str = "tiny",
    dtype: type = np.float16,
    more_products: Sequence[int] = (),
) -> Path:
    """Write random embedding tables for the products and queries of the tiny dataset."""
    random = np.random.default_rng(seed)
    products = [1000 + 7 * number for number in range(PRODUCTS)]
    known = {"product": pa.array(products, pa.int64()), "query": pa.array(list(KINDS))}
    vectors = {name: random.normal(size=(len(ids), dim)) for name, ids in known.items()}
    if more_products:
        known["product"] = pa.array([*products, *more_products], pa.int64())
        more = random.normal(size=(len(more_products), dim))
        vectors["product"] = np.concatenate([vectors["product"], more])
    for name, ids in known.items():
        write_table(
            folder / f"{name}.parquet",
            EmbeddingTable(
                ids=ids,
                embedding=vectors[name].astype(dtype),
                fingerprint=fingerprint,
                normalized=False,
            ),
        )
    return folder
