"""Runs the decode kernels of csrc/cuda: checks of the arguments, activations laid out, and the launch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from sparse_engine import cuda
from sparse_engine.backends.cuda_sources import (
    MAX_ROWS,
    UNIT,
    Gpu,
    Source,
    StreamedSource,
    StreamSource,
    Tile,
    WarpgroupSource,
    arrange_macros,
    fit,
    gpu,
    macros_of,
    whole_lines,
)
from sparse_engine.errors import InputError

__all__ = [
    "MAX_ROWS",
    "UNIT",
    "Ahead",
    "Gpu",
    "Params",
    "RowParams",
    "Source",
    "StreamSource",
    "Streams",
    "Tile",
    "WarpgroupSource",
    "arrange_macros",
    "check_arguments",
    "fit",
    "fragment_linear_fake",
    "gpu",
    "kernel_params",
    "macros_of",
    "run_decode",
]

_ARRANGE_THREADS = 256


class Params(ctypes.Structure):
    """``Params`` of decode_common.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "offsets", "x", "bias", "residual", "y")),
        *((name, ctypes.c_int) for name in ("m", "rows", "cols", "ldx", "units", "relu", "x_vector", "y_vector", "depth", "x_buffers")),
    )


class Ahead(ctypes.Structure):
    """``Ahead`` of ahead.cuh; made of no arguments, nothing. What it points at must outlive the launch."""

    _fields_ = (("first", ctypes.c_void_p), ("bytes", ctypes.c_int))


class RowParams(ctypes.Structure):
    """``RowParams`` of row_input.cuh; without a LayerNorm only ``product`` and ``ahead`` are read."""

    _fields_ = (("product", Params), ("scale", ctypes.c_void_p), ("shift", ctypes.c_void_p), ("eps", ctypes.c_float), ("ahead", Ahead))


@dataclass(frozen=True, slots=True)
class Streams:
    """The further parts of an unstructured weight, see csrc/cuda/paired.cuh."""

    offsets: Tensor
    depth: int
    """Words of the deepest unit."""
    parts: int
    """Units are 256 / parts columns."""


def kernel_params(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    units: int,
    relu: bool,
    streams: Streams | None = None,
) -> Params:
    """``Params`` of decode_common.cuh for a kernel that takes all of x (m, columns), 16-byte aligned rows, at once; y is (..., rows)."""
    rows = y.shape[-1]
    stored = (y.data_ptr(), *(t.data_ptr() for t in (bias, residual) if t is not None))
    return Params(
        weight.data_ptr(),
        streams.offsets.data_ptr() if streams is not None else None,
        x.data_ptr(),
        bias.data_ptr() if bias is not None else None,
        residual.data_ptr() if residual is not None else None,
        y.data_ptr(),
        x.shape[0],
        rows,
        x.shape[1],
        x.stride(0),
        units,
        int(relu),
        1,
        int(rows % 4 == 0 and all(at % 8 == 0 for at in stored)),
        streams.depth if streams is not None else 0,
        0,
    )


@cache
def _function(source: Source, arch: str, element: torch.dtype, tile: Tile) -> cuda.CudaFunction:
    return cuda.load(source.file, source.function, arch, macros_of(source, tile, element))


def check_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, rows: int, columns: int) -> None:
    """Raise InputError where the operands of x (..., columns) by a weight (rows, columns) and its epilogue do not fit each other."""
    if x.dtype is not weight.dtype:
        raise InputError(f"x is {x.dtype} but the weight's values are {weight.dtype}; cast x to the weight's type")
    if x.shape[-1] != columns:
        raise InputError(f"x has {x.shape[-1]} columns but the weight takes {columns}")
    if bias is not None and (bias.shape != (rows,) or bias.dtype is not x.dtype or not bias.is_contiguous()):
        raise InputError(f"bias is {bias.dtype} {tuple(bias.shape)}, expected contiguous {x.dtype} ({rows},)")
    shape = (*x.shape[:-1], rows)
    if residual is not None and (residual.shape != shape or residual.dtype is not x.dtype or not residual.is_contiguous()):
        raise InputError(f"residual is {residual.dtype} {tuple(residual.shape)}, expected contiguous {x.dtype} {shape}")
    if any(t is not None and t.device != x.device for t in (weight, bias, residual)):
        raise InputError(f"x lies on {x.device} and the weight, bias or residual elsewhere; move them to one device")


def _arrange(source: WarpgroupSource, tile: Tile, params: Params, x: Tensor, subtiles: int, warps: int, here: Gpu, device: int) -> Tensor:
    """The image of the activations that ``params`` describes, ``subtiles`` of 64 columns, as csrc/cuda/arrange.cu lays it out.

    Behind it lies the workspace that ``warps`` of decode_stream.cu share, its flags cleared.
    """
    image_bytes = subtiles * 8 * tile.n_tiles * 128
    image = torch.empty(image_bytes + whole_lines(4 * warps) + warps * tile.n_tiles * 512, dtype=torch.uint8, device=x.device)
    arranged = Params.from_buffer_copy(params)
    arranged.y, arranged.units, arranged.rows = image.data_ptr(), subtiles, warps
    function = cuda.load("arrange.cu", "arrange", here.arch, arrange_macros(source, tile))
    blocks = -(-subtiles * 8 * params.m // _ARRANGE_THREADS)
    cuda.launch(function, (blocks, 1), _ARRANGE_THREADS, 0, arranged, device, overlap=True)
    return image


def run_decode(
    choose: Callable[[torch.dtype, int, int, int, Gpu], tuple[Source, Tile]],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rows: int,
    columns: int,
    relu: bool,
    streams: Streams | None = None,
) -> Tensor:
    """x (..., columns) by the weight (rows, columns) behind ``weight``, plus bias, ReLU and residual; see decode_common.cuh.

    ``choose(dtype, rows, columns, m, gpu)`` gives the kernel and tile for m activation rows, of which the kernel may take fewer.
    ``streams`` belongs to an unstructured weight.

    Raises:
        InputError: shapes, types or devices do not fit.
        KernelUnavailableError: the kernel cannot be compiled or launched.
    """
    check_arguments(x, weight, bias, residual, rows, columns)
    y = x.new_empty((*x.shape[:-1], rows))
    m = x.numel() // columns
    if y.numel() == 0:
        return y
    flat = x.reshape(m, columns)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    device = x.device.index
    current = torch.cuda.current_device()
    if device != current:
        with torch.cuda.device(device):
            return run_decode(choose, x, weight, bias, residual, rows, columns, relu, streams)
    here = gpu(device)
    stride, itemsize = flat.stride(0), x.element_size()
    pointer, out = flat.data_ptr(), y.data_ptr()
    vector = int(pointer % 16 == 0 and columns % 8 == 0 and (m == 1 or stride % 8 == 0))
    stored = (out, *(t.data_ptr() for t in (bias, residual) if t is not None))
    y_vector = int(rows % 4 == 0 and all(at % 8 == 0 for at in stored))
    offsets: int | None = None
    depth, parts = 0, 1
    if streams is not None:
        offsets, depth, parts = streams.offsets.data_ptr(), streams.depth, streams.parts
    units = -(-columns * parts // UNIT)
    mappable: Tensor | None = None
    first = 0
    while first < m:
        source, tile = choose(x.dtype, rows, columns, m - first, here)
        count = min(source.max_rows, m - first)
        if streams is not None and tile.parts != parts:
            # What the layout has, whatever a table says.
            tile = replace(tile, parts=parts)
        tile = fit(source, tile, count, depth, here)
        x_buffers, shared = 0, source.shared_bytes(tile, count, depth)
        if isinstance(source, StreamSource):
            x_buffers = source.x_buffers(tile, count, depth, units, here)
            shared = source.shared_bytes(tile, count, depth, x_buffers)
        params = Params(
            weight.data_ptr(),
            offsets,
            pointer + first * stride * itemsize,
            bias.data_ptr() if bias is not None else None,
            residual.data_ptr() + first * rows * itemsize if residual is not None else None,
            out + first * rows * itemsize,
            count,
            rows,
            columns,
            stride,
            units,
            int(relu),
            vector,
            y_vector,
            depth,
            x_buffers,
        )
        grid, described = source.grid(tile, rows, units, shared, here), None
        if isinstance(source, WarpgroupSource) and source.arranged:
            warps = grid[0] * tile.warps_row if isinstance(source, StreamedSource) else 0
            image = _arrange(source, tile, params, x, units * (4 // parts), warps, here, device)
            params.x = image.data_ptr()
        elif isinstance(source, WarpgroupSource):
            if mappable is None:
                mappable = cuda.describable(flat)
            described = cuda.tensor_map(mappable if count == m else mappable[first : first + count], source.box(tile))
        function = _function(source, here.arch, x.dtype, tile)
        threads, cluster = source.threads(tile), source.cluster(tile)
        cuda.launch(function, grid, threads, shared, params, device, cluster=cluster, overlap=here.hopper, described=described)
        first += count
    return y


def fragment_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, rows: int, *_: object) -> Tensor:
    """Shape of the product, for tracing."""
    return x.new_empty((*x.shape[:-1], rows))
