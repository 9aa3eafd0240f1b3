"""LayerNorm of a few rows (csrc/cuda/layernorm.cu)."""

from __future__ import annotations

import ctypes

from torch import Tensor
from torch.nn import functional as F

from sparse_engine.engine.kernels import launching
from sparse_engine.errors import InputError

__all__ = ["MAX_WIDTH", "layer_norm", "threads_for"]

MAX_WIDTH = 16384
"""Widest row that a block holds in registers."""


class _Params(ctypes.Structure):
    """``Params`` of csrc/cuda/layernorm.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")),
        ("width", ctypes.c_int),
        ("eps", ctypes.c_float),
    )


def threads_for(width: int, vector: int) -> tuple[int, int]:
    """Threads of a block and the vectors of ``vector`` elements that each holds, for rows of ``width``."""
    vectors = width // vector
    per_thread = 1
    while vectors > 1024 * per_thread:
        per_thread *= 2
    return min(1024, -(-vectors // per_thread // 32) * 32 or 32), per_thread


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> None:
    """out = (x - mean) / sqrt(variance + eps) * weight + bias over the last dimension; mean and variance in float32.

    ``x`` and ``out`` are contiguous (B, H) of one floating type, ``weight`` and ``bias`` (H,) of the same; out may be x.

    Raises:
        InputError: shapes, types or devices do not fit, or H is not a multiple of 8 up to 16384.
        KernelUnavailableError: the kernel cannot be compiled or launched.
    """
    width = x.shape[-1]
    if x.dtype not in launching.ELEMENT or width % 8 or not 0 < width <= MAX_WIDTH:
        raise InputError(
            f"LayerNorm of {x.dtype} rows of {width}; rows of float16, bfloat16 or float32 with a multiple of 8 up to 16384 work"
        )
    for name, tensor, shape in (("x", x, x.shape), ("weight", weight, (width,)), ("bias", bias, (width,)), ("out", out, x.shape)):
        launching.check(name, tensor, tuple(shape), x.dtype, x.device)
    if not x.is_cuda:
        out.copy_(F.layer_norm(x.float(), (width,), weight.float(), bias.float(), eps))
        return
    rows = x.numel() // width
    if not rows:
        return
    threads, per_thread = threads_for(width, 16 // x.element_size())
    params = _Params(x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr(), width, eps)
    macros = {"ELEMENT": launching.ELEMENT[x.dtype], "THREADS": threads, "PER_THREAD": per_thread}
    launching.run("layernorm.cu", "layer_norm", macros, (rows, 1), threads, params, x.device)
