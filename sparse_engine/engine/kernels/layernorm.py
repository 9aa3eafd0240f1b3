"""LayerNorm of a few rows (csrc/cuda/layernorm.cu)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_engine.engine.kernels import launching
from sparse_engine.errors import InputError

__all__ = ["MAX_WIDTH", "layer_norm", "row_macros"]

MAX_WIDTH = 16384
"""Widest row that a block holds in registers."""


class _Params(ctypes.Structure):
    """``Params`` of csrc/cuda/layernorm.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "added", "total", "out")),
        ("width", ctypes.c_int),
        ("eps", ctypes.c_float),
    )


def row_macros(width: int, element: torch.dtype, *, least_threads: int = 32) -> dict[str, int]:
    """What csrc/cuda/row_norm.cuh is compiled with for rows of ``width``: up to 1,024 threads, each with one 16-byte vector or more."""
    vectors = width * element.itemsize // 16
    held = 1
    while vectors > 1024 * held:
        held *= 2
    threads = max(least_threads, -(-vectors // held // 32) * 32)
    return {"ELEMENT": launching.ELEMENT[element], "THREADS": threads, "PER_THREAD": held}


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor, *, added: Tensor | None = None, total: Tensor | None = None
) -> None:
    """out = (x - mean) / sqrt(variance + eps) * weight + bias over the last dimension; mean and variance in float32.

    ``x`` and ``out`` are contiguous (..., H) of one floating type, ``weight`` and ``bias`` (H,) of the same; out may be x.
    With ``added`` and ``total``, both like x: total = x + added is what is normalised; total may be x or added.

    Raises:
        InputError: shapes, types or devices do not fit, or H is not a multiple of 8 up to 16384.
        KernelUnavailableError: the kernel cannot be compiled or launched.
    """
    width = x.shape[-1]
    if x.dtype not in launching.ELEMENT or width % 8 or not 0 < width <= MAX_WIDTH:
        raise InputError(
            f"LayerNorm of {x.dtype} rows of {width}; rows of float16, bfloat16 or float32 with a multiple of 8 up to {MAX_WIDTH} work"
        )
    if (added is None) != (total is None):
        raise InputError("a LayerNorm of a sum takes both added and total")
    like_x = [(name, t) for name, t in (("x", x), ("added", added), ("total", total), ("out", out)) if t is not None]
    for name, tensor in like_x:
        launching.check(name, tensor, tuple(x.shape), x.dtype, x.device)
    for name, tensor in (("weight", weight), ("bias", bias)):
        launching.check(name, tensor, (width,), x.dtype, x.device)
    if not x.is_cuda:
        if added is not None and total is not None:
            x = torch.add(x, added, out=total)
        out.copy_(F.layer_norm(x.float(), (width,), weight.float(), bias.float(), eps))
        return
    rows = x.numel() // width
    if not rows:
        return
    sums = (t.data_ptr() if t is not None else None for t in (added, total))
    params = _Params(x.data_ptr(), weight.data_ptr(), bias.data_ptr(), *sums, out.data_ptr(), width, eps)
    macros = row_macros(width, x.dtype)
    launching.run("layernorm.cu", "layer_norm", macros, (rows, 1), macros["THREADS"], params, x.device)
