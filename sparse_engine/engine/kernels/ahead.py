"""What the kernel behind a launch reads first, for the launch to ask for as far as L2 (csrc/cuda/include/ahead.cuh)."""

from __future__ import annotations

from torch import Tensor

from sparse_engine.backends.cuda_decode import Ahead

__all__ = ["Ahead", "ahead_of"]

_ALIGNED = 16


def ahead_of(weight: Tensor, most: int) -> Ahead:
    """The first ``most`` bytes of a contiguous tensor."""
    count = min(weight.numel() * weight.element_size(), most) // _ALIGNED * _ALIGNED
    return Ahead(weight.data_ptr(), count) if count else Ahead()
