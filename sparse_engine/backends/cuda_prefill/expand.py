"""The library's dense product by a dense copy of the weight that lives for the call: the form for any pattern and many activation rows."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_engine import cuda
from sparse_engine.backends.cuda_decode import Gpu, Streams, gpu
from sparse_engine.backends.cuda_prefill import TENSOR_FLOPS_PER_US, Call, Compilations, Form, register
from sparse_engine.registry import Config

__all__ = ["expanded"]

_THREADS = 256
_WARPS = _THREADS // 32
_TABLE_BYTES = 512 * 8 * 4
_FROM_MEMORY_BYTES_PER_US = 4.0e6


class _Params(ctypes.Structure):
    """``Params`` of csrc/cuda/expand_nm.cu and expand_unstructured.cu; ``offsets`` and ``depth`` are the latter's alone."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "offsets", "dense")),
        *((name, ctypes.c_int) for name in ("rows", "cols", "units", "tiles", "depth")),
    )


def _source(pattern: str, parts: int) -> tuple[str, tuple[tuple[str, int], ...]]:
    if pattern == "unstructured":
        return "expand_unstructured", (("PARTS", parts),)
    return "expand_nm", (("GROUP", int(pattern[-1])),)


@cache
def _function(pattern: str, parts: int, arch: str) -> cuda.CudaFunction:
    name, macros = _source(pattern, parts)
    return cuda.load(f"{name}.cu", name, arch, macros)


def expanded(pattern: str, weight: Tensor, rows: int, columns: int, streams: Streams | None) -> Tensor:
    """The dense (rows, columns) weight, of a layout of csrc/cuda/decode_nm.cu or, with ``streams``, of paired.cuh.

    Raises:
        KernelUnavailableError: the kernel cannot be compiled or launched.
    """
    dense = torch.empty(rows, columns, dtype=weight.dtype, device=weight.device)
    here = gpu(weight.device.index)
    parts = streams.parts if streams is not None else 1
    tiles, units = -(-rows // 16), -(-columns * parts // 256)
    offsets, depth = (streams.offsets.data_ptr(), streams.depth) if streams is not None else (None, 0)
    params = _Params(weight.data_ptr(), offsets, dense.data_ptr(), rows, columns, units, tiles, depth)
    function = _function(pattern, parts, here.arch)
    # Of expand_unstructured.cu: its table, barriers, and a slot for a unit of each warp.
    shared = _TABLE_BYTES + 128 + _WARPS * (128 + 512 // parts + 128 * (depth + 1)) if streams is not None else 0
    cuda.launch(function, (-(-tiles * units // _WARPS), 1), _THREADS, shared, params, weight.device.index, overlap=here.hopper)
    return dense


class ExpandForm(Form):
    name: ClassVar[str] = "expand"
    patterns: ClassVar[frozenset[str]] = frozenset({"2:4", "4:8", "unstructured"})

    def compilations(self, pattern: str, dtype: torch.dtype, config: Config, here: Gpu) -> Compilations:
        found = [_source(pattern, parts) for parts in ((1, 2) if pattern == "unstructured" else (1,))]
        return [(f"{name}.cu", here.arch, macros) for name, macros in found]

    def estimate_us(self, pattern: str, rows: int, columns: int, m: int, here: Gpu) -> float:
        # The packed weight is read, the dense one written and read again.
        moved = rows * columns * (9 / 8 + 2 * 2)
        return 8.0 + moved / _FROM_MEMORY_BYTES_PER_US + 2.0 * m * rows * columns / TENSOR_FLOPS_PER_US

    def run(self, call: Call, config: Config) -> Tensor:
        weight = expanded(call.pattern, call.weight, call.rows, call.columns, call.streams)
        if call.relu and call.bias is not None:
            y = torch._addmm_activation(call.bias, call.flat(), weight.t()).view(*call.x.shape[:-1], call.rows)
            return y if call.residual is None else y.add_(call.residual)
        return call.finish(F.linear(call.x, weight, call.bias))


register(ExpandForm())
