"""Which models can run the layers of a single row product by product with their LayerNorms inside, and their tensors for it."""

from __future__ import annotations

from sparse_engine.engine.kernels.row_layers import RowLayers, Widths
from sparse_engine.engine.packed_layers import packed_layers
from sparse_engine.engine.weights import DecoderWeights
from sparse_engine.errors import InputError

__all__ = ["row_layers"]


def row_layers(weights: DecoderWeights) -> RowLayers | str:
    """The layers of a model on a GPU, or why it has none of this kind, as a phrase that can follow "it"."""
    packed = packed_layers(weights, unstructured=True)
    if isinstance(packed, str):
        return packed
    widths = Widths(weights.hidden, packed.ffn, weights.head_size, packed.group)
    try:
        return RowLayers(packed.layers, packed.streams, (packed.final_scale, packed.final_shift), packed.epsilon, widths)
    except InputError as error:
        return f"has {error}"
