"""The layers of a decode step of one row, product by product, with LayerNorms inside the products that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_engine.backends.cuda_decode import Streams
from sparse_engine.backends.cuda_row_stream import SMALL_UP_TO, usual_row
from sparse_engine.backends.cuda_sources import UNIT, Gpu, Tile
from sparse_engine.engine.kernels import launching
from sparse_engine.engine.kernels.ahead import Ahead, ahead_of
from sparse_engine.engine.kernels.attention import attention_decode
from sparse_engine.engine.kernels.layer_tensors import LayerTensors
from sparse_engine.engine.kernels.layernorm import layer_norm
from sparse_engine.engine.kernels.row_product import NmRowProduct, RowNorm, RowProduct
from sparse_engine.engine.kernels.row_stream import StreamRowProduct, fit_row

__all__ = ["RowLayers", "Widths", "nm_products", "stream_products"]

_BY_UNIT_FROM = 4096
"""Width from which products without a LayerNorm, whose rows are long then, take them unit by unit.

On an H200 whole rows made a step of 1.3B faster by 4 %, and none of 13B.
"""
_AHEAD_FROM = 5120
"""Width from which attention and the network's first product ask for what the next product reads.

On an H200 a step of 13B was faster by 1 %; one of 1.3B was slower, whatever was asked for and wherever, by 1 to 15 %. Of unstructured
weights only the small ones ask, those of 125M: faster by 1 %; 1.3B was slower by 6 %, 6.7B by 2 %, 13B by 1 %.
"""
_OUT_AHEAD, _FC2_AHEAD = 3_000_000, 10_000_000
"""Bytes. A step of 13B was not faster with more, nor with what other products read."""


@dataclass(frozen=True, slots=True)
class Widths:
    """Of a model: the state, the ReLU network's middle, a head; columns of a group of the pattern, 4 of 2:4, 8 of 4:8, 0 of none."""

    hidden: int
    ffn: int
    head_size: int
    group: int


def nm_products(widths: Widths, dtype: torch.dtype, here: Gpu) -> dict[str, RowProduct]:
    """The four products of a layer of N:M weights, with the tiles that were best in steps of 1.3B and 13B on an H200, and between by rules.

    Raises:
        InputError: the kernel has no form for the widths.
    """
    hidden, ffn, group = widths.hidden, widths.ffn, widths.group
    # Weights of 4:8 are expanded in registers, of which more blocks would have too few.
    fewer = int(group == 8)
    usual = Tile(1, 1, 1, 8, min_blocks=3 - fewer)
    # A warp for each of ten units, where eight would leave six of them idle half the time: 2.5 % of a step of 2.7B.
    qkv = Tile(1, 1, 1, 10, min_blocks=2) if hidden == 10 * UNIT else usual
    # Pairs of warps share units where all row tiles are resident at once. Else so many blocks are that most have a last tile to do when
    # the others do theirs, of as many warps as have equal shares of the columns.
    crowded = -(-ffn // 16) > 4 * here.processors
    fc1 = Tile(1, 1, 1, 8 if hidden // UNIT % 10 else 10, min_blocks=2) if crowded else Tile(1, 1, 1, 8, 2, min_blocks=4 - fewer)
    fc2 = usual if -(-hidden // 16) > here.processors else Tile(1, 1, 1, 16, min_blocks=1)
    by_unit = hidden >= _BY_UNIT_FROM
    return {
        "qkv": NmRowProduct(3 * hidden, hidden, dtype, qkv, True, group),
        "out": NmRowProduct(hidden, hidden, dtype, usual, False, group, by_unit),
        "fc1": NmRowProduct(ffn, hidden, dtype, fc1, True, group),
        "fc2": NmRowProduct(hidden, ffn, dtype, fc2, False, group, by_unit),
    }


def stream_products(widths: Widths, streams: Mapping[str, Streams], dtype: torch.dtype, here: Gpu) -> dict[str, RowProduct]:
    """The four products of a layer of unstructured weights, with the tiles that were best in steps of 125M, 1.3B, 6.7B and 13B on an H200.

    Raises:
        InputError: the kernel has no form for the widths, or no room for the units.
    """
    hidden, ffn = widths.hidden, widths.ffn
    shapes = {"qkv": (3 * hidden, hidden), "out": (hidden, hidden), "fc1": (ffn, hidden), "fc2": (hidden, ffn)}
    found: dict[str, RowProduct] = {}
    for name, (rows, columns) in shapes.items():
        own = streams[name]
        form = usual_row(rows, columns, here)
        found[name] = fit_row(StreamRowProduct(rows, columns, dtype, form.tile, name in ("qkv", "fc1"), own, form.row_warps), here)
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
            self.products = (nm_products(widths, self.dtype, here),) * len(layers)
        else:
            self.products = tuple(stream_products(widths, each, self.dtype, here) for each in streams)
        self._asks = widths.hidden >= _AHEAD_FROM if widths.group else widths.hidden <= SMALL_UP_TO
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
