"""What tests of kernels share: masks drawn at random, and products compared with float64 of the unpacked weights."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_engine import formats
from sparse_engine.formats.base import PackedWeight
from sparse_engine.pattern import SparsityPattern

__all__ = ["expected_product", "random_keep", "relative_error"]


def random_keep(shape: tuple[int, int], pattern: SparsityPattern, generator: torch.Generator) -> Tensor:
    """A bool (rows, columns) mask of N:M groups drawn at random."""
    n, m = pattern.group
    order = torch.rand(shape[0], shape[1] // m, m, generator=generator).argsort(-1)
    return torch.zeros(order.shape, dtype=torch.bool).scatter_(2, order[..., :n], True).view(shape)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error against a float64 product."""
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def expected_product(x: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b in float64."""
    product = x.double() @ formats.get(packed.format).unpack(packed).double().T
    return product if bias is None else product + bias.double()
