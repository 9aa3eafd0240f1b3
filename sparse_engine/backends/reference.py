"""Unpack to the dense weight, then a dense linear: every pattern, type and device; the oracle, and the last choice."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sparse_engine import formats, value_types
from sparse_engine.formats.base import VALUE_DTYPES, PackedWeight
from sparse_engine.ops import define_linear
from sparse_engine.pattern import SparsityPattern
from sparse_engine.registry import Kernel, Layout, Problem, register

_ARGUMENTS = "Tensor x, Tensor values, Tensor bitmask, Tensor? row_offsets, Tensor? scales, Tensor? bias, int n, int m"


def _linear(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    row_offsets: Tensor | None,
    scales: Tensor | None,
    bias: Tensor | None,
    n: int,
    m: int,
) -> Tensor:
    tensors = {"values": values, "bitmask": bitmask}
    if scales is not None:
        tensors["scales"] = scales
    if row_offsets is not None:
        tensors["row_offsets"] = row_offsets
    # The target sparsity of an unstructured weight plays no part in unpacking; any valid one serves.
    pattern = SparsityPattern.unstructured(0.5) if row_offsets is not None else SparsityPattern.nm(n, m)
    fmt = formats.for_pattern(pattern)
    kind = value_types.of_element(values.dtype)
    dtype = values.dtype if kind == value_types.PLAIN else x.dtype
    packed = PackedWeight(fmt.name, fmt.version, pattern, (bitmask.shape[0], x.shape[-1]), dtype, tensors, kind)
    return fmt.linear(x, packed, bias)


def _fake(x: Tensor, values: Tensor, bitmask: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], bitmask.shape[0]))


_op = define_linear("reference_linear", _linear, ("CPU", "CUDA"), arguments=_ARGUMENTS, fake=_fake)


class ReferenceKernel(Kernel):
    name = "reference"
    formats: ClassVar[frozenset[str]] = frozenset({"nm", "unstructured"})
    devices: ClassVar[frozenset[str]] = frozenset({"cpu", "cuda"})
    value_types: ClassVar[frozenset[str]] = frozenset(value_types.all_value_types())
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset(VALUE_DTYPES)

    def cost(self, problem: Problem) -> float:
        # Unpacking alone touches each dense element several times through int64 indices, so this is never the best choice.
        return 1e6 + problem.dense_nbytes * 1e-3

    def run(self, x: Tensor, layout: Layout, bias: Tensor | None, pattern: SparsityPattern) -> Tensor:
        optional = (layout.get("row_offsets"), layout.get("scales"), bias)
        return _op(x, layout["values"], layout["bitmask"], *optional, pattern.n or 0, pattern.m or 0)


register(ReferenceKernel())
