"""The layers of a decode step of one row, product by product, with LayerNorms inside the products that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_engine.backends.cuda_decode import Streams
from sparse_engine.backends.cuda_row_forms import SMALL_UP_TO, usual_row
from sparse_engine.backends.cuda_sources import Gpu
from sparse_engine.engine.kernels import launching
from sparse_engine.engine.kernels.ahead import Ahead, ahead_of
from sparse_engine.engine.kernels.attention import attention_decode
from sparse_engine.engine.kernels.layer_tensors import LayerTensors
from sparse_engine.engine.kernels.layernorm import layer_norm
from sparse_engine.engine.kernels.row_product import RowNorm, RowProduct, fit_row

__all__ = ["RowLayers", "Widths", "row_products"]

_PATTERN = {4: "2:4", 8: "4:8", 0: "unstructured"}
_OUT_AHEAD, _FC2_AHEAD = 3_000_000, 10_000_000
"""Bytes that attention and the network's first product of small models ask for of what the next product reads.

On an H200 steps of 125M were faster by 1 to 2 % so. Those of 1.3B were slower by 6 %, of 6.7B by 1 to 2 % and of 13B by up to 1 %.
"""


@dataclass(frozen=True, slots=True)
class Widths:
    """Of a model: the state, the ReLU network's middle, a head; columns of a group of the pattern, 4 of 2:4, 8 of 4:8, 0 of none."""

    hidden: int
    ffn: int
    head_size: int
    group: int


def row_products(widths: Widths, streams: Mapping[str, Streams], dtype: torch.dtype, here: Gpu) -> dict[str, RowProduct]:
    """The four products of a layer, of which q, k, v and the network's first take the LayerNorm of their row themselves.

    Args:
        streams: of unstructured weights.

    Raises:
        InputError: the kernel has no form for the widths, or no room for the units.
    """
    hidden, ffn, pattern = widths.hidden, widths.ffn, _PATTERN[widths.group]
    shapes = {"qkv": (3 * hidden, hidden), "out": (hidden, hidden), "fc1": (ffn, hidden), "fc2": (hidden, ffn)}
    found: dict[str, RowProduct] = {}
    for name, (rows, columns) in shapes.items():
        form = replace(usual_row(pattern, rows, columns, here), normed=name in ("qkv", "fc1"))
        found[name] = fit_row(RowProduct(rows, dtype, form, streams.get(name)), here)
    return found


class RowLayers:
    """The layers of one model on one device, with the LayerNorm behind them. Steps of a model must follow each other on one stream.

    Args:
        streams: of each layer's unstructured weights; none of others.
        final: scale and shift of the last LayerNorm.

    Raises:
        InputError: the kernel has no form for the widths.
    """

    def __init__(
        self,
        layers: tuple[LayerTensors, ...],
        streams: tuple[dict[str, Streams], ...],
        final: tuple[Tensor, Tensor],
        eps: float,
        widths: Widths,
    ) -> None:
        self.layers, self.final, self.eps, self.widths = layers, final, eps, widths
        self.dtype, self.device = final[0].dtype, final[0].device
        here = launching.gpu(self.device.index)
        if widths.group:
            self.products = (row_products(widths, {}, self.dtype, here),) * len(layers)
        else:
            self.products = tuple(row_products(widths, each, self.dtype, here) for each in streams)
        self._asks = widths.hidden <= SMALL_UP_TO
        # What one kernel leaves for another: the state is the same memory for all layers.
        sizes = {"state": widths.hidden, "qkv": 3 * widths.hidden, "attended": widths.hidden, "middle": widths.ffn}
        self._rows = {name: torch.empty(1, size, dtype=self.dtype, device=self.device) for name, size in sizes.items()}

    def __call__(self, h: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
        """The last LayerNorm's output (1, H) for the embedding ``h`` (1, H) of the token behind ``lengths`` (1,) others.

        Its keys and values are appended to the caches (layers, 1, heads, S, D).

        Raises:
            InputError: shapes, types or devices do not fit.
            KernelUnavailableError: a kernel cannot be compiled or launched.
        """
        rows, asks = self._rows, self._asks
        launching.check("lengths", lengths, (1,), torch.int32, self.device)
        scale = self.widths.head_size**-0.5
        state = h
        for layer, run, keys, values in zip(self.layers, self.products, k_cache, v_cache, strict=True):
            norm = RowNorm(layer.attention_scale, layer.attention_shift, self.eps)
            run["qkv"](state, layer.qkv, layer.qkv_bias, rows["qkv"], norm=norm)
            asked = ahead_of(layer.out, _OUT_AHEAD) if asks else Ahead()
            attention_decode(rows["qkv"], keys, values, lengths, rows["attended"], scale, ahead=asked)
            run["out"](rows["attended"], layer.out, layer.out_bias, rows["state"], residual=state)
            state = rows["state"]
            norm = RowNorm(layer.ffn_scale, layer.ffn_shift, self.eps)
            asked = ahead_of(layer.fc2, _FC2_AHEAD) if asks else Ahead()
            run["fc1"](state, layer.fc1, layer.fc1_bias, rows["middle"], norm=norm, relu=True, ahead=asked)
            run["fc2"](rows["middle"], layer.fc2, layer.fc2_bias, state, residual=state)
        out = torch.empty_like(h)
        layer_norm(state, *self.final, self.eps, out)
        return out
