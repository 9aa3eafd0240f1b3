"""What the tests of the CPU kernels share: the levels this processor has, masks, the library's arguments, and fenced memory."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from torch import Tensor

from sparse_engine import PackedWeight, SparsityPattern, native

needs_library = pytest.mark.skipif(
    isinstance(native._load(), str),
    reason=f"the native library cannot be used: it {native._load()}" if isinstance(native._load(), str) else "",
)
LEVELS = native.supported_isas() if not isinstance(native._load(), str) else []
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def random_keep(pattern: SparsityPattern, shape: tuple[int, int]) -> Tensor:
    if not pattern.is_nm:
        return torch.rand(shape) < pattern.density
    n, m = pattern.group
    kept = torch.rand(shape[0], shape[1] // m, m).topk(n, dim=-1).indices
    return torch.zeros(shape[0], shape[1] // m, m, dtype=torch.bool).scatter_(-1, kept, True).view(shape)


def library_arguments(packed: PackedWeight) -> tuple[Tensor | None, ...]:
    """values, scales, bitmask, row_offsets: in the order of the library's functions."""
    return tuple(packed.tensors.get(name) for name in ("values", "scales", "bitmask", "row_offsets"))


def nm(packed: PackedWeight) -> tuple[int, int]:
    return packed.pattern.n or 0, packed.pattern.m or 0


class Fenced:
    """Memory that ends at an inaccessible page: one byte too far ends the process."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.maps: list[tuple[mmap.mmap, int]] = []

    def place(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` whose last byte is the last one that may be touched."""
        page = mmap.PAGESIZE
        size = tensor.numel() * tensor.element_size()
        pages = -(-size // page) + 1
        memory = mmap.mmap(-1, pages * page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if self.libc.mprotect(ctypes.c_void_p(address + (pages - 1) * page), page, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
        self.maps.append((memory, address + (pages - 1) * page))
        copy = torch.frombuffer(memory, dtype=torch.uint8)[(pages - 1) * page - size : (pages - 1) * page]
        copy.copy_(tensor.contiguous().view(torch.uint8).flatten() if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8))
        return copy.view(tensor.dtype).view(tensor.shape)

    def open(self) -> None:
        for _, fence in self.maps:
            self.libc.mprotect(ctypes.c_void_p(fence), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)
