"""LayerNorm and product of one activation row in one kernel (csrc/cuda/decode_row.cu), for 2:4 and 4:8 weights in fragment order."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparse_engine import cuda
from sparse_engine.backends.cuda_ahead import take
from sparse_engine.backends.cuda_decode import Params, check_arguments, kernel_params
from sparse_engine.backends.cuda_sources import UNIT, Gpu, Source, Tile, blocks_at_once, gpu, macros_of
from sparse_engine.errors import InputError
from sparse_engine.norm import LayerNormWeights

__all__ = ["WIDEST", "macros", "row_linear", "objection", "shared_bytes"]

WIDEST = 8192
"""Columns up to which layernorm.cu, whose results these are, has one vector for each of its threads."""
_AHEAD = 2
"""Units of each warp that come as far as L2 while predecessors run."""
_ZERO_BYTES = 128


class _Params(ctypes.Structure):
    """``RowParams`` of csrc/cuda/decode_row.cu."""

    _fields_ = (("product", Params), ("scale", ctypes.c_void_p), ("shift", ctypes.c_void_p), ("eps", ctypes.c_float))


def objection(source: Source, tile: Tile, columns: int) -> str | None:
    """Why there is no such kernel for a product that ``source`` runs with ``tile``, as a phrase that can follow "it", or None."""
    if columns % UNIT:
        return f"has {columns} columns, no multiple of {UNIT} up to {WIDEST}"
    if source.file != "decode_nm.cu" or (tile.n_tiles, tile.row_tiles, tile.warps_row, tile.splits) != (1, 1, 1, 1):
        return "is no product of a row tile for each block"
    return None


def macros(source: Source, tile: Tile, columns: int, dtype: torch.dtype, normed: bool) -> tuple[tuple[str, int], ...]:
    """What the kernel is compiled with."""
    return tuple(sorted({**dict(macros_of(source, tile, dtype)), "COLS": columns, "NORMED": int(normed)}.items()))


def shared_bytes(tile: Tile, columns: int, normed: bool) -> int:
    """Shared memory of a block: zeros, the row and the shifts, moments, sums of two tiles, and what the epilogue adds."""
    norm = 2 * columns + -(-8 * (columns // UNIT) // 16) * 16 if normed else 0
    return _ZERO_BYTES + 2 * columns + norm + 8 * tile.warps_k * (tile.block_rows + 4) + 4 * tile.block_rows


def _grid(tile: Tile, rows: int, columns: int, normed: bool, here: Gpu) -> int:
    """Blocks that are resident at once: each normalises the row, and goes from tile to tile without a stop."""
    return min(-(-rows // tile.block_rows), here.processors * blocks_at_once(tile, shared_bytes(tile, columns, normed), here))


def row_linear(
    chosen: tuple[Source, Tile],
    x: Tensor,
    norm: LayerNormWeights | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rows: int,
    columns: int,
    relu: bool,
) -> Tensor:
    """LayerNorm(x) (..., columns), one row, by the weight (rows, columns) behind ``weight``, plus bias and ReLU.

    :func:`objection` has none to the source and tile that are ``chosen``.

    Raises:
        InputError: shapes, types or devices do not fit.
        KernelUnavailableError: the kernel cannot be compiled or launched.
    """
    check_arguments(x, weight, bias, residual, rows, columns)
    source, tile = chosen
    if x.numel() != columns or (reason := objection(source, tile, columns)):
        raise InputError(
            f"x is {tuple(x.shape)}: one row of {columns} is normalised here" if x.numel() != columns else f"the product {reason}"
        )
    for name, tensor in () if norm is None else (("the LayerNorm's weight", norm.weight), ("its bias", norm.bias)):
        if tensor.shape != (columns,) or tensor.dtype is not x.dtype or tensor.device != x.device or not tensor.is_contiguous():
            raise InputError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected contiguous {x.dtype} ({columns},)")
    device = x.device.index
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return row_linear(chosen, x, norm, weight, bias, residual, rows, columns, relu)
    here = gpu(device)
    row, scale, shift = (
        t if t is None or t.data_ptr() % 16 == 0 else t.clone()
        for t in (x.reshape(1, columns), *((norm.weight, norm.bias) if norm else (None, None)))
    )
    y = x.new_empty((*x.shape[:-1], rows))
    product = kernel_params(row, weight, bias, residual, y, columns // UNIT, relu)
    product.ahead = take()
    params = _Params(product, *(t.data_ptr() if t is not None else None for t in (scale, shift)), norm.eps if norm else 0.0)
    function = cuda.load("decode_row.cu", "decode_row", here.arch, macros(source, tile, columns, x.dtype, norm is not None))
    grid, threads = (_grid(tile, rows, columns, norm is not None, here), 1), source.threads(tile)
    cuda.launch(function, grid, threads, shared_bytes(tile, columns, norm is not None), params, device, overlap=here.hopper)
    return y
