"""Which models can run their layers as two kernels each (csrc/cuda/half_attention.cu and half_ffn.cu), and their tensors for it."""

from __future__ import annotations

from sparse_engine.engine.kernels.half_layers import HalfDimensions, HalfLayers
from sparse_engine.engine.packed_layers import packed_layers
from sparse_engine.engine.weights import DecoderWeights

__all__ = ["half_layers"]


def half_layers(weights: DecoderWeights) -> HalfLayers | str:
    """The layers of a model on a GPU, or why it has none of this kind, as a phrase that can follow "it"."""
    packed = packed_layers(weights)
    if isinstance(packed, str):
        return packed
    dimensions = HalfDimensions(weights.hidden, packed.ffn, weights.head_size, packed.group)
    if reason := dimensions.objection():
        return reason
    return HalfLayers(packed.layers, (packed.final_scale, packed.final_shift), packed.epsilon, dimensions)
