"""The output head by a single activation row (csrc/cuda/head.cu)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparse_engine import cuda
from sparse_engine.engine.kernels import launching
from sparse_engine.errors import InputError

__all__ = ["head_macros", "head_row", "suits"]

_UNIT = 256
_WIDEST = 5120
_GROUP_BYTES = 6144
"""Of the rows that a warp takes at a time, or of one row where that is longer."""
_RESIDENT = 2
"""Blocks of a multiprocessor."""
_MOST_ROWS = 8


class _Params(ctypes.Structure):
    """``Params`` of csrc/cuda/head.cu."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("weight", "x", "logits")), ("vocabulary", ctypes.c_int))


def suits(weight: Tensor) -> bool:
    """Whether the kernel takes a head (V, E)."""
    typed = weight.is_cuda and weight.dtype in (torch.float16, torch.bfloat16) and weight.is_contiguous()
    if not typed or weight.shape[1] % _UNIT or weight.shape[1] > _WIDEST or not weight.numel() or cuda.why_unavailable():
        return False
    here = launching.gpu(weight.device.index)
    return here.hopper and weight.data_ptr() % 16 == 0


def head_macros(width: int, dtype: torch.dtype, shared_limit: int) -> dict[str, int]:
    """What csrc/cuda/head.cu is compiled with for rows of ``width``: as many slots as two blocks of a multiprocessor have room for."""
    rows = max(1, min(_MOST_ROWS, _GROUP_BYTES // (2 * width)))
    warps = 8 if rows * width * 2 <= _GROUP_BYTES else 4
    room = (shared_limit + 1024) // _RESIDENT - 1024 - 2 * width - 512
    slots = max(1, min(4, room // (warps * rows * width * 2)))
    return {"ELEM_BF16": int(dtype is torch.bfloat16), "WIDTH": width, "ROWS": rows, "SLOTS": slots, "WARPS": warps, "AHEAD": 1}


def head_row(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., E), one row, by ``weight`` (V, E) as (..., V), rounded once from float32 sums; :func:`suits` is true of the weight.

    Raises:
        InputError: x has more rows, or another width or type.
        KernelUnavailableError: the kernel cannot be compiled or launched.
    """
    vocabulary, width = weight.shape
    if x.numel() != width or x.shape[-1] != width or x.dtype is not weight.dtype or x.device != weight.device:
        raise InputError(f"x is {x.dtype} {tuple(x.shape)} on {x.device}, expected one row of {width} {weight.dtype} on {weight.device}")
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    here = launching.gpu(weight.device.index)
    macros = head_macros(width, weight.dtype, here.shared_limit)
    group_bytes = macros["ROWS"] * width * 2
    shared = macros["WARPS"] * macros["SLOTS"] * group_bytes + 2 * width
    blocks = min(_RESIDENT * here.processors, -(-vocabulary // (macros["ROWS"] * macros["WARPS"])))
    y = x.new_empty((*x.shape[:-1], vocabulary))
    params = _Params(weight.data_ptr(), x.data_ptr(), y.data_ptr(), vocabulary)
    launching.run("head.cu", "head", macros, (blocks, 1), 32 * macros["WARPS"], params, weight.device, shared_bytes=shared)
    return y
