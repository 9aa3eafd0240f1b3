"""What the kernel behind the next launch will read, which that launch asks for as far as L2 (csrc/cuda/include/ahead.cuh)."""

from __future__ import annotations

import ctypes


class Ahead(ctypes.Structure):
    """``Ahead`` of csrc/cuda/include/ahead.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("first", "second", "length")),
        ("stride", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("rows", "bytes", "early", "from_", "own", "release")),
    )


PENDING: list[Ahead] = []


def take() -> Ahead:
    return PENDING.pop() if PENDING else Ahead()
