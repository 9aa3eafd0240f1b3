"""What a decode step does beside its products: embedding, LayerNorm, attention, the choice of the next token.

Every function writes into tensors that the caller gives, on the current stream and without waiting for the device, so that a
CUDA graph can hold it; lengths and positions are read from device memory, so that one graph serves every step. On CUDA tensors a
kernel of csrc/cuda runs, elsewhere the reference beside it.
"""

from sparse_engine.engine.kernels.attention import attention_decode
from sparse_engine.engine.kernels.embed import Embedding, Norm, embed
from sparse_engine.engine.kernels.layernorm import layer_norm
from sparse_engine.engine.kernels.sample import DecodeState, advance, greedy, penalise, sample

__all__ = [
    "DecodeState",
    "Embedding",
    "Norm",
    "advance",
    "attention_decode",
    "embed",
    "greedy",
    "layer_norm",
    "penalise",
    "sample",
]
