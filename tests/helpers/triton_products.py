"""What the tests of the Triton kernels share: the kernels (interpreted where there is no GPU), packed weights and checked products."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from products import expected_product, random_keep, relative_error
from torch import Tensor

from sparse_engine import formats, registry
from sparse_engine.backends import triton_bitmask
from sparse_engine.formats.base import PackedWeight
from sparse_engine.mask import Mask
from sparse_engine.pattern import SparsityPattern

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PER_ROW = (1, 3, 7, 16, 17, 33, 129)
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
# Odd numbers of rows; columns that end inside a mask byte, and below, at and behind the columns of a step or of a part.
SHAPES = {
    "1:2": [(3, 62)],
    "2:4": [(13, 260), (1, 4), (5, 1028)],
    "4:8": [(7, 264), (3, 1032)],
    "1:4": [(9, 300)],
    "5:8": [(2, 168)],
    "3:16": [(6, 272), (1, 16)],
    "16:32": [(5, 544)],
    "0.5": [(11, 263), (1, 3), (3, 1031)],
    "0.9": [(6, 513)],
}
# A pattern for each way to find values, with rows that split into parts of which the last is short.
SPLIT = {"2:4": (5, 1544), "4:8": (3, 1032), "5:8": (3, 1072), "3:16": (3, 1040), "0.5": (5, 1031)}


def _import_kernel() -> tuple[ModuleType | None, str]:
    """kernels/bitmask.py as installed, interpreted where there is no GPU; or why it cannot be had."""
    if reason := triton_bitmask._why_unavailable():
        return None, f"the Triton kernel {reason}"
    if DEVICE == "cuda":
        return importlib.import_module("sparse_engine.kernels.bitmask"), ""
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        return None, "something imported triton before this module could choose its interpreter"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return importlib.import_module("sparse_engine.kernels.bitmask"), ""


BITMASK, WHY_NOT = _import_kernel()


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> Iterator[None]:
    # Triton reads the variable both when a function is decorated and at its first calls; other modules' tests must not see it.
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        yield


needs_kernel = pytest.mark.skipif(BITMASK is None, reason=WHY_NOT)


def make_packed(pattern: str, shape: tuple[int, int], dtype: torch.dtype, device: str = DEVICE) -> PackedWeight:
    """A random weight; an unstructured one has an empty row, at the end too, and a full one."""
    generator = torch.Generator().manual_seed(shape[0] * shape[1])
    parsed = SparsityPattern.parse(pattern)
    weight = torch.randn(shape, generator=generator)
    if parsed.is_nm:
        keep = random_keep(shape, parsed, generator)
    else:
        keep = torch.rand(shape, generator=generator) >= (parsed.sparsity or 0)
        keep[shape[0] // 3] = True
        if shape[0] > 2:
            keep[[0, shape[0] // 2, -1]] = False
    return formats.for_pattern(parsed).pack(weight.to(dtype), Mask(parsed, keep)).to(device)


def packed_arguments(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> tuple[object, ...]:
    layout = registry.get("triton_bitmask").prepare(packed)
    tensors = (x, layout["values"], layout["bitmask"], layout.get("row_offsets"), layout.get("chunk_starts"), bias)
    return *tensors, packed.pattern.n or 0, packed.pattern.m or 0


def launch(x: Tensor, packed: PackedWeight, bias: Tensor | None, tile: Any = None) -> Tensor:
    """The kernels' result in memory full of NaN, with what lies around it checked to be left alone."""
    assert BITMASK is not None
    tile = tile or BITMASK.default_tile(x.shape[0], *packed.shape, x.dtype)
    size = x.shape[0] * packed.shape[0]
    memory = torch.full((size + 64,), float("nan"), dtype=x.dtype, device=x.device)
    out = memory[32 : 32 + size].view(x.shape[0], packed.shape[0])
    arguments = packed_arguments(x, packed, bias)
    # torch then fills what it allocates with NaN: the sums of a split product's parts too.
    torch.use_deterministic_algorithms(True)
    try:
        assert BITMASK.bitmask_linear(*arguments, tile, out) is out
    finally:
        torch.use_deterministic_algorithms(False)
    assert bool(memory[:32].isnan().all())
    assert bool(memory[32 + size :].isnan().all())
    return out


def operands(packed: PackedWeight, m: int) -> tuple[Tensor, Tensor]:
    """Random x (m, columns) and bias (rows,), the same at each call."""
    generator = torch.Generator().manual_seed(m)
    x, bias = (torch.randn(size, generator=generator) for size in ((m, packed.shape[1]), packed.shape[:1]))
    return x.to(DEVICE, packed.dtype), bias.to(DEVICE, packed.dtype)


def assert_product(packed: PackedWeight, m: int, *, with_bias: bool, tile: Any = None) -> Tensor:
    x, bias = operands(packed, m)
    y = launch(x, packed, bias if with_bias else None, tile)
    assert relative_error(y, expected_product(x, packed, bias if with_bias else None)) < TOLERANCE[packed.dtype]
    return y
