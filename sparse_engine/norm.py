"""A LayerNorm as kernels that begin with one take it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["LayerNormWeights"]


@dataclass(frozen=True, slots=True)
class LayerNormWeights:
    """weight and bias (H,), and eps."""

    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, module: nn.LayerNorm) -> LayerNormWeights:
        return cls(module.weight.detach(), module.bias.detach(), module.eps)
