"""Layers whose four products are packed N:M weights in fragment order, as the kernels that run more than one product at once read them."""

from __future__ import annotations

from torch import Tensor

from sparse_engine.engine.kernels.layer_tensors import LayerTensors
from sparse_engine.engine.product import PackedProduct, Product
from sparse_engine.engine.weights import DecoderLayer, DecoderWeights
from sparse_engine.linear import SparseLinear

__all__ = ["epsilon_of", "group_of", "tensors_of"]

_KERNEL = "cuda_nm"
"""The kernel whose layout of a packed weight is in fragment order."""


def group_of(weights: DecoderWeights) -> int | None:
    """4 where all layers are 2:4 and 8 where all are 4:8, with biases and in fragment order; else None."""
    groups = {_group(part) for layer in weights.layers for part in (layer.qkv, layer.out, layer.fc1, layer.fc2)}
    group = groups.pop() if len(groups) == 1 else None
    return group if group in (4, 8) else None


def epsilon_of(weights: DecoderWeights) -> float | None:
    """That of all the LayerNorms, or None where they differ or the last is missing."""
    norms = [norm for layer in weights.layers for norm in (layer.attention_norm, layer.ffn_norm)]
    epsilons = {norm.eps for norm in norms} | ({weights.final_norm.eps} if weights.final_norm is not None else {None})
    return epsilons.pop() if len(epsilons) == 1 else None


def _group(product: Product) -> int | None:
    """Columns of a group of an N:M product in fragment order, or None where it has another layout."""
    if not isinstance(product, PackedProduct):
        return None
    module = product.module
    if _weight(module) is None or module.bias is None or not module.pattern.is_nm:
        return None
    return module.pattern.group[1]


def _weight(module: SparseLinear) -> Tensor | None:
    """The weight in fragment order, whichever numbers of activation rows the layer holds it for, or None where it does not."""
    return next((layout["weight"] for _, kernel, layout in module.plan() if kernel.name == _KERNEL), None)


def tensors_of(layer: DecoderLayer) -> LayerTensors:
    """The tensors of a layer for which :func:`group_of` gave a number."""
    weights, biases = [], []
    for product in (layer.qkv, layer.out, layer.fc1, layer.fc2):
        assert isinstance(product, PackedProduct)
        module, weight = product.module, _weight(product.module)
        assert module.bias is not None
        assert weight is not None
        weights.append(weight)
        biases.append(module.bias.detach().contiguous())
    norms = (layer.attention_norm, layer.ffn_norm)
    scales, shifts = [norm.weight.contiguous() for norm in norms], [norm.bias.contiguous() for norm in norms]
    return LayerTensors(*weights, *biases, *scales, *shifts)
