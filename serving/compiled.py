"""The float model compiled ahead of time (torch.export, AOTInductor): TorchScript's successor."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim

from features.batch import RequestBatch
from features.errors import BadInputError
from serving.online_ranker import OnlineRanker
from serving.raw_requests import tensors_of

_LAST = ("lengths", "query", "history", "history_age", "history_lengths", "product")
_MATRICES = ("request_ids", "request_values", "candidate_ids", "candidate_values")


def compile_ahead(online: OnlineRanker, example: RequestBatch, path: Path) -> None:
    """Compile a float32 ranker for any number of requests, candidates and purchases.

    Args:
        online: with float32 tables: quantised ones cannot be exported (fbgemm's operators have no
            fake implementation).
        example: a batch of 2 requests or more.
        path: of the package; it is machine code for this kind of processor.

    Raises:
        BadInputError: there is no C++ compiler.
    """
    assert online.dtype == "float32"
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise BadInputError(
            "compiling ranker.pt2 needs a C++ compiler: install g++, or give --no-pt2"
        )
    shapes = {name: {0: Dim.DYNAMIC} for name in _LAST}
    shapes |= {name: {1: Dim.DYNAMIC} for name in _MATRICES}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns itself of
        program = torch.export.export(
            online, tensors_of(example), dynamic_shapes=shapes, strict=False
        )
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def load_compiled(path: Path) -> Callable[[RequestBatch], Tensor]:
    """Return what gives the probabilities [C] of a batch.

    The package is machine code that runs in this process: load those of a verified export only.
    """
    run = torch._inductor.aoti_load_package(str(path))

    def score(batch: RequestBatch) -> Tensor:
        found: Tensor = run(*tensors_of(batch))
        return found

    return score
