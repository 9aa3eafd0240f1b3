"""The product with an int8 output head for few activation rows (csrc/cuda/decode_int8.cu)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_engine.engine.kernels import launching
from sparse_engine.errors import InputError

__all__ = ["int8_linear", "most_rows"]

_WARPS = 8
_TILES = (1, 2, 4, 8)
"""Eights of activation rows that a launch may have."""
_MOST_SLABS = 4
"""Launches for many activation rows; more rows pay for expanding the weight."""
_CHUNK_BYTES = 64 << 20
"""Most bytes of expanded weight at a time, where there are too many activation rows for the kernel."""


class _Params(ctypes.Structure):
    """``Params`` of csrc/cuda/decode_int8.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "x", "y")),
        *((name, ctypes.c_int) for name in ("m", "rows", "cols")),
    )


def most_rows(columns: int, shared_limit: int) -> int:
    """Activation rows that the kernel takes at once: all of them lie in shared memory, in eights."""
    fitting = shared_limit // (8 * (2 * columns + 16))
    return 8 * max((tiles for tiles in _TILES if tiles <= fitting), default=0)


def int8_linear(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """x (M, K) times the transpose of the int8 ``values`` (V, K) with a float32 scale per row, ``scales`` (V,): (M, V) in x's type.

    Raises:
        InputError: shapes, types or devices do not fit, or K is not a multiple of 64 on a GPU.
        KernelUnavailableError: the kernel cannot be compiled or launched.
    """
    if x.dim() != 2 or values.dim() != 2 or x.shape[1] != values.shape[1] or x.dtype not in launching.ELEMENT:
        raise InputError(f"x {x.dtype} {tuple(x.shape)} by int8 values {tuple(values.shape)}; (M, K) by (V, K) is needed")
    (rows, columns), m = values.shape, len(x)
    launching.check("values", values, (rows, columns), torch.int8, x.device)
    launching.check("scales", scales, (rows,), torch.float32, x.device)
    if not x.is_cuda or x.dtype is torch.float32 or columns % 64 or not rows or not m:
        return _expanded(x, values, scales)
    here = launching.gpu(x.device.index)
    most = most_rows(columns, here.shared_limit)
    if m > _MOST_SLABS * most:
        return _expanded(x, values, scales)
    x = x.contiguous()
    y = x.new_empty(m, rows)
    for first in range(0, m, most):
        _launch(x[first : first + most], values, scales, y[first : first + most], here)
    return y


def _launch(x: Tensor, values: Tensor, scales: Tensor, y: Tensor, here: launching.Gpu) -> None:
    (rows, columns), m = values.shape, len(x)
    tiles = next(n for n in _TILES if m <= 8 * n)
    shared = 8 * tiles * (2 * columns + 16)
    params = _Params(*(t.data_ptr() for t in (values, scales, x, y)), m, rows, columns)
    macros = {"ELEM_BF16": int(x.dtype is torch.bfloat16), "N_TILES": tiles}
    resident = max(1, min(2 if tiles < 8 else 1, (here.shared_limit + 1024) // (shared + 1024)))
    blocks = min(here.processors * resident, -(-rows // 16 // _WARPS))
    launching.run("decode_int8.cu", "decode_int8", macros, (blocks, 1), 32 * _WARPS, params, x.device, shared_bytes=shared)


def _expanded(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """The same product over weights that are expanded some rows at a time."""
    step = max(1, _CHUNK_BYTES // (x.element_size() * values.shape[1]))
    y = x.new_empty(len(x), len(values))
    for begin in range(0, len(values), step):
        part = slice(begin, begin + step)
        if x.dtype is torch.bfloat16:
            # Every int8 value is a bfloat16 as it is, and no sum leaves the type's range.
            y[:, part] = F.linear(x, values[part].to(x.dtype)) * scales[part]
        else:
            y[:, part] = F.linear(x, (values[part].to(torch.float32) * scales[part, None]).to(x.dtype))
    return y
