"""Which models a step in one kernel (csrc/cuda/decode_model.cu) can run, and their tensors as it reads them."""

from __future__ import annotations

from sparse_engine.engine.kernels import launching
from sparse_engine.engine.kernels.decode_model import Dimensions, ModelTensors, WholeStep
from sparse_engine.engine.packed_layers import packed_layers
from sparse_engine.engine.product import DenseProduct, Int8Product
from sparse_engine.engine.weights import DecoderWeights

__all__ = ["whole_step"]


def whole_step(weights: DecoderWeights) -> WholeStep | str:
    """The step of a model on a GPU, or why it has none, as a phrase that can follow "it"."""
    packed = packed_layers(weights)
    if isinstance(packed, str):
        return packed
    if not isinstance(weights.head, DenseProduct | Int8Product):
        return "has no plain output head"
    here = launching.gpu(weights.tokens.device.index)
    dimensions = Dimensions(weights.hidden, packed.ffn, weights.head_size, len(packed.layers), weights.vocabulary, packed.group)
    if reason := dimensions.objection(here.processors, here.shared_limit):
        return reason
    if isinstance(weights.head, Int8Product):
        head, scales = weights.head.values, weights.head.scales
    else:
        head, scales = weights.head.weight, None
    final = packed.final_scale, packed.final_shift
    return WholeStep(ModelTensors(weights.tokens, weights.positions, packed.layers, *final, head, scales, packed.epsilon), dimensions)
