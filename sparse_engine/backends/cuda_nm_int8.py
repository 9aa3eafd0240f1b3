"""2:4 weights of int8 values on Hopper: activations are quantised row by row to int8 too, and integer sparse wgmma multiplies them.

The kernels are csrc/cuda/quantise_rows.cu and prefill_nm.cu. y = (levels of x · levels of W) · scale of x's row · scale of W's row
(W8A8 with dynamic scales per token, Yao et al. 2022, "ZeroQuant", section 4.2).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import astuple, replace
from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_engine import cuda
from sparse_engine.backends.cuda_decode import UNIT, Gpu, check_arguments, fragment_linear_fake, gpu
from sparse_engine.backends.cuda_nm import mask_table, metadata_table
from sparse_engine.backends.cuda_prefill import Call
from sparse_engine.backends.cuda_prefill_wgmma import (
    CLOCKS_PER_US,
    Levels,
    PrefillSource,
    PrefillTile,
    estimated_clocks,
    run_prefill,
    tile_of,
)
from sparse_engine.errors import InputError
from sparse_engine.formats.base import PackedWeight
from sparse_engine.ops import define_linear
from sparse_engine.pattern import SparsityPattern
from sparse_engine.registry import Config, Kernel, Layout, Problem, register

__all__ = ["SOURCE", "TILES", "from_fragments", "quantise_rows", "to_fragments"]

SOURCE = PrefillSource("prefill_nm.cu", "prefill_nm", (("VALUES", 2),))
TILES = (
    PrefillTile(32, 1, 2, 4, 2, a_shared=1),
    PrefillTile(24, 2, 2, 4, 2, a_shared=1),
    PrefillTile(20, 2, 2, 4, 2, a_shared=1),
    PrefillTile(16, 2, 2, 4, 2, a_shared=1),
    PrefillTile(16, 2, 2, 4, 2, splits=2, a_shared=1),
    PrefillTile(16, 2, 2, 4, 1, splits=4, a_shared=1),
    PrefillTile(16, 1, 2, 6, 2, a_shared=1),
    PrefillTile(8, 2, 2, 6, 1, a_shared=1),
    PrefillTile(8, 2, 2, 6, 1, splits=2, a_shared=1),
    PrefillTile(8, 2, 2, 6, 1, splits=4, a_shared=1),
    PrefillTile(4, 1, 2, 8, 1, a_shared=1),
    PrefillTile(4, 1, 2, 8, 1, splits=4, a_shared=1),
)
_QUANTISE_THREADS = 256
_SCALES_PADDING = 256
_STEP_COLUMNS_OF_EIGHT = 512
_CHUNK = 5 * 32 * 16
"""Bytes of 16 rows by 256 columns: positions and four steps of values, 16 bytes for each of 32 lanes."""
_H200 = Gpu("NVIDIA H200", "sm_90a", 132, True, 232448)


class _QuantiseParams(ctypes.Structure):
    """``Params`` of quantise_rows.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "levels", "scales")),
        ("stride", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("cols", "pitch", "vector")),
    )


def _extent(shape: tuple[int, int]) -> tuple[int, int]:
    """Row tiles and units of a (rows, columns) weight."""
    return -(-shape[0] // 16), -(-shape[1] // UNIT)


def to_fragments(values: Tensor, bitmask: Tensor, shape: tuple[int, int]) -> Tensor:
    """The layout that prefill_nm.cu describes, uint8 (row tiles, units, 5, 32, 16), from int8 values and a bitmask."""
    tiles, units = _extent(shape)
    levels = F.pad(values.view(torch.uint8), (0, units * UNIT // 2 - values.shape[1], 0, tiles * 16 - shape[0]))
    masks = F.pad(bitmask, (0, units * UNIT // 8 - bitmask.shape[1], 0, tiles * 16 - shape[0]))
    masks = metadata_table(masks.device)[masks.int()]
    out = torch.empty(tiles, units, 5, 32, 16, dtype=torch.uint8, device=values.device)
    # tile, half, g | unit, step, k-half, byte  ->  tile, unit, lane (g, k-half, half), step, byte
    out[:, :, 0] = masks.view(tiles, 2, 8, units, 4, 2, 4).permute(0, 3, 2, 5, 1, 4, 6).reshape(tiles, units, 32, 16)
    # tile, half, g | unit, step, k-half, t, 4 bytes  ->  tile, unit, step, lane (g, t), k-half, half, 4 bytes
    fragments = levels.view(tiles, 2, 8, units, 4, 2, 4, 4).permute(0, 3, 4, 2, 6, 5, 1, 7)
    out[:, :, 1:] = fragments.reshape(tiles, units, 4, 32, 16)
    return out


def from_fragments(layout: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Values and bitmask that :func:`to_fragments` was given, exactly."""
    (rows, columns), (tiles, units) = shape, _extent(shape)
    masks = layout[:, :, 0].reshape(tiles, units, 8, 2, 2, 4, 4).permute(0, 4, 2, 1, 5, 3, 6)
    fragments = layout[:, :, 1:].reshape(tiles, units, 4, 8, 4, 2, 2, 4).permute(0, 6, 3, 1, 2, 5, 4, 7)
    values = fragments.reshape(tiles * 16, units * UNIT // 2)[:rows, : columns // 2].contiguous()
    bitmask = masks.reshape(tiles * 16, units * UNIT // 8)[:rows, : -(-columns // 8)].contiguous()
    bitmask = mask_table(bitmask.device)[bitmask.int()]
    if columns % 8:
        bitmask[:, -1] &= 15
    return values.view(torch.int8), bitmask


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 levels (m, columns), rows 16-byte aligned, of x (m, columns), and float32 scales of which the first m are its rows'.

    Raises:
        KernelUnavailableError: the kernel cannot be compiled or launched.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    m, columns = x.shape
    pitch = -(-columns // 16) * 16
    levels = torch.empty(m, pitch, dtype=torch.int8, device=x.device)
    scales = torch.empty(-(-m // _SCALES_PADDING) * _SCALES_PADDING, device=x.device)
    here = gpu(x.device.index)
    vector = int(x.data_ptr() % 16 == 0 and columns % 8 == 0 and (m == 1 or x.stride(0) % 8 == 0))
    params = _QuantiseParams(x.data_ptr(), levels.data_ptr(), scales.data_ptr(), x.stride(0), columns, pitch, vector)
    function = cuda.load("quantise_rows.cu", "quantise_rows", here.arch, (("ELEMENT", int(x.dtype is torch.bfloat16)),))
    cuda.launch(function, (m, 1), _QUANTISE_THREADS, 0, params, x.device.index, overlap=here.hopper)
    return levels[:, :columns], scales


@cache
def _ordered_tiles(rows: int, columns: int, m: int, here: Gpu) -> tuple[PrefillTile, ...]:
    """Tiles that fit, those with the lowest estimate first."""
    able = [tile for tile in TILES if SOURCE.fits(tile, here) and (tile.splits == 1 or tile.splits * UNIT <= columns)]
    return tuple(sorted(able, key=lambda tile: estimated_clocks(tile, rows, columns, m, here, _STEP_COLUMNS_OF_EIGHT)))


def _product(tile: PrefillTile | None, call: Call, scales: Tensor) -> Tensor:
    x, m = call.x, call.m
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise InputError(f"x is {x.dtype}, but int8 weights take bfloat16 or float16 activations here; cast x")
    # The weight has no type that x could have.
    check_arguments(x, call.weight.view(x.dtype), call.bias, call.residual, call.rows, call.columns)
    with torch.cuda.device(x.device):
        chosen = tile or _ordered_tiles(call.rows, call.columns, m, gpu(x.device.index))[0]
        if m == 0:
            return x.new_empty((*x.shape[:-1], call.rows))
        levels, x_scales = quantise_rows(x.reshape(m, call.columns))
        return run_prefill(SOURCE, chosen, call, Levels(levels, x_scales, scales))


def _linear(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None, rows: int, columns: int, relu: bool
) -> Tensor:
    return _product(None, Call("2:4", x, weight, bias, residual, rows, columns, relu), scales)


def _fake(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, residual: Tensor | None, rows: int, *_: object) -> Tensor:
    return fragment_linear_fake(x, weight, bias, residual, rows)


_op = define_linear(
    "cuda_nm_int8_linear",
    _linear,
    ("CUDA",),
    arguments="Tensor x, Tensor weight, Tensor scales, Tensor? bias, Tensor? residual, int rows, int columns, bool relu",
    fake=_fake,
)


class CudaNMInt8Kernel(Kernel):
    name = "cuda_nm_int8"
    formats: ClassVar[frozenset[str]] = frozenset({"nm"})
    devices: ClassVar[frozenset[str]] = frozenset({"cuda"})
    value_types: ClassVar[frozenset[str]] = frozenset({"int8"})
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.bfloat16, torch.float16})
    in_place: ClassVar[bool] = False

    def unsupported(self, problem: Problem) -> str | None:
        if problem.pattern.group != (2, 4):
            return f"runs 2:4, not {problem.pattern}"
        if problem.capability is not None and problem.capability != (9, 0):
            return f"needs compute capability 9.0, not {problem.capability[0]}.{problem.capability[1]}"
        return cuda.why_unavailable()

    def cost(self, problem: Problem) -> float:
        size = (problem.out_features, problem.in_features, problem.rows)
        clocks = estimated_clocks(_ordered_tiles(*size, _H200)[0], *size, _H200, _STEP_COLUMNS_OF_EIGHT)
        return 5.0 + max(clocks / CLOCKS_PER_US, problem.packed_nbytes / 4.0e6)

    def layout_nbytes(self, problem: Problem, packed: PackedWeight) -> int:
        tiles, units = _extent((problem.out_features, problem.in_features))
        return _CHUNK * tiles * units + 4 * problem.out_features

    def configs(self, problem: Problem) -> Sequence[Config]:
        tiles = _ordered_tiles(problem.out_features, problem.in_features, problem.rows, gpu(torch.cuda.current_device()))
        return [("wgmma-int8", *astuple(tile)) for tile in tiles]

    def compilations(self, problem: Problem, config: Config) -> Sequence[tuple[str, str, tuple[tuple[str, int], ...]]]:
        here = gpu(torch.cuda.current_device())
        quantise = ("quantise_rows.cu", here.arch, (("ELEMENT", int(problem.dtype is torch.bfloat16)),))
        return ((SOURCE.file, here.arch, SOURCE.all_macros(tile_of(config), problem.dtype)), quantise)

    def prepare(self, packed: PackedWeight) -> Layout:
        values, bitmask = packed.tensors["values"], packed.tensors["bitmask"]
        # The last tensor holds nothing; its shape tells `run` the size of the weight inside the padding.
        extent = values.new_empty((*packed.shape, 0))
        return {"weight": to_fragments(values, bitmask, packed.shape), "scales": packed.tensors["scales"], "extent": extent}

    def recover(self, layout: Layout, packed: PackedWeight) -> PackedWeight:
        values, bitmask = from_fragments(layout["weight"], packed.shape)
        return replace(packed, tensors={"values": values, "bitmask": bitmask, "scales": layout["scales"]})

    def run(self, x: Tensor, layout: Layout, bias: Tensor | None, pattern: SparsityPattern) -> Tensor:
        return self.run_fused(x, layout, bias, pattern)

    def run_fused(
        self,
        x: Tensor,
        layout: Layout,
        bias: Tensor | None,
        pattern: SparsityPattern,
        *,
        relu: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        rows, columns, _ = layout["extent"].shape
        return _op(x, layout["weight"], layout["scales"], bias, residual, rows, columns, relu)

    def rows_of(self, layout: Layout, begin: int, end: int) -> Layout | None:
        if begin % 16 or (end % 16 and end != layout["extent"].shape[0]):
            return None
        extent = layout["extent"].new_empty((end - begin, *layout["extent"].shape[1:]))
        return {"weight": layout["weight"][begin // 16 : -(-end // 16)], "scales": layout["scales"][begin:end], "extent": extent}

    def run_config(self, x: Tensor, layout: Layout, bias: Tensor | None, pattern: SparsityPattern, config: Config) -> Tensor:
        if not config:
            return self.run(x, layout, bias, pattern)
        rows, columns, _ = layout["extent"].shape
        call = Call("2:4", x, layout["weight"], bias, None, rows, columns, False)
        return _product(tile_of(config), call, layout["scales"])


register(CudaNMInt8Kernel())
