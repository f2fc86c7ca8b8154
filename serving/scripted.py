"""The online ranker as TorchScript: tensors in, or raw values by name."""

import warnings

import torch
from torch import Tensor, nn

from features.batch import RequestBatch
from features.id_map import MISSING_ID
from serving.inputs import InputSpec
from serving.online_ranker import OnlineRanker
from serving.raw_requests import tensors_of


def scripted(
    online: OnlineRanker, example: RequestBatch, inputs: InputSpec
) -> torch.jit.ScriptModule:
    """Return an online ranker as TorchScript, frozen: methods ``forward`` and ``score``.

    Args:
        online: the ranker.
        example: a batch of any size, for the tracer.
        inputs: names and types of the features.
    """
    with torch.no_grad(), warnings.catch_warnings():
        # TorchScript's deprecation, and the tracer's doubts of sizes that are indeed constant.
        warnings.simplefilter("ignore")
        core = torch.jit.trace(online, tensors_of(example), check_trace=False)
        module = torch.jit.script(RawRanker(core, inputs)).eval()
        return torch.jit.freeze(module, preserved_attrs=["score", *large_tables(online)])


def large_tables(online: OnlineRanker) -> dict[str, Tensor]:
    """Return the tables that stay attributes of the scripted module, by their names there.

    Processes can share these (`serving.exported`).
    """
    if online.pretrained is None:
        return {}
    tables = {"product": online.pretrained.product, "query": online.pretrained.query}
    return {f"core.pretrained.{name}.weight": table.weight for name, table in tables.items()}


def fnv1a(text: str) -> int:
    """Return the 64-bit FNV-1a hash of a string's bytes, as `features.id_map.hash_strings` does.

    For TorchScript, whose strings are bytes: run by Python itself, it is right for ASCII only.
    """
    found = -3750763034362895579  # 0xCBF29CE484222325 as int64
    for place in range(len(text)):
        found = (found ^ ord(text[place])) * 1099511628211
    return found


class RawRanker(nn.Module):
    """What is scripted: the traced ranker, and raw values by name in front of it.

    Args:
        core: the traced `OnlineRanker`.
        inputs: names and types of the features.
    """

    request_sparse: list[str]  # said here, since TorchScript cannot tell the type of an empty list
    request_dense: list[str]
    candidate_sparse: list[str]
    candidate_dense: list[str]

    def __init__(self, core: torch.jit.ScriptModule, inputs: InputSpec) -> None:
        super().__init__()
        self.core = core
        self.request_sparse = inputs.names("sparse", "request")
        self.request_dense = inputs.names("dense", "request")
        self.candidate_sparse = inputs.names("sparse", "candidate")
        self.candidate_dense = inputs.names("dense", "candidate")
        self.missing = MISSING_ID

    @torch.jit.export
    def score(
        self,
        lengths: Tensor,
        query: Tensor,
        history: Tensor,
        history_age: Tensor,
        history_lengths: Tensor,
        request_ids: Tensor,
        request_values: Tensor,
        product: Tensor,
        candidate_ids: Tensor,
        candidate_values: Tensor,
    ) -> Tensor:
        """Return probabilities [C]; see `OnlineRanker.forward`."""
        return self.core(
            lengths,
            query,
            history,
            history_age,
            history_lengths,
            request_ids,
            request_values,
            product,
            candidate_ids,
            candidate_values,
        )

    def forward(
        self,
        query: list[str],
        lengths: Tensor,
        product: Tensor,
        history: Tensor,
        history_age: Tensor,
        history_lengths: Tensor,
        ids: dict[str, Tensor],
        strings: dict[str, list[str | None]],
        values: dict[str, Tensor],
    ) -> Tensor:
        """Return the probability [C] of a click on each candidate of B requests.

        Args:
            query: B texts.
            lengths: [B] int64, candidates of each request.
            product: [C] int64 product ids.
            history: [H] int64 product ids.
            history_age: [H] int16, days between each purchase and the request.
            history_lengths: [B] int64.
            ids: integer sparse features by name, int64 [B] or [C]; `MISSING_ID` where missing.
            strings: sparse features of text by name.
            values: dense features by name, float32 [B] or [C], NaN where missing.

        A feature that is left out is missing everywhere.
        """
        known: dict[str, int] = {}
        queries: list[str | None] = []
        for text in query:  # TorchScript takes no list of texts for one of optional texts
            queries.append(text)  # noqa: PERF402
        requests, candidates = lengths.shape[0], product.shape[0]
        return self.core(
            lengths,
            self._hashed(queries, known),
            history,
            history_age,
            history_lengths,
            self._sparse(self.request_sparse, requests, ids, strings, known),
            self._dense(self.request_dense, requests, values),
            product,
            self._sparse(self.candidate_sparse, candidates, ids, strings, known),
            self._dense(self.candidate_dense, candidates, values),
        )

    def _hashed(self, texts: list[str | None], known: dict[str, int]) -> Tensor:
        """Return [N] int64 hashes; each text is hashed once."""
        found: list[int] = []
        for text in texts:
            if text is None:
                found.append(self.missing)
            else:
                if text not in known:
                    known[text] = fnv1a(text)
                found.append(known[text])
        return torch.tensor(found, dtype=torch.int64)

    def _sparse(
        self,
        names: list[str],
        number: int,
        ids: dict[str, Tensor],
        strings: dict[str, list[str | None]],
        known: dict[str, int],
    ) -> Tensor:
        found = torch.full([len(names), number], self.missing, dtype=torch.int64)
        for place, name in enumerate(names):
            if name in ids:
                found[place] = ids[name]
            elif name in strings:
                found[place] = self._hashed(strings[name], known)
        return found

    def _dense(self, names: list[str], number: int, values: dict[str, Tensor]) -> Tensor:
        found = torch.full([len(names), number], float("nan"))
        for place, name in enumerate(names):
            if name in values:
                found[place] = values[name]
        return found
