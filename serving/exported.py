"""An exported ranker, loaded to score: verified, its large tables shared between processes."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from features.batch import RequestBatch
from features.errors import BadInputError
from ranking.versions import check_versions
from serving.manifest import TORCHSCRIPT, Golden, Manifest, load_golden
from serving.raw_requests import tensors_of, to_batch

check_versions()

import fbgemm_gpu  # noqa: E402, F401 (registers the operators)

GOLDEN_TOLERANCE = 1e-4  # another processor's instructions add in another order


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExportedRanker:
    """A ranker that ``export-ranker`` wrote.

    Attributes:
        manifest: what it is.
        golden: requests with known answers.
        module: the TorchScript module; its method ``score`` takes `tensors_of` a batch.
    """

    manifest: Manifest
    golden: tuple[Golden, ...]
    module: Any

    @classmethod
    def open(cls, folder: Path) -> "ExportedRanker":
        """Load ``ranker.pt`` of an exported ranker after checking every file.

        Its large tables are mapped from the file: processes that load it share their memory, and
        so does the page cache. The file must not be written over in place; replacing it is fine.

        Raises:
            BadInputError: a file is missing, damaged, or not the one that was exported.
        """
        manifest = Manifest.load(folder)
        manifest.verify(folder)
        path = folder / TORCHSCRIPT
        try:
            with warnings.catch_warnings():  # TorchScript's deprecation
                warnings.simplefilter("ignore")
                module = torch.jit.load(str(path))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise BadInputError(
                f"{path}: cannot be loaded by torch {torch.__version__}: {reason}"
            ) from error
        for name, place in manifest.shared_tables.items():
            share_table(module, name, path, place["offset"], place["bytes"])
        return cls(manifest=manifest, golden=load_golden(folder), module=module)

    def score(self, batch: RequestBatch) -> np.ndarray:
        """Return the probabilities (float32 [C]) of raw requests; any thread may call it."""
        if len(batch.lengths) == 0:
            return np.zeros(0, np.float32)
        with torch.inference_mode(), torch.jit.optimized_execution(False):
            found: Tensor = self.module.score(*tensors_of(batch))
        return found.numpy()

    def score_raw(self, requests: Sequence[dict[str, Any]]) -> np.ndarray:
        """Return the probabilities (float32 [C]) of `serving.raw_requests`.

        Raises:
            BadInputError: a request is not of the documented form.
        """
        return self.score(to_batch(requests, self.manifest.inputs))

    def check_golden(self) -> None:
        """Score the golden requests and compare.

        Raises:
            BadInputError: a probability differs by more than `GOLDEN_TOLERANCE`.
        """
        for golden in self.golden:
            expected = np.array(golden.probabilities, np.float32)
            found = self.score_raw([golden.request])
            if found.shape != expected.shape:
                raise BadInputError(
                    f"golden request '{golden.name}': {len(found)} probabilities, "
                    f"expected {len(expected)}"
                )
            difference = np.abs(found - expected).max(initial=0)
            if not difference <= GOLDEN_TOLERANCE:
                raise BadInputError(
                    f"golden request '{golden.name}': a probability differs by {difference:.2g} "
                    f"from what was exported, more than {GOLDEN_TOLERANCE:g}"
                )


def share_table(module: Any, name: str, path: Path, offset: int, size: int) -> None:
    """Put a view of the file in place of a module's own table.

    Args:
        module: a loaded TorchScript module.
        name: of the buffer, with dots.
        path: its file, an archive that stores tensors as they are.
        offset: where in the file the table begins, in bytes.
        size: of the table in bytes.
    """
    *parents, leaf = name.split(".")
    owner = module
    for parent in parents:
        owner = getattr(owner, parent)
    own = getattr(owner, leaf)
    whole = torch.from_file(str(path), shared=False, size=offset + size, dtype=torch.uint8)
    setattr(owner, leaf, whole[offset:].view(own.dtype).view(own.shape))


def table_place(path: Path, table: Tensor) -> dict[str, int]:
    """Return ``offset`` and ``bytes`` of the record of an archive that holds a table.

    Raises:
        ValueError: no record holds it.
    """
    reader: Any = torch._C.PyTorchFileReader(str(path))
    content = table.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    for record in reader.get_all_records():
        if reader.get_record_size(record) == table.nbytes and reader.get_record(record) == content:
            return {"offset": reader.get_record_offset(record), "bytes": table.nbytes}
    raise ValueError(f"no record of {path} holds a table of {table.nbytes} bytes")
