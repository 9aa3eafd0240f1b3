"""Products of many rows by a packed weight on NVIDIA GPUs: a dense copy that lives for one product, then the library's dense one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_engine import cuda
from sparse_engine.backends.cuda_decode import gpu
from sparse_engine.registry import Problem

__all__ = ["EXPAND_ROWS", "dense_product", "estimate_us", "expand_nm"]

EXPAND_ROWS = 384
"""From more activation rows on the weight is expanded. Slabs of 128 rows read the packed weight once each; an expanded one is written
and read again, which costs about as much as three slabs."""

_THREADS = 256
_WARPS = _THREADS // 32


class _Params(ctypes.Structure):
    """``Params`` of csrc/cuda/expand_nm.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "dense")),
        *((name, ctypes.c_int) for name in ("rows", "cols", "units", "tiles")),
    )


def expand_nm(weight: Tensor, rows: int, columns: int, group: int) -> Tensor:
    """The dense (rows, columns) weight of fragments (tiles, units, 9, ...) of a 2:4 (``group`` 4) or 4:8 (8) weight.

    Raises:
        KernelUnavailableError: the kernel cannot be compiled or launched.
    """
    dense = torch.empty(rows, columns, dtype=weight.dtype, device=weight.device)
    tiles, units = weight.shape[:2]
    device = weight.device.index
    with torch.cuda.device(device):
        here = gpu(device)
        function = cuda.load("expand_nm.cu", "expand_nm", here.arch, (("GROUP", group),))
        params = _Params(weight.data_ptr(), dense.data_ptr(), rows, columns, units, tiles)
        cuda.launch(function, (-(-tiles * units // _WARPS), 1), _THREADS, 0, params, device, overlap=here.hopper)
    return dense


def dense_product(x: Tensor, expand: Callable[[], Tensor], bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    """x (..., in) by the weight that ``expand`` makes, plus bias, ReLU and residual."""
    weight = expand()
    if relu and bias is not None:
        y = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t()).view(*x.shape[:-1], -1)
    else:
        y = F.linear(x, weight, bias)
        if relu:
            y = torch.relu_(y)
    return y if residual is None else y.add_(residual)


def estimate_us(problem: Problem) -> float:
    """Estimated time on an H200: reading the packed weight, writing the dense one, and its product at a common rate."""
    moved = problem.packed_nbytes + 2 * problem.dense_nbytes
    return 8.0 + moved / 4.0e6 + 2.0 * problem.rows * problem.out_features * problem.in_features / 6.0e8
