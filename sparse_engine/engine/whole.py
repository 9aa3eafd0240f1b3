"""Which models a step in one kernel (csrc/cuda/decode_model.cu) can run, and their tensors as it reads them."""

from __future__ import annotations

import torch

from sparse_engine.engine.kernels import launching
from sparse_engine.engine.kernels.decode_model import Dimensions, LayerTensors, ModelTensors, WholeStep
from sparse_engine.engine.product import DenseProduct, Int8Product, PackedProduct, Product
from sparse_engine.engine.weights import DecoderLayer, DecoderWeights

__all__ = ["whole_step"]

_KERNEL = "cuda_nm"
"""The kernel whose layout of a packed weight the step reads."""


def whole_step(weights: DecoderWeights) -> WholeStep | str:
    """The step of a model on a GPU, or why it has none, as a phrase that can follow "it"."""
    dtype, device = weights.tokens.dtype, weights.tokens.device
    if dtype not in (torch.float16, torch.bfloat16):
        return f"computes in {dtype}"
    if not weights.norm_first or weights.final_norm is None or weights.project_in is not None or weights.project_out is not None:
        return "has LayerNorms behind its layers, or projections"
    if not isinstance(weights.head, DenseProduct | Int8Product) or not weights.layers:
        return "has no plain output head, or no layers"
    here = launching.gpu(device.index)
    if not here.hopper:
        return "lies on a GPU below compute capability 9.0"
    groups = {_group(part) for layer in weights.layers for part in (layer.qkv, layer.out, layer.fc1, layer.fc2)}
    group = groups.pop() if len(groups) == 1 else None
    if group not in (4, 8):
        return "has layers that are neither all 2:4 nor all 4:8, with biases and in the layout that the step reads"
    first = weights.layers[0]
    assert isinstance(first.fc1, PackedProduct)
    dimensions = Dimensions(
        weights.hidden, first.fc1.module.out_features, weights.head_size, len(weights.layers), weights.vocabulary, group
    )
    if reason := dimensions.objection(here.processors, here.shared_limit):
        return reason
    epsilons = {norm.eps for layer in weights.layers for norm in (layer.attention_norm, layer.ffn_norm)} | {weights.final_norm.eps}
    if len(epsilons) > 1:
        return "has LayerNorms with several epsilons"
    layers = tuple(_tensors(layer) for layer in weights.layers)
    final = weights.final_norm
    if isinstance(weights.head, Int8Product):
        head, scales = weights.head.values, weights.head.scales
    else:
        head, scales = weights.head.weight, None
    return WholeStep(
        ModelTensors(weights.tokens, weights.positions, layers, final.weight, final.bias, head, scales, epsilons.pop()), dimensions
    )


def _group(product: Product) -> int | None:
    """Columns of a group of an N:M product in the step's layout, or None where it has another one."""
    if not isinstance(product, PackedProduct):
        return None
    module = product.module
    _, kernel, _ = module.plan()[0]
    if kernel.name != _KERNEL or module.bias is None or not module.pattern.is_nm:
        return None
    return module.pattern.group[1]


def _tensors(layer: DecoderLayer) -> LayerTensors:
    weights, biases = [], []
    for product in (layer.qkv, layer.out, layer.fc1, layer.fc2):
        assert isinstance(product, PackedProduct)
        module = product.module
        assert module.bias is not None
        weights.append(module.plan()[0][2]["weight"])
        biases.append(module.bias.detach().contiguous())
    norms = (layer.attention_norm, layer.ffn_norm)
    scales, shifts = [norm.weight.contiguous() for norm in norms], [norm.bias.contiguous() for norm in norms]
    return LayerTensors(*weights, *biases, *scales, *shifts)
