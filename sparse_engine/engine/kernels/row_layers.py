"""The layers of a decode step of one row, product by product (csrc/cuda/decode_row.cu), with LayerNorms inside the products that follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_engine.engine.kernels import launching
from sparse_engine.engine.kernels.ahead import Ahead, ahead_of_cache, ahead_of_weight
from sparse_engine.engine.kernels.attention import attention_decode
from sparse_engine.engine.kernels.layer_tensors import LayerTensors
from sparse_engine.engine.kernels.layernorm import layer_norm
from sparse_engine.engine.kernels.row_product import RowNorm, RowProduct

__all__ = ["RowLayers", "Widths"]

_AHEAD = {"attention": 6 << 20, "out": 10 << 20, "fc1": 10 << 20, "fc2": 10 << 20}
"""By kernel, bytes of the next one's weight that it asks for."""


@dataclass(frozen=True, slots=True)
class Widths:
    """Of a model: the state, the ReLU network's middle, a head; columns of a group of the pattern, 4 of 2:4 or 8 of 4:8."""

    hidden: int
    ffn: int
    head_size: int
    group: int

    @property
    def heads(self) -> int:
        return self.hidden // self.head_size


class RowLayers:
    """The layers of one model on one device, with the LayerNorm behind them. Steps of a model must follow each other on one stream.

    Args:
        final: scale and shift of the last LayerNorm.
        head: what the kernel behind the last LayerNorm reads, or None.

    Raises:
        InputError: the kernel has no form for the widths.
    """

    def __init__(
        self, layers: tuple[LayerTensors, ...], final: tuple[Tensor, Tensor], eps: float, widths: Widths, head: Tensor | None
    ) -> None:
        self.layers, self.final, self.eps, self.widths, self.head = layers, final, eps, widths, head
        self.dtype, self.device = final[0].dtype, final[0].device
        here, w = launching.gpu(self.device.index), widths
        shapes = {"qkv": (3 * w.hidden, w.hidden), "out": (w.hidden, w.hidden), "fc1": (w.ffn, w.hidden), "fc2": (w.hidden, w.ffn)}
        self.products = {name: RowProduct.of(*shape, w.group, self.dtype, name in ("qkv", "fc1"), here) for name, shape in shapes.items()}
        # What one kernel leaves for another: the state is the same memory for all layers.
        sizes = {"state": w.hidden, "qkv": 3 * w.hidden, "attended": w.hidden, "middle": w.ffn}
        self._rows = {name: torch.empty(1, size, dtype=self.dtype, device=self.device) for name, size in sizes.items()}

    def __call__(self, h: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
        """The last LayerNorm's output (1, H) for the embedding ``h`` (1, H) of the token behind ``lengths`` (1,) others.

        Its keys and values are appended to the caches (layers, 1, heads, S, D).

        Raises:
            InputError: shapes, types or devices do not fit.
            KernelUnavailableError: a kernel cannot be compiled or launched.
        """
        w, run, rows = self.widths, self.products, self._rows
        launching.check("lengths", lengths, (1,), torch.int32, self.device)
        scale = w.head_size**-0.5
        behind = [layer.qkv for layer in self.layers[1:]] + [self.head]
        state = h
        for layer, keys, values, following in zip(self.layers, k_cache, v_cache, behind, strict=True):
            norm = RowNorm(layer.attention_scale, layer.attention_shift, self.eps)
            cached = ahead_of_cache(keys, values, lengths, early=True)
            run["qkv"](state, layer.qkv, layer.qkv_bias, rows["qkv"], norm=norm, ahead=cached)
            asked = ahead_of_weight(layer.out, _AHEAD["attention"], early=True)
            attention_decode(rows["qkv"], keys, values, lengths, rows["attended"], scale, ahead=asked)
            asked = ahead_of_weight(layer.fc1, _AHEAD["out"], early=True)
            run["out"](rows["attended"], layer.out, layer.out_bias, rows["state"], residual=state, ahead=asked)
            state = rows["state"]
            norm = RowNorm(layer.ffn_scale, layer.ffn_shift, self.eps)
            asked = ahead_of_weight(layer.fc2, _AHEAD["fc1"], early=False)
            run["fc1"](state, layer.fc1, layer.fc1_bias, rows["middle"], norm=norm, relu=True, ahead=asked)
            asked = ahead_of_weight(following, _AHEAD["fc2"], early=False) if following is not None else Ahead()
            run["fc2"](rows["middle"], layer.fc2, layer.fc2_bias, state, residual=state, ahead=asked)
        out = torch.empty_like(h)
        layer_norm(state, *self.final, self.eps, out)
        return out
