"""int4 values: symmetric, one float16 scale per output row and 128 columns, chosen for the least squared error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_engine.value_types import register
from sparse_engine.value_types.base import TensorSpec, ValueType
from sparse_engine.value_types.scales import check_scales, levels_of

GROUP = 128
"""Columns that share a scale."""

_LARGEST = 7
_CLIP_RATIOS = tuple(1 - i / 20 for i in range(10))
"""Shares of a group's largest magnitude that are tried as the largest representable one: clipping a few outliers may serve the rest."""


class Int4Values(ValueType):
    """``values`` uint8 of two levels -7 .. 7 in two's complement, the first in the low half; a row starts on a whole byte.

    ``scales`` float16 (rows, ceil(columns/128)); w = level · scales[row, column // 128].
    """

    name = "int4"
    slots: ClassVar[int] = 2
    bits: ClassVar[int] = 4

    def element(self, dtype: torch.dtype) -> torch.dtype:
        return torch.uint8

    def scale_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        return {"scales": TensorSpec((shape[0], -(-shape[1] // GROUP)), torch.float16)}

    def quantise(self, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rows, columns = weight.shape
        grouped = F.pad(weight.float(), (0, -columns % GROUP)).view(rows, -1, GROUP)
        largest = grouped.abs().amax(2) / _LARGEST if rows and columns else grouped.new_zeros(grouped.shape[:2])
        best = torch.full_like(largest, torch.inf)
        scales = torch.zeros_like(largest, dtype=torch.float16)
        for ratio in _CLIP_RATIOS:
            # Levels are chosen for the scale as it is stored. One beyond float16 would be infinite.
            tried = (largest * ratio).clamp(max=torch.finfo(torch.float16).max).half()
            error = (grouped - levels_of(grouped, tried.float()[:, :, None], _LARGEST) * tried.float()[:, :, None]).square().sum(2)
            better = error < best
            best, scales = torch.where(better, error, best), torch.where(better, tried, scales)
        levels = levels_of(grouped, scales.float()[:, :, None], _LARGEST).view(rows, -1)[:, :columns]
        return levels, {"scales": scales}

    def dequantise(self, levels: Tensor, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        scales = tensors["scales"].float().repeat_interleave(GROUP, 1)[:, : levels.shape[1]]
        return (levels.float() * scales).to(dtype)

    def check(self, tensors: Mapping[str, Tensor]) -> str | None:
        values = tensors["values"]
        if bool(((values & 0xF) == 8).any()) or bool(((values >> 4) == 8).any()):
            return "values holds -8, where int4 levels are -7 to 7"
        return check_scales(tensors["scales"])

    def store(self, levels: Tensor, counts: Tensor) -> Tensor:
        filled = _filled_slots(counts)
        slots = torch.zeros(filled.numel(), dtype=torch.uint8, device=levels.device)
        slots[filled] = levels.view(torch.uint8) & 0xF
        return slots[0::2] | slots[1::2] << 4

    def load(self, values: Tensor, counts: Tensor) -> Tensor:
        # Shifting the low half up and back down as a signed number extends its sign.
        signed = values.flatten().view(torch.int8)
        slots = torch.stack((signed << 4 >> 4, signed >> 4), 1).flatten()
        return slots[_filled_slots(counts)]


def _filled_slots(counts: Tensor) -> Tensor:
    """Bool (slots,): False at the last slot of each row with an odd number of levels."""
    odd = counts % 2
    ends = (counts + odd).cumsum(0)
    filled = torch.ones(int(ends[-1]) if len(ends) else 0, dtype=torch.bool, device=counts.device)
    filled[ends[odd.bool()] - 1] = False
    return filled


register(Int4Values())
