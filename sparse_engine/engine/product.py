"""Products of a decode step: a packed or dense linear with its bias, ReLU and residual in one call, and q, k, v as one product."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_engine import value_types
from sparse_engine.engine.kernels.head import head_row, suits
from sparse_engine.engine.kernels.int8 import int8_linear
from sparse_engine.engine.kernels.layernorm_levels import layer_norm_levels
from sparse_engine.linear import SparseLinear

if TYPE_CHECKING:
    from sparse_engine.engine.weights import LayerNormWeights

__all__ = [
    "DenseProduct",
    "HeadProduct",
    "Int8Product",
    "PackedProduct",
    "Product",
    "SideBySide",
    "feed_forward",
    "int8_head",
    "product",
    "stacked",
]


class Product(ABC):
    """y (M, out) = x (M, in) Wᵀ + b, then ReLU where asked for."""

    @abstractmethod
    def __call__(self, x: Tensor, *, relu: bool = False) -> Tensor: ...

    def of_norm(self, norm: LayerNormWeights, x: Tensor, *, relu: bool = False) -> Tensor:
        """y of the LayerNorm of x (M, in)."""
        return self(norm(x), relu=relu)

    def levels_at(self, rows: int) -> torch.dtype | None:
        """The type of the 8-bit levels that :meth:`of_norm` of so many rows multiplies and the LayerNorm leaves; None: no levels."""
        return None

    def onto(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``residual`` + y as (sum, None), or (``residual``, y) where adding them is left to the LayerNorm that follows."""
        return residual, self(x)


class PackedProduct(Product):
    def __init__(self, module: SparseLinear) -> None:
        self.module = module
        module.plan()

    def __call__(self, x: Tensor, *, relu: bool = False) -> Tensor:
        return self.module.fused(x, relu=relu)

    def levels_at(self, rows: int) -> torch.dtype | None:
        return self.module.levels_at(rows)

    def of_norm(self, norm: LayerNormWeights, x: Tensor, *, relu: bool = False) -> Tensor:
        element = self.module.levels_at(len(x))
        if element is None:
            return super().of_norm(norm, x, relu=relu)
        return self.module.of_levels(layer_norm_levels(x, norm.weight, norm.bias, norm.eps, element), relu=relu)

    def onto(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.module.fused(x, residual=residual), None


class DenseProduct(Product):
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.transposed = weight.t()

    def __call__(self, x: Tensor, *, relu: bool = False) -> Tensor:
        if relu and self.bias is not None and x.is_cuda:
            # cuBLASLt applies the ReLU in its epilogue.
            return torch._addmm_activation(self.bias, x, self.transposed)
        y = F.linear(x, self.weight, self.bias)
        return F.relu(y) if relu else y


class HeadProduct(DenseProduct):
    """The output head (V, E), which a kernel of its own multiplies by single rows on a GPU."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight, None)
        self.alone = suits(weight)

    def __call__(self, x: Tensor, *, relu: bool = False) -> Tensor:
        if not self.alone or x.numel() != x.shape[-1]:
            return super().__call__(x, relu=relu)
        y = head_row(x, self.weight)
        return F.relu(y) if relu else y


def int8_head(weight: Tensor) -> dict[str, Tensor]:
    """``values`` int8 (V, E) and ``scales`` float32 (V,) of an output head, dense rows quantised as packed int8 ones are."""
    levels, scales = value_types.get("int8").quantise(weight.detach())
    return {"values": levels, **scales}


class Int8Product(Product):
    """An output head as :func:`int8_head` stores it."""

    def __init__(self, weight: Tensor) -> None:
        head = int8_head(weight)
        self.values, self.scales = head["values"], head["scales"]

    def __call__(self, x: Tensor, *, relu: bool = False) -> Tensor:
        y = int8_linear(x, self.values, self.scales)
        return F.relu(y) if relu else y


class SideBySide(Product):
    """Several products of one input, their outputs concatenated: what runs where their weights cannot be stacked."""

    def __init__(self, products: Sequence[Product]) -> None:
        self.products = products

    def __call__(self, x: Tensor, *, relu: bool = False) -> Tensor:
        return torch.cat([one(x, relu=relu) for one in self.products], -1)


def feed_forward(first: Product, second: Product, norm: LayerNormWeights, h: Tensor) -> tuple[Tensor, Tensor | None]:
    """:meth:`Product.onto` of ``h`` and ReLU(``first``) of its LayerNorm by ``second``; 8-bit levels stay between where both can."""
    rows = len(h)
    if isinstance(first, PackedProduct) and isinstance(second, PackedProduct):
        element = first.levels_at(rows)
        bound = first.module.relu_bound(rows) if element is second.levels_at(rows) else None
        if element is not None and bound is not None:
            tokens = layer_norm_levels(h, norm.weight, norm.bias, norm.eps, element, bound)
            return second.module.of_levels(first.module.relu_levels(tokens), residual=h), None
    return second.onto(h, first.of_norm(norm, h, relu=True))


def product(module: nn.Module) -> Product:
    """The product of a ``SparseLinear`` or ``nn.Linear``."""
    if isinstance(module, SparseLinear):
        return PackedProduct(module)
    assert isinstance(module, nn.Linear)
    return DenseProduct(module.weight.detach(), None if module.bias is None else module.bias.detach())


def stacked(modules: Sequence[nn.Module]) -> Product:
    """One product that computes the outputs of ``modules`` side by side; the modules keep working, on views of its weight."""
    if all(isinstance(module, SparseLinear) for module in modules):
        layers = [module for module in modules if isinstance(module, SparseLinear)]
        whole = SparseLinear.stacked(layers)
        return PackedProduct(whole) if whole is not None else SideBySide([PackedProduct(layer) for layer in layers])
    if not all(type(module) is nn.Linear for module in modules):
        return SideBySide([product(module) for module in modules])
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    if len({module.bias is None for module in linears}) > 1:
        return SideBySide([product(module) for module in linears])
    weight = _join(linears)
    bias = None if linears[0].bias is None else torch.cat([module.bias.detach() for module in linears])
    return DenseProduct(weight, bias)


def _join(linears: Sequence[nn.Linear]) -> Tensor:
    """The linears' weights one below the other in one tensor, of which they become views."""
    weights = [linear.weight.detach() for linear in linears]
    rows = [len(weight) for weight in weights]
    base = weights[0]._base if weights[0]._base is not None else None
    places = [weight.data_ptr() for weight in weights]
    if base is not None and base.shape == (sum(rows), weights[0].shape[1]) and base.data_ptr() == places[0]:
        ends = [place + weight.nbytes for place, weight in zip(places, weights, strict=True)]
        if places[1:] == ends[:-1]:
            return base  # joined by an earlier runner of this model
    whole = torch.cat(weights)
    begin = 0
    for linear, count in zip(linears, rows, strict=True):
        linear.weight.data = whole[begin : begin + count]
        begin += count
    return whole
