"""Plain values: the kept weights in their own floating type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from sparse_engine.value_types import PLAIN, register
from sparse_engine.value_types.base import TensorSpec, ValueType


class PlainValues(ValueType):
    name = PLAIN
    bits: ClassVar[int] = 0  # those of the weight's type

    def element(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def scale_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        return {}

    def quantise(self, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return weight, {}

    def dequantise(self, levels: Tensor, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return levels

    def check(self, tensors: Mapping[str, Tensor]) -> str | None:
        return None


register(PlainValues())
