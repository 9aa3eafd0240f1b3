"""The dense product over a dense copy of the weight: what a layer falls back on where every packed kernel was measured to be slower.

It gives up the memory that packing saves, so :mod:`sparse_engine.policy` decides where it may be used.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_engine import formats
from sparse_engine.formats.base import VALUE_DTYPES, PackedWeight, unpack_bits
from sparse_engine.pattern import SparsityPattern
from sparse_engine.registry import Kernel, Layout, Problem, register


class DenseKernel(Kernel):
    """Layout: ``weight`` (rows, columns), masked and dense, and ``bitmask`` uint8 (rows, ceil(columns/8)).

    The bitmask costs 1/16 of the dense bytes and makes :meth:`recover` exact: a zero of the weight does not say whether it was kept.
    """

    name = "dense"
    formats: ClassVar[frozenset[str]] = frozenset({"nm", "unstructured"})
    devices: ClassVar[frozenset[str]] = frozenset({"cpu", "cuda"})
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset(VALUE_DTYPES)
    in_place: ClassVar[bool] = False
    keeps_dense: ClassVar[bool] = True

    def cost(self, problem: Problem) -> float:
        # Never compared: without a measured time a dense copy is not considered.
        return 1e6 + problem.dense_nbytes * 1e-3

    def layout_nbytes(self, problem: Problem, packed: PackedWeight) -> int | None:
        return problem.dense_nbytes + problem.out_features * -(-problem.in_features // 8)

    def prepare(self, packed: PackedWeight) -> Layout:
        return {"weight": formats.get(packed.format).unpack(packed), "bitmask": packed.tensors["bitmask"]}

    def recover(self, layout: Layout, packed: PackedWeight) -> PackedWeight:
        rows, columns = packed.shape
        keep = unpack_bits(layout["bitmask"], columns)
        values = layout["weight"][keep]
        tensors = {"values": values, "bitmask": layout["bitmask"]}
        if packed.pattern.is_nm:
            tensors["values"] = values.view(rows, -1)
        else:
            offsets = torch.zeros(rows + 1, dtype=torch.int64, device=values.device)
            offsets[1:] = keep.sum(1).cumsum(0)
            tensors["row_offsets"] = offsets
        return PackedWeight(packed.format, packed.version, packed.pattern, packed.shape, packed.dtype, tensors)

    def run(self, x: Tensor, layout: Layout, bias: Tensor | None, pattern: SparsityPattern) -> Tensor:
        return F.linear(x, layout["weight"], bias)

    def rows_of(self, layout: Layout, begin: int, end: int) -> Layout | None:
        return {name: tensor[begin:end] for name, tensor in layout.items()}


register(DenseKernel())
