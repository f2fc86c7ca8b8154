"""The served models that ``benchmark-serving`` compares, each built in a process of its own."""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from experiments.serving_cases import Variant
from experiments.serving_fetching import Client
from experiments.serving_workload import grown_table
from features.batch import RequestBatch
from features.errors import BadInputError
from ranking.bundle import TABLES, Bundle
from ranking.explain_sample import BUNDLE
from ranking.pretrained_embeddings import PretrainedTable
from ranking.ranker import Ranker
from serving.compiled import load_compiled
from serving.embedding_table import TableDtype
from serving.inputs import InputSpec
from serving.online_ranker import OnlineRanker
from serving.raw_requests import tensors_of
from serving.scripted import scripted

Score = Callable[..., Tensor]
Integers = npt.NDArray[np.int64]

FETCH_STAGES = ("fetch", "decode", "pool", "dense")


def open_ranker(run: Path) -> Ranker:
    """Open the ranker of a training run."""
    return Bundle.open(run / BUNDLE).ranker


def check_servable(ranker: Ranker, where: str) -> None:
    """Check that tables can be fused into a ranker, and fetched in their place.

    Raises:
        BadInputError: it reads no frozen product and query tables, or it needs the embedding of
            every purchase.
    """
    if ranker.pretrained is None or ranker.config.tables != "frozen":
        raise BadInputError(
            f"{where}: this model reads no frozen product and query tables, so that there is "
            "nothing to fuse or to fetch; name a run with them"
        )
    if ranker.history_counts is not None:
        raise BadInputError(
            f"{where}: this model has 'history_counts', and what is fetched is the history's mean "
            "only; name a run without them"
        )


def tables_of(ranker: Ranker) -> dict[str, PretrainedTable]:
    """Return the ranker's product and query tables."""
    assert ranker.pretrained is not None
    found = {}
    for name in TABLES:
        weight = ranker.pretrained.embedding_bags[name].get_buffer("weight")
        ids = ranker.pretrained.id_maps[name].get_buffer("ids")
        found[name] = PretrainedTable(ids=ids[1:].numpy(), weight=weight[1:].numpy())
    return found


def grown_tables(ranker: Ranker, rows: int, seed: int) -> dict[str, PretrainedTable]:
    """Return the ranker's tables with ``rows`` rows each; see `grown_table`."""
    return {name: grown_table(table, rows, seed) for name, table in tables_of(ranker).items()}


def without_tables(ranker: Ranker) -> None:
    """Leave the ranker with tables of one row, as a process holds that fetches all others."""
    first = {name: grown_table(table, 1, 0) for name, table in tables_of(ranker).items()}
    ranker.replace_tables(first)


class FetchedRanker(nn.Module):
    """The online ranker without its product and query tables: embeddings come from outside.

    Args:
        online: the whole, without counts in the history, which need every purchase's embedding.
    """

    def __init__(self, online: OnlineRanker) -> None:
        super().__init__()
        self.online = online

    def forward(
        self,
        lengths: Tensor,
        request_ids: Tensor,
        request_values: Tensor,
        candidate_ids: Tensor,
        candidate_values: Tensor,
        product_ce: Tensor,
        query_be: Tensor,
        history_be: Tensor,
    ) -> Tensor:
        """Return the probability [C] of a click on each candidate.

        Args:
            lengths: see `serving.online_ranker.OnlineRanker.forward`, as for the next four.
            request_ids: [S, B].
            request_values: [D, B].
            candidate_ids: [S, C].
            candidate_values: [D, C].
            product_ce: [C, E] float32.
            query_be: [B, E] float32.
            history_be: [B, E] float32, the mean of the purchases' embeddings.
        """
        inputs = {
            "request": self.online.request(request_ids, request_values),
            "candidate": self.online.candidate(candidate_ids, candidate_values),
            "product": product_ce,
            "query": query_be,
            "history": history_be,
        }
        request_c = torch.repeat_interleave(lengths, output_size=product_ce.shape[0])
        return torch.sigmoid(self.online.dense(inputs, request_c))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model ready to answer.

    Attributes:
        score: from what ``arguments`` gives to probabilities.
        dense: from the inputs of `FetchedRanker` to probabilities; None where the runtime has none.
        bytes: of all its tensors.
        arguments: from a request to what the runtime takes.
    """

    score: Score
    dense: Score | None
    bytes: int
    arguments: Callable[[RequestBatch], tuple[Any, ...]] = tensors_of


def build(
    ranker: Ranker, variant: Variant, example: RequestBatch, inputs: InputSpec
) -> ServedModel:
    """Make a ranker ready to serve, in eager torch or as TorchScript.

    Args:
        ranker: a trained one, with the tables to serve.
        variant: its runtime and type of tables.
        example: a request to trace with.
        inputs: names and types of the features.
    """
    dtype = cast(TableDtype, "float32" if variant.mode == "fetched" else variant.table_dtype)
    online = OnlineRanker(ranker, dtype)
    fetched: Any = FetchedRanker(online).eval()
    size = sum(tensor.nbytes for tensor in online.state_dict().values())
    if variant.runtime == "eager":
        return ServedModel(score=online, dense=fetched, bytes=size)
    vectors = torch.randn(len(example.product), tables_of(ranker)["product"].weight.shape[1])
    arguments = dense_arguments(example, vectors, vectors[:1], vectors[:1])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript's deprecation
        dense = torch.jit.freeze(torch.jit.trace(fetched, arguments, check_trace=False))
    module: Any = scripted(online, example, inputs)
    return ServedModel(score=module.score, dense=dense, bytes=size)


def open_package(path: Path) -> ServedModel:
    """Load the float32 model that was compiled ahead of time."""
    return ServedModel(
        score=load_compiled(path),
        dense=None,
        bytes=path.stat().st_size,
        arguments=lambda request: (request,),
    )


class FusedServer:
    """Answers requests with a model that holds its tables. One stage, ``score``."""

    stages = ("score",)

    def __init__(self, model: ServedModel, requests: Sequence[RequestBatch]) -> None:
        self._score = model.score
        self._arguments = [model.arguments(request) for request in requests]

    def __call__(self, number: int) -> list[int]:
        """Answer a request; returns when that was done."""
        self._score(*self._arguments[number])
        return [time.perf_counter_ns()]

    def probabilities(self, number: int) -> list[float]:
        """Return the answer to a request."""
        return self._score(*self._arguments[number]).tolist()


class FetchingServer:
    """Answers requests with embeddings that it reads from Redis first.

    Args:
        model: without tables.
        client: reads the embeddings.
        requests: to answer.
    """

    stages = FETCH_STAGES

    def __init__(
        self, model: ServedModel, client: Client, requests: Sequence[RequestBatch]
    ) -> None:
        assert model.dense is not None
        self._score = model.dense
        self._client = client
        self._requests = requests
        self._ids = [(torch.cat([r.product, r.history]).numpy(), r.query.numpy()) for r in requests]

    def __call__(self, number: int) -> list[int]:
        """Answer a request; returns when each stage ended."""
        return self._answer(number)[0]

    def probabilities(self, number: int) -> list[float]:
        """Return the answer to a request."""
        return self._answer(number)[1].tolist()

    def _answer(self, number: int) -> tuple[list[int], Tensor]:
        answer = self._client.fetch(*self._ids[number])
        marks = [time.perf_counter_ns()]
        vectors = torch.from_numpy(answer()).float()
        marks.append(time.perf_counter_ns())
        request = self._requests[number]
        count = request.product.shape[0]
        bought = vectors[count:-1]
        history = bought.mean(0, keepdim=True) if len(bought) else torch.zeros_like(vectors[:1])
        marks.append(time.perf_counter_ns())
        found = self._score(*dense_arguments(request, vectors[:count], vectors[-1:], history))
        marks.append(time.perf_counter_ns())
        return marks, found


class DenseServer:
    """Answers requests with embeddings that are there already: what the dense part alone takes."""

    stages = ("dense",)

    def __init__(self, model: ServedModel, requests: Sequence[RequestBatch], dim: int) -> None:
        assert model.dense is not None
        self._score = model.dense
        rng = torch.Generator().manual_seed(0)
        self._arguments = [
            dense_arguments(
                request,
                torch.randn(len(request.product), dim, generator=rng),
                torch.randn(1, dim, generator=rng),
                torch.randn(1, dim, generator=rng),
            )
            for request in requests
        ]

    def __call__(self, number: int) -> list[int]:
        """Answer a request; returns when that was done."""
        self._score(*self._arguments[number])
        return [time.perf_counter_ns()]


def dense_arguments(
    request: RequestBatch, product: Tensor, query: Tensor, history: Tensor
) -> tuple[Tensor, ...]:
    """Return the arguments of `FetchedRanker`.

    Args:
        request: one request.
        product: [C, E] float32 embeddings of its candidates.
        query: [1, E].
        history: [1, E], the mean of its purchases.
    """
    return (
        *(request.lengths, request.request_sparse, request.request_dense),
        *(request.candidate_sparse, request.candidate_dense, product, query, history),
    )
