"""fp8 values: e4m3 (Micikevicius et al. 2022, "FP8 Formats for Deep Learning", section 3), one float32 scale per output row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from sparse_engine.value_types import register
from sparse_engine.value_types.base import TensorSpec, ValueType
from sparse_engine.value_types.scales import check_scales

_LARGEST = 448.0
_NAN = 0x7F
"""Of either sign; e4m3 has no infinity."""


class Fp8Values(ValueType):
    """``values`` float8_e4m3fn and ``scales`` float32 (rows,): the largest kept magnitude of the row over 448; w = level · scale."""

    name = "fp8"
    bits: ClassVar[int] = 8

    def element(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float8_e4m3fn

    def scale_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        return {"scales": TensorSpec((shape[0],), torch.float32)}

    def quantise(self, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        exact = weight.float()
        scales = exact.abs().amax(1) / _LARGEST if weight.shape[1] else exact.new_zeros(weight.shape[0])
        ratio = exact / torch.where(scales == 0, torch.inf, scales)[:, None]
        # Beyond the largest level a conversion may give NaN, and the quotient of a rounded scale may lie there.
        return ratio.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), {"scales": scales}

    def dequantise(self, levels: Tensor, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return (levels.float() * tensors["scales"][:, None]).to(dtype)

    def check(self, tensors: Mapping[str, Tensor]) -> str | None:
        if bool(((tensors["values"].view(torch.uint8) & _NAN) == _NAN).any()):
            return "values holds NaN, where fp8 levels are -448 to 448"
        return check_scales(tensors["scales"])


register(Fp8Values())
