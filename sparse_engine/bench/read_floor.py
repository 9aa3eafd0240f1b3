"""The least time that any kernel over given bytes can take: csrc/cuda/read_floor.cu, which only reads them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_engine import cuda
from sparse_engine.backends.cuda_decode import gpu

__all__ = ["read_products"]

_THREADS = 256
_UNROLL = 4
BLOCKS_PER_PROCESSOR = (1, 2, 4, 8)
"""Grids to try; which of them is the fastest depends on the number of bytes."""


class _Params(ctypes.Structure):
    """``Params`` of read_floor.cu."""

    _fields_ = (("data", ctypes.c_void_p), ("sink", ctypes.c_void_p), ("count", ctypes.c_uint64))


def read_products(data: list[Tensor], blocks_per_processor: int) -> list[Callable[[], None]]:
    """A launch per tensor of ``data`` that reads its bytes, those beyond a multiple of 16 left out.

    Raises:
        KernelUnavailableError: the kernel cannot be compiled here.
    """
    device = data[0].device
    here = gpu(device.index)
    function = cuda.load("read_floor.cu", "read_floor", here.arch, (("UNROLL", _UNROLL),))
    sink = torch.zeros(1, dtype=torch.int32, device=device)

    def product(tensor: Tensor) -> Callable[[], None]:
        count = tensor.numel() * tensor.element_size() // 16
        blocks = max(1, min(here.processors * blocks_per_processor, -(-count // _THREADS)))
        params = _Params(tensor.data_ptr(), sink.data_ptr(), count)

        def launch(kept: tuple[Tensor, Tensor] = (tensor, sink)) -> None:
            cuda.launch(function, (blocks, 1), _THREADS, 0, params, kept[0].device.index, overlap=here.hopper)

        return launch

    return [product(tensor) for tensor in data]
