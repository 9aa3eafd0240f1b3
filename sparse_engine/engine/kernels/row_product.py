"""The product of one activation row, or of its LayerNorm, with a sparse weight, one launch: csrc/cuda/decode_row_stream.cu."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_engine.backends.cuda_decode import Ahead, RowParams, Streams, kernel_params
from sparse_engine.backends.cuda_row_stream import SOURCE, StreamRow
from sparse_engine.backends.cuda_sources import UNIT, Gpu, resident_clusters
from sparse_engine.engine.kernels import launching
from sparse_engine.errors import InputError

__all__ = ["WIDEST_NORM", "RowNorm", "RowProduct", "fit_row"]

WIDEST_NORM = 8192
"""Columns up to which layernorm.cu, whose results these are, has one vector for each of its threads."""


@dataclass(frozen=True, slots=True)
class RowNorm:
    """A LayerNorm: scale and shift (columns,), and eps."""

    scale: Tensor
    shift: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class RowProduct:
    """How a weight of ``rows`` rows is multiplied by one activation row.

    Attributes:
        form: how blocks share the work.
        streams: where the units of an unstructured weight lie, which have as many columns as the form says; None of others.

    Raises:
        InputError: there is no such kernel.
    """

    rows: int
    dtype: torch.dtype
    form: StreamRow
    streams: Streams | None = None

    def __post_init__(self) -> None:
        columns, normed = self.form.columns, self.form.normed
        if columns % UNIT or (normed and columns > WIDEST_NORM):
            raise InputError(f"a row of {columns} columns: they are multiples of {UNIT}, with a LayerNorm up to {WIDEST_NORM}")
        if (self.streams is None) != (self.form.pattern != "unstructured"):
            raise InputError(f"a weight of pattern {self.form.pattern} {'without' if self.streams is None else 'with'} places of its units")
        if self.streams is not None and self.streams.parts != self.form.tile.parts:
            raise InputError(f"units of 256 / {self.streams.parts} columns for a tile of 256 / {self.form.tile.parts}")

    @property
    def depth(self) -> int:
        """Words of an unstructured weight's deepest unit."""
        return self.streams.depth if self.streams is not None else 0

    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        return self.form.shared_bytes(self.depth)

    def blocks(self, here: Gpu) -> int:
        """Clusters of the grid."""
        return resident_clusters(self.form.tile, self.rows, self.shared_bytes(), here)

    def _misfit(self, weight: Tensor) -> str | None:
        """What is wrong with a weight, and what is expected."""
        tiles, columns = -(-self.rows // 16), self.form.columns
        if self.streams is None:
            nbytes, expected = weight.numel() * weight.element_size(), tiles * (columns // UNIT) * 9 * 32 * 16
            fits = nbytes == expected and weight.is_contiguous()
            return None if fits else f"a weight of {nbytes} bytes; {expected} are expected, without gaps"
        offsets, count = self.streams.offsets, tiles * (columns * self.streams.parts // UNIT) + 1
        if weight.dtype is not self.dtype or not weight.is_contiguous():
            return f"words of {weight.dtype}; contiguous ones of {self.dtype} are expected"
        if offsets.shape != (count,) or offsets.dtype is not torch.int32 or offsets.device != weight.device or not offsets.is_contiguous():
            found = f"offsets {offsets.dtype} {tuple(offsets.shape)} on {offsets.device}"
            return f"{found}; contiguous int32 ({count},) beside the weight are expected"
        return None

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        y: Tensor,
        *,
        norm: RowNorm | None = None,
        relu: bool = False,
        residual: Tensor | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        """y (1, rows) = x (1, columns), or its LayerNorm, by the weight, plus bias, then ReLU, then + ``residual``, which may be y.

        ``ahead`` is what the next launch reads.

        Raises:
            InputError: shapes, types or devices do not fit.
            KernelUnavailableError: the kernel cannot be compiled or launched.
        """
        columns = self.form.columns
        shapes: list[tuple[str, Tensor, tuple[int, ...]]] = [("x", x, (1, columns)), ("y", y, (1, self.rows))]
        shapes += [("the bias", bias, (self.rows,))] if bias is not None else []
        shapes += [("the residual", residual, (1, self.rows))] if residual is not None else []
        if norm is not None:
            shapes += [("the LayerNorm's scale", norm.scale, (columns,)), ("its shift", norm.shift, (columns,))]
        for name, tensor, shape in shapes:
            launching.check(name, tensor, shape, self.dtype, weight.device)
        if (norm is not None) != self.form.normed:
            raise InputError(f"the product takes {'a' if self.form.normed else 'no'} LayerNorm")
        if (wrong := self._misfit(weight)) is not None:
            raise InputError(wrong)
        read = (x, weight, *((norm.scale, norm.shift) if norm is not None else ()))
        if any(tensor.data_ptr() % 16 for tensor in read):
            raise InputError("a row, its weight or its LayerNorm does not begin at a multiple of 16 bytes")
        cluster = self.form.tile.cluster
        launching.run(
            SOURCE,
            SOURCE.removesuffix(".cu"),
            self.form.macros(self.dtype),
            (self.blocks(launching.gpu(weight.device.index)), cluster),
            self.form.threads,
            RowParams(
                kernel_params(x, weight, bias, residual, y, columns // UNIT, relu, self.streams),
                norm.scale.data_ptr() if norm is not None else None,
                norm.shift.data_ptr() if norm is not None else None,
                norm.eps if norm is not None else 0.0,
                ahead or Ahead(),
            ),
            weight.device,
            cluster=cluster,
            shared_bytes=self.shared_bytes(),
        )


def fit_row(product: RowProduct, here: Gpu) -> RowProduct:
    """``product`` with as many copies of the table and as many warps as shared memory allows beside units as deep as its weight's.

    Raises:
        InputError: not even one warp is allowed.
    """
    if (fitted := product.form.fitted(product.depth, here)) is None:
        kind = f"a row of {product.form.columns} columns with units of {product.depth} words"
        raise InputError(f"{kind}: they need more than the {here.shared_limit} bytes of shared memory that the GPU has for a block")
    return replace(product, form=fitted)
