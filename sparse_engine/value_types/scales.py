"""What the quantised value types share: rounding to levels, and the check of scales that came from outside."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_scales", "levels_of"]


def levels_of(weight: Tensor, scales: Tensor, largest: int) -> Tensor:
    """int8 levels, at most ``largest`` in magnitude, nearest to float32 ``weight`` / ``scales``; 0 where the scale is 0."""
    ratio = weight / torch.where(scales == 0, torch.inf, scales)
    return ratio.round().clamp(-largest, largest).to(torch.int8)


def check_scales(scales: Tensor) -> str | None:
    """What is wrong with scales that came from outside, or None."""
    if not bool(torch.isfinite(scales).all()) or bool((scales < 0).any()):
        return "scales holds a negative, NaN or infinite value"
    return None
