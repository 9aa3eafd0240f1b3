"""The product of one activation row, or of its LayerNorm, with an unstructured weight: csrc/cuda/decode_row_unstructured.cu."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_engine.backends.cuda_decode import Streams
from sparse_engine.backends.cuda_sources import UNIT, Gpu, stream_bytes, whole_lines
from sparse_engine.engine.kernels.row_product import RowProduct, _Params
from sparse_engine.errors import InputError

__all__ = ["StreamRowProduct", "fit_row"]

_RING = 4
"""``RING`` of the source."""


@dataclass(frozen=True, slots=True)
class StreamRowProduct(RowProduct):
    """The product with an unstructured weight.

    Attributes:
        streams: where its units lie; they are of as many columns as ``tile.parts`` says.
        row_warps: of a block, beside those that multiply.
    """

    streams: Streams
    row_warps: int = 4

    def __post_init__(self) -> None:
        RowProduct.__post_init__(self)
        if self.streams.parts != self.tile.parts:
            raise InputError(f"units of 256 / {self.streams.parts} columns for a tile of 256 / {self.tile.parts}")

    @property
    def file(self) -> str:
        return "decode_row_unstructured.cu"

    def macros(self) -> dict[str, int]:
        own = {
            "COLS": self.columns,
            "NORMED": int(self.normed),
            "ROW_WARPS": self.row_warps,
            "CLUSTER": self.tile.cluster,
            "ELEM_BF16": int(self.dtype is torch.bfloat16),
        }
        return {**self.tile.macros(), **own}

    def shared_bytes(self) -> int:
        """The row, with a LayerNorm its shifts and moments; sums of tiles and their barriers; the table and the slots."""
        shares = min(self.tile.cluster * self.tile.warps_k, self.columns * self.tile.parts // UNIT)
        sums = _RING * shares * (self.tile.block_rows + 4) * 4
        return whole_lines(2 * self.columns + self._norm_bytes() + sums + 16 * _RING) + stream_bytes(self.tile, self.streams.depth)

    def _misfit(self, weight: Tensor) -> str | None:
        offsets, count = self.streams.offsets, -(-self.rows // 16) * (self.columns * self.tile.parts // UNIT) + 1
        if weight.dtype is not self.dtype or not weight.is_contiguous():
            return f"words of {weight.dtype}; contiguous ones of {self.dtype} are expected"
        if offsets.shape != (count,) or offsets.dtype is not torch.int32 or offsets.device != weight.device or not offsets.is_contiguous():
            found = f"offsets {offsets.dtype} {tuple(offsets.shape)} on {offsets.device}"
            return f"{found}; contiguous int32 ({count},) beside the weight are expected"
        return None

    @property
    def threads(self) -> int:
        return 32 * (self.tile.warps_k + self.row_warps)

    def _argument(self, params: _Params) -> ctypes.Structure:
        params.product.offsets = self.streams.offsets.data_ptr()
        params.product.depth = self.streams.depth
        return params


def fit_row(product: StreamRowProduct, here: Gpu) -> StreamRowProduct:
    """``product`` with as many copies of the table and as many warps as shared memory allows beside units as deep as its weight's.

    Raises:
        InputError: not even one warp is allowed.
    """
    while (needed := product.shared_bytes()) > here.shared_limit:
        tile = product.tile
        if tile.table_copies > 4:
            tile = replace(tile, table_copies=tile.table_copies // 2)
        elif tile.warps_k > 1:
            tile = replace(tile, warps_k=tile.warps_k - 1)
        else:
            kind = f"a row of {product.columns} columns with units of {product.streams.depth} words"
            raise InputError(f"{kind}: {needed} bytes of shared memory, and the GPU has {here.shared_limit}")
        product = replace(product, tile=tile)
    return product
