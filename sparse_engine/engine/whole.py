"""Which models a step in one kernel (csrc/cuda/decode_model.cu) can run, and their tensors as it reads them."""

from __future__ import annotations

import torch

from sparse_engine.engine.kernels import launching
from sparse_engine.engine.kernels.decode_model import Dimensions, ModelTensors, WholeStep
from sparse_engine.engine.packed_layers import epsilon_of, group_of, tensors_of
from sparse_engine.engine.product import DenseProduct, Int8Product, PackedProduct
from sparse_engine.engine.weights import DecoderWeights

__all__ = ["whole_step"]


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
    group = group_of(weights)
    if group is None:
        return "has layers that are neither all 2:4 nor all 4:8, with biases and in the layout that the step reads"
    first = weights.layers[0]
    assert isinstance(first.fc1, PackedProduct)
    dimensions = Dimensions(
        weights.hidden, first.fc1.module.out_features, weights.head_size, len(weights.layers), weights.vocabulary, group
    )
    if reason := dimensions.objection(here.processors, here.shared_limit):
        return reason
    epsilon = epsilon_of(weights)
    if epsilon is None:
        return "has LayerNorms with several epsilons"
    layers = tuple(tensors_of(layer) for layer in weights.layers)
    final = weights.final_norm
    if isinstance(weights.head, Int8Product):
        head, scales = weights.head.values, weights.head.scales
    else:
        head, scales = weights.head.weight, None
    return WholeStep(ModelTensors(weights.tokens, weights.positions, layers, final.weight, final.bias, head, scales, epsilon), dimensions)
