"""Layers whose four products are packed N:M weights in fragment order, as the kernels that run more than one product at once read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_engine.engine.kernels import launching
from sparse_engine.engine.kernels.layer_tensors import LayerTensors
from sparse_engine.engine.product import PackedProduct, Product
from sparse_engine.engine.weights import DecoderLayer, DecoderWeights
from sparse_engine.linear import SparseLinear

__all__ = ["PackedLayers", "packed_layers"]

_KERNEL = "cuda_nm"
"""The kernel whose layout of a packed weight is in fragment order."""


@dataclass(frozen=True, slots=True)
class PackedLayers:
    """What those kernels read of a model on a GPU."""

    group: int
    """4 where all layers are 2:4, 8 where all are 4:8."""
    ffn: int
    layers: tuple[LayerTensors, ...]
    final_scale: Tensor
    final_shift: Tensor
    epsilon: float
    """Of all the LayerNorms."""


def packed_layers(weights: DecoderWeights) -> PackedLayers | str:
    """The layers of a model on a GPU, or why such kernels cannot run them, as a phrase that can follow "it"."""
    dtype, device = weights.tokens.dtype, weights.tokens.device
    if dtype not in (torch.float16, torch.bfloat16):
        return f"computes in {dtype}"
    final = weights.final_norm
    if not weights.norm_first or final is None or weights.project_in is not None or weights.project_out is not None:
        return "has LayerNorms behind its layers, or projections"
    if not launching.gpu(device.index).hopper:
        return "lies on a GPU below compute capability 9.0"
    groups = {_group(part) for layer in weights.layers for part in (layer.qkv, layer.out, layer.fc1, layer.fc2)}
    group = groups.pop() if len(groups) == 1 else None
    if group not in (4, 8):
        return "has layers that are neither all 2:4 nor all 4:8, with biases and in the layout that the kernels read"
    epsilons = {norm.eps for layer in weights.layers for norm in (layer.attention_norm, layer.ffn_norm)} | {final.eps}
    if len(epsilons) > 1:
        return "has LayerNorms with several epsilons"
    first = weights.layers[0].fc1
    assert isinstance(first, PackedProduct)
    layers = tuple(_tensors(layer) for layer in weights.layers)
    return PackedLayers(group, first.module.out_features, layers, final.weight, final.bias, epsilons.pop())


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


def _tensors(layer: DecoderLayer) -> LayerTensors:
    """The tensors of a layer all of whose products have a :func:`_group`."""
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
