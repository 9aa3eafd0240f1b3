"""A layer's tensors as the kernels that run more than one of its products read them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["LayerTensors"]


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """Four packed products in fragment order, their biases, the scales and the shifts of two LayerNorms.

    In the order of ``Layer`` in csrc/cuda/include/step/model.cuh.
    """

    qkv: Tensor
    out: Tensor
    fc1: Tensor
    fc2: Tensor
    qkv_bias: Tensor
    out_bias: Tensor
    fc1_bias: Tensor
    fc2_bias: Tensor
    attention_scale: Tensor
    ffn_scale: Tensor
    attention_shift: Tensor
    ffn_shift: Tensor

    def pointers(self) -> list[int]:
        return [getattr(self, name).data_ptr() for name in self.__dataclass_fields__]
