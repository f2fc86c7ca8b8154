"""Embedding tables as the served model holds them: row-wise quantised, read by one operator.

Legend: ``N`` rows, ``D`` dimension, ``L`` indices of ``B`` bags.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranking.versions import check_versions

check_versions()

import fbgemm_gpu  # noqa: E402, F401 (registers the operators)
from fbgemm_gpu.split_embedding_configs import SparseType  # noqa: E402

TableDtype = Literal["float32", "float16", "int8", "int4"]
TABLE_DTYPES: tuple[TableDtype, ...] = get_args(TableDtype)

_SPARSE_TYPE = {
    "float16": SparseType.FP16,
    "int8": SparseType.INT8,
    "int4": SparseType.INT4,
}
_BITS = {"int8": 8, "int4": 4}
_HOST = 3  # fbgemm's EmbeddingLocation.HOST
_MEAN = 1  # fbgemm's PoolingMode.MEAN
_FLOAT32 = 0  # fbgemm's number of the output's type
_SCALE_BYTES = 4  # scale and offset of a quantised row, float16 each, before its numbers


class EmbeddingTable(nn.Module):
    """A table whose bags are mean-pooled: in float32 by torch, else by fbgemm's inference lookup.

    A quantised row is ``D`` (int8) or ``D / 2`` (int4) bytes after a float16 scale and a float16
    offset of its own, so that 256 dimensions take 260 bytes in int8: .254 of float32. A row of
    zeros stays exactly zero.

    Args:
        weight: [N, D] float32 or float16.
        dtype: how the rows are kept.

    Raises:
        ValueError: int4 rows of an odd dimension.
    """

    weight: Tensor  # float32: [N, D]; else the rows as uint8, [N * row_bytes]
    padding: Tensor  # 2 zeros

    def __init__(self, weight: Tensor, dtype: TableDtype) -> None:
        super().__init__()
        self.dim = weight.shape[1]
        self.dtype = dtype
        if dtype == "int4" and self.dim % 2:
            raise ValueError(f"the dimension of an int4 table must be even, got {self.dim}")
        self.register_buffer("weight", _packed(weight.detach(), dtype))
        if dtype != "float32":
            number = _SPARSE_TYPE[dtype].as_int()
            self.register_buffer("kind", torch.tensor([number], dtype=torch.uint8))
            self.register_buffer("place", torch.tensor([_HOST], dtype=torch.int32))
            self.register_buffer("start", torch.zeros(1, dtype=torch.int64))
            self.register_buffer("dims", torch.tensor([0, self.dim], dtype=torch.int32))
            self.register_buffer("nothing", torch.empty(0, dtype=torch.uint8))
            self.register_buffer("padding", torch.zeros(2, dtype=torch.int32))

    def number_of_rows(self) -> int:
        """Return N."""
        if self.dtype == "float32":
            return self.weight.shape[0]
        size = {"float16": 2 * self.dim, "int8": self.dim + _SCALE_BYTES}
        return self.weight.numel() // size.get(self.dtype, self.dim // 2 + _SCALE_BYTES)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Return the mean [B, D] float32 of each bag; of an empty one, zeros.

        Args:
            rows: [L] int32, each within the table: nothing checks it.
            offsets: [B + 1] int32, where each bag begins; the last one is L. B is 1 or more.
        """
        if self.dtype == "float32":
            return F.embedding_bag(
                rows, self.weight, offsets, mode="mean", include_last_offset=True
            )
        return torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function(
            dev_weights=self.weight,
            uvm_weights=self.nothing,
            weights_placements=self.place,
            weights_offsets=self.start,
            weights_tys=self.kind,
            D_offsets=self.dims,
            total_D=self.dim,
            max_int2_D=0,
            max_int4_D=self.dim if self.dtype == "int4" else 0,
            max_int8_D=self.dim if self.dtype == "int8" else 0,
            max_float16_D=self.dim if self.dtype == "float16" else 0,
            max_float32_D=0,
            indices=rows,
            offsets=offsets,
            pooling_mode=_MEAN,
            indice_weights=None,
            output_dtype=_FLOAT32,
            row_alignment=1,
        )

    def each(self, rows: Tensor) -> Tensor:
        """Return the rows themselves, float32 [L, D]; L may be 0."""
        if self.dtype == "float32":
            return self.weight.index_select(0, rows)
        # The lookup fails on no bag at all: a bag more is read and left out. Two rows are added so
        # that the offsets are as many as the rows, which spares arithmetic on sizes.
        padded = torch.cat([rows, self.padding])
        return self(padded, torch.arange(padded.shape[0], dtype=torch.int32))[:-1]


def _packed(weight: Tensor, dtype: TableDtype) -> Tensor:
    if dtype == "float32":
        return weight.float().contiguous()
    if dtype == "float16":
        return weight.half().contiguous().view(torch.uint8).reshape(-1)
    quantise = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf
    rows = quantise(weight.float().contiguous(), _BITS[dtype])  # the scale stands last there
    scale, numbers = rows[:, -_SCALE_BYTES:], rows[:, :-_SCALE_BYTES]
    return torch.cat([scale, numbers], dim=1).reshape(-1)
