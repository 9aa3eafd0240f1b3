"""Which models can run their layers as two kernels each (csrc/cuda/half_attention.cu and half_ffn.cu), and their tensors for it."""

from __future__ import annotations

import torch

from sparse_engine.engine.kernels import launching
from sparse_engine.engine.kernels.half_layers import HalfDimensions, HalfLayers
from sparse_engine.engine.packed_layers import epsilon_of, group_of, tensors_of
from sparse_engine.engine.product import PackedProduct
from sparse_engine.engine.weights import DecoderWeights

__all__ = ["half_layers"]


def half_layers(weights: DecoderWeights) -> HalfLayers | str:
    """The layers of a model on a GPU, or why it has none of this kind, as a phrase that can follow "it"."""
    dtype, device = weights.tokens.dtype, weights.tokens.device
    if dtype not in (torch.float16, torch.bfloat16):
        return f"computes in {dtype}"
    if not weights.norm_first or weights.final_norm is None or weights.project_in is not None or weights.project_out is not None:
        return "has LayerNorms behind its layers, or projections"
    if not launching.gpu(device.index).hopper:
        return "lies on a GPU below compute capability 9.0"
    group = group_of(weights) if weights.layers else None
    if group is None:
        return "has layers that are neither all 2:4 nor all 4:8, with biases and in the layout that the kernels read"
    first = weights.layers[0]
    assert isinstance(first.fc1, PackedProduct)
    dimensions = HalfDimensions(weights.hidden, first.fc1.module.out_features, weights.head_size, group)
    if reason := dimensions.objection():
        return reason
    epsilon = epsilon_of(weights)
    if epsilon is None:
        return "has LayerNorms with several epsilons"
    final = weights.final_norm
    return HalfLayers(tuple(tensors_of(layer) for layer in weights.layers), (final.weight, final.bias), epsilon, dimensions)
