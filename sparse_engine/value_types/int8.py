"""int8 values: symmetric, one float32 scale per output row, w = level · scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from sparse_engine.value_types import register
from sparse_engine.value_types.base import TensorSpec, ValueType
from sparse_engine.value_types.scales import check_scales, levels_of

_LARGEST = 127


class Int8Values(ValueType):
    """``values`` int8, -127 .. 127, and ``scales`` float32 (rows,): the largest kept magnitude of the row over 127."""

    name = "int8"
    bits: ClassVar[int] = 8

    def element(self, dtype: torch.dtype) -> torch.dtype:
        return torch.int8

    def scale_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        return {"scales": TensorSpec((shape[0],), torch.float32)}

    def quantise(self, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        exact = weight.float()
        scales = exact.abs().amax(1) / _LARGEST if weight.shape[1] else exact.new_zeros(weight.shape[0])
        return levels_of(exact, scales[:, None], _LARGEST), {"scales": scales}

    def dequantise(self, levels: Tensor, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return (levels.float() * tensors["scales"][:, None]).to(dtype)

    def check(self, tensors: Mapping[str, Tensor]) -> str | None:
        if bool((tensors["values"] == -128).any()):
            return "values holds -128, where int8 levels are -127 to 127"
        return check_scales(tensors["scales"])


register(Int8Values())
