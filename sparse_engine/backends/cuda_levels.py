"""8-bit levels of activation rows on NVIDIA GPUs (csrc/cuda/quantise_rows.cu)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_engine import cuda
from sparse_engine.backends.cuda_decode import gpu
from sparse_engine.levels import TokenLevels, levels_of_rows, new_levels

__all__ = ["LEVELS", "quantise_compilation", "quantise_rows"]

LEVELS: Mapping[torch.dtype, int] = {torch.float8_e4m3fn: 1, torch.int8: 2}
"""Types of levels, and what the macros LEVELS and VALUES of the CUDA sources call them."""
_THREADS = 256


class _Params(ctypes.Structure):
    """``Params`` of quantise_rows.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "levels", "scales")),
        ("stride", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("cols", "pitch", "vector")),
    )


def quantise_compilation(arch: str, dtype: torch.dtype, element: torch.dtype) -> tuple[str, str, tuple[tuple[str, int], ...]]:
    """Source, architecture and macros of the kernel that makes levels of type ``element`` from bfloat16 or float16 rows."""
    return "quantise_rows.cu", arch, (("ELEMENT", int(dtype is torch.bfloat16)), ("LEVELS", LEVELS[element]))


def quantise_rows(x: Tensor, element: torch.dtype) -> TokenLevels:
    """Levels of type ``element`` of x (m, columns), bfloat16 or float16: :func:`sparse_engine.levels.levels_of_rows`.

    Raises:
        KernelUnavailableError: the kernel cannot be compiled or launched.
    """
    if not x.is_cuda:
        return levels_of_rows(x, element)
    if x.stride(1) != 1:
        x = x.contiguous()
    m, columns = x.shape
    made = new_levels(m, columns, element, x.dtype, x.device)
    here = gpu(x.device.index)
    vector = int(x.data_ptr() % 16 == 0 and columns % 8 == 0 and (m == 1 or x.stride(0) % 8 == 0))
    places = (t.data_ptr() for t in (x, made.values, made.scales))
    params = _Params(*places, x.stride(0), columns, made.values.stride(0), vector)
    source, arch, macros = quantise_compilation(here.arch, x.dtype, element)
    cuda.launch(cuda.load(source, "quantise_rows", arch, macros), (m, 1), _THREADS, 0, params, x.device.index, overlap=here.hopper)
    return made
