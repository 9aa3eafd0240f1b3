"""What the kernel behind a launch will read, for the launch to ask for as far as L2 (csrc/cuda/include/ahead.cuh)."""

from __future__ import annotations

import ctypes

from torch import Tensor

__all__ = ["Ahead", "ahead_of_cache", "ahead_of_weight"]

_ALIGNED = 16


class Ahead(ctypes.Structure):
    """``Ahead`` of csrc/cuda/include/ahead.cuh; made of no arguments, nothing. What it points at must outlive the launch."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("first", "second", "length")),
        ("stride", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("rows", "bytes", "early")),
    )


def ahead_of_weight(weight: Tensor, most: int, *, early: bool) -> Ahead:
    """The first ``most`` bytes of a contiguous tensor, as soon as the launch's own first loads are on their way or behind the last."""
    count = min(weight.numel() * weight.element_size(), most) // _ALIGNED * _ALIGNED
    return Ahead(weight.data_ptr(), None, None, 0, 1, count, int(early)) if count else Ahead()


def ahead_of_cache(keys: Tensor, values: Tensor, lengths: Tensor, *, early: bool) -> Ahead:
    """The positions in use, ``lengths`` (1,) int32, of the keys and values (1, heads, S, D) of one row."""
    _, heads, capacity, size = keys.shape
    position = size * keys.element_size()
    return Ahead(keys.data_ptr(), values.data_ptr(), lengths.data_ptr(), capacity * position, heads, position, int(early))
