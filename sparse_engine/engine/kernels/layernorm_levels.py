"""LayerNorm of rows straight into the 8-bit levels that products of quantised weights multiply (csrc/cuda/layernorm_levels.cu)."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_engine.backends.cuda_levels import LEVELS
from sparse_engine.engine.kernels import launching
from sparse_engine.engine.kernels.layernorm import MAX_WIDTH, row_macros
from sparse_engine.errors import InputError
from sparse_engine.levels import TokenLevels, levels_of_rows, new_levels

__all__ = ["layer_norm_levels", "level_macros"]


class _Params(ctypes.Structure):
    """``Params`` of csrc/cuda/layernorm_levels.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "levels", "scales", "bound", "ahead")),
        *((name, ctypes.c_int) for name in ("width", "pitch", "ahead_pitch")),
        ("eps", ctypes.c_float),
    )


def level_macros(width: int, dtype: torch.dtype, element: torch.dtype) -> dict[str, int]:
    """What csrc/cuda/layernorm_levels.cu is compiled with for rows of ``width``."""
    return {**row_macros(width, dtype), "LEVELS": LEVELS[element]}


def layer_norm_levels(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, element: torch.dtype, bound: Tensor | None = None
) -> TokenLevels:
    """Levels of type ``element`` of the LayerNorm of x (m, H), bfloat16 or float16: those of its values rounded to that type.

    ``weight`` and ``bias`` are (H,) of the type of x; all are contiguous. ``bound`` is the :func:`~sparse_engine.levels.relu_bound` of
    the product behind it, where that leaves levels too.

    Raises:
        InputError: shapes, types or devices do not fit, or H is not a multiple of 8 up to 16384.
        KernelUnavailableError: the kernel cannot be compiled or launched.
    """
    m, width = x.shape
    if x.dtype not in (torch.bfloat16, torch.float16) or width % 8 or not 0 < width <= MAX_WIDTH:
        raise InputError(f"levels of {x.dtype} rows of {width}; float16 or bfloat16 rows of a multiple of 8 up to {MAX_WIDTH} work")
    for name, tensor, shape in (("x", x, (m, width)), ("weight", weight, (width,)), ("bias", bias, (width,))):
        launching.check(name, tensor, shape, x.dtype, x.device)
    if not x.is_cuda:
        return levels_of_rows(F.layer_norm(x.float(), (width,), weight.float(), bias.float(), eps).to(x.dtype), element, bound)
    made = new_levels(m, width, element, x.dtype, x.device)
    if bound is not None:
        launching.check("bound", bound, (2,), torch.float32, x.device)
        made = replace(made, ahead=made.scales.new_empty(2, len(made.scales)))
    if not m:
        return made
    places = (t.data_ptr() for t in (x, weight, bias, made.values, made.scales))
    asked = (None if t is None else t.data_ptr() for t in (bound, made.ahead))
    params = _Params(*places, *asked, width, made.values.stride(0), len(made.scales), eps)
    macros = level_macros(width, x.dtype, element)
    launching.run("layernorm_levels.cu", "layer_norm_levels", macros, (m, 1), macros["THREADS"], params, x.device)
    return made
