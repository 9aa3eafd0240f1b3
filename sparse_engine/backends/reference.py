"""Unpack to the dense weight, then a dense linear: every pattern, type and device; the oracle, and the last choice."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sparse_engine import formats
from sparse_engine.formats.base import VALUE_DTYPES, PackedWeight
from sparse_engine.ops import define_linear
from sparse_engine.pattern import SparsityPattern
from sparse_engine.registry import Kernel, Layout, Problem, register


def packed_from_tensors(values: Tensor, bitmask: Tensor, row_offsets: Tensor | None, columns: int, n: int, m: int) -> PackedWeight:
    """The packed weight that an operator's arguments describe; n = m = 0 for an unstructured one."""
    tensors = {"values": values, "bitmask": bitmask}
    shape = (bitmask.shape[0], columns)
    if row_offsets is None:
        return PackedWeight("nm", 1, SparsityPattern.nm(n, m), shape, values.dtype, tensors)
    # The target sparsity plays no part in unpacking; any valid one serves.
    return PackedWeight("unstructured", 1, SparsityPattern.unstructured(0.5), shape, values.dtype, tensors | {"row_offsets": row_offsets})


def _linear(x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor | None, bias: Tensor | None, n: int, m: int) -> Tensor:
    packed = packed_from_tensors(values, bitmask, row_offsets, x.shape[-1], n, m)
    return formats.get(packed.format).linear(x, packed, bias)


_op = define_linear("reference_linear", _linear, ("CPU", "CUDA"))


class ReferenceKernel(Kernel):
    name = "reference"
    formats: ClassVar[frozenset[str]] = frozenset({"nm", "unstructured"})
    devices: ClassVar[frozenset[str]] = frozenset({"cpu", "cuda"})
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset(VALUE_DTYPES)

    def cost(self, problem: Problem) -> float:
        # Unpacking alone touches each dense element several times through int64 indices, so this is never the best choice.
        return 1e6 + problem.dense_nbytes * 1e-3

    def run(self, x: Tensor, layout: Layout, bias: Tensor | None, pattern: SparsityPattern) -> Tensor:
        return _op(x, layout["values"], layout["bitmask"], layout.get("row_offsets"), bias, pattern.n or 0, pattern.m or 0)


register(ReferenceKernel())
