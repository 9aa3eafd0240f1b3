"""The product of one activation row, or of its LayerNorm, with an unstructured weight: csrc/cuda/decode_row_unstructured.cu."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_engine.backends.cuda_decode import Streams
from sparse_engine.backends.cuda_row_stream import SOURCE, StreamRow
from sparse_engine.backends.cuda_sources import UNIT, Gpu
from sparse_engine.engine.kernels.row_product import RowProduct
from sparse_engine.errors import InputError

__all__ = ["StreamRowProduct", "fit_row"]


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
        return SOURCE

    @property
    def form(self) -> StreamRow:
        return StreamRow(self.columns, self.tile, self.row_warps, self.normed)

    def macros(self) -> dict[str, int]:
        return self.form.macros(self.dtype)

    def shared_bytes(self) -> int:
        return self.form.shared_bytes(self.streams.depth)

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
        return self.form.threads

    @property
    def _streams(self) -> Streams:
        return self.streams


def fit_row(product: StreamRowProduct, here: Gpu) -> StreamRowProduct:
    """``product`` with as many copies of the table and as many warps as shared memory allows beside units as deep as its weight's.

    Raises:
        InputError: not even one warp is allowed.
    """
    if (fitted := product.form.fitted(product.streams.depth, here)) is None:
        kind = f"a row of {product.columns} columns with units of {product.streams.depth} words"
        raise InputError(f"{kind}: they need more than the {here.shared_limit} bytes of shared memory that the GPU has for a block")
    return replace(product, tile=fitted.tile)
