"""Layers whose four products are packed weights in one layout, as the kernels read them that take LayerNorms or more than one product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_engine.backends.cuda_decode import Streams
from sparse_engine.backends.cuda_unstructured import streams_of
from sparse_engine.engine.kernels import launching
from sparse_engine.engine.kernels.layer_tensors import LayerTensors
from sparse_engine.engine.product import PackedProduct, Product
from sparse_engine.engine.weights import DecoderLayer, DecoderWeights
from sparse_engine.linear import SparseLinear
from sparse_engine.registry import Layout

__all__ = ["PackedLayers", "packed_layers"]

_KERNELS = {True: "cuda_nm", False: "cuda_unstructured"}
"""The kernels whose layouts these are: of an N:M pattern, values in fragment order; else streams of each lane's values."""


@dataclass(frozen=True, slots=True)
class PackedLayers:
    """What those kernels read of a model on a GPU."""

    group: int
    """4 where all layers are 2:4, 8 where all are 4:8, 0 where all are unstructured."""
    ffn: int
    layers: tuple[LayerTensors, ...]
    streams: tuple[dict[str, Streams], ...]
    """The further parts of each layer's unstructured weights, by their names in :class:`LayerTensors`; none of others."""
    final_scale: Tensor
    final_shift: Tensor
    epsilon: float
    """Of all the LayerNorms."""


def packed_layers(weights: DecoderWeights, *, unstructured: bool = False) -> PackedLayers | str:
    """The layers of a model on a GPU, or why such kernels cannot run them, as a phrase that can follow "it".

    ``unstructured``: they may be unstructured, too.
    """
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
    if group is None or group not in ((4, 8, 0) if unstructured else (4, 8)):
        kinds = "neither all 2:4 nor all 4:8" + " nor all unstructured" * unstructured
        return f"has layers that are {kinds}, with biases and in the layout that the kernels read"
    epsilons = {norm.eps for layer in weights.layers for norm in (layer.attention_norm, layer.ffn_norm)} | {final.eps}
    if len(epsilons) > 1:
        return "has LayerNorms with several epsilons"
    first = weights.layers[0].fc1
    assert isinstance(first, PackedProduct)
    layers = tuple(_tensors(layer) for layer in weights.layers)
    streams = tuple(_streams(layer) for layer in weights.layers) if group == 0 else ()
    return PackedLayers(group, first.module.out_features, layers, streams, final.weight, final.bias, epsilons.pop())


def _group(product: Product) -> int | None:
    """Columns of a group of an N:M product, 0 of an unstructured one, None where it has no bias or another layout."""
    if not isinstance(product, PackedProduct):
        return None
    module = product.module
    if _layout(module) is None or module.bias is None:
        return None
    return module.pattern.group[1] if module.pattern.is_nm else 0


def _layout(module: SparseLinear) -> Layout | None:
    """The weight as the kernels read it, whichever numbers of activation rows the layer holds it for, or None where it does not."""
    name = _KERNELS[module.pattern.is_nm]
    return next((layout for _, kernel, layout in module.plan() if kernel.name == name), None)


def _streams(layer: DecoderLayer) -> dict[str, Streams]:
    found = {}
    for name in ("qkv", "out", "fc1", "fc2"):
        layout = _layout(getattr(layer, name).module)
        assert layout is not None
        found[name] = streams_of(layout)
    return found


def _tensors(layer: DecoderLayer) -> LayerTensors:
    """The tensors of a layer all of whose products have a :func:`_group`."""
    weights, biases = [], []
    for product in (layer.qkv, layer.out, layer.fc1, layer.fc2):
        assert isinstance(product, PackedProduct)
        module, layout = product.module, _layout(product.module)
        assert module.bias is not None
        assert layout is not None
        weights.append(layout["weight"])
        biases.append(module.bias.detach().contiguous())
    norms = (layer.attention_norm, layer.ffn_norm)
    scales, shifts = [norm.weight.contiguous() for norm in norms], [norm.bias.contiguous() for norm in norms]
    return LayerTensors(*weights, *biases, *scales, *shifts)
