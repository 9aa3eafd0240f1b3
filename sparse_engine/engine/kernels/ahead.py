"""What the kernel behind a launch reads first, for the launch to ask for as far as L2 (csrc/cuda/include/ahead.cuh)."""

from __future__ import annotations

import ctypes

from torch import Tensor

__all__ = ["Ahead", "ahead_of"]

_ALIGNED = 16


class Ahead(ctypes.Structure):
    """``Ahead`` of csrc/cuda/include/ahead.cuh; made of no arguments, nothing. What it points at must outlive the launch."""

    _fields_ = (("first", ctypes.c_void_p), ("bytes", ctypes.c_int))


def ahead_of(weight: Tensor, most: int) -> Ahead:
    """The first ``most`` bytes of a contiguous tensor."""
    count = min(weight.numel() * weight.element_size(), most) // _ALIGNED * _ALIGNED
    return Ahead(weight.data_ptr(), count) if count else Ahead()
