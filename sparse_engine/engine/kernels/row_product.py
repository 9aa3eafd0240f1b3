"""The product of one activation row, or of its LayerNorm, with a 2:4 or 4:8 weight in fragment order (csrc/cuda/decode_row.cu)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_engine.backends.cuda_decode import Params, kernel_params
from sparse_engine.backends.cuda_sources import UNIT, Gpu, Tile, blocks_at_once
from sparse_engine.backends.cuda_tiles import choose
from sparse_engine.engine.kernels import launching
from sparse_engine.engine.kernels.ahead import Ahead
from sparse_engine.errors import InputError

__all__ = ["WIDEST_NORM", "RowNorm", "RowProduct"]

WIDEST_NORM = 8192
"""Columns up to which layernorm.cu, whose results these are, has one vector for each of its threads."""
_KERNEL = "cuda_nm"
_PATTERNS = {4: ("2:4", 24), 8: ("4:8", 48)}
_ZERO_BYTES = 128
_OWN_AHEAD = 2


@dataclass(frozen=True, slots=True)
class RowNorm:
    """A LayerNorm: scale and shift (columns,), and eps."""

    scale: Tensor
    shift: Tensor
    eps: float


class _Params(ctypes.Structure):
    """``RowParams`` of csrc/cuda/decode_row.cu."""

    _fields_ = (
        ("product", Params),
        ("scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("own", ctypes.c_int),
        ("ahead", Ahead),
    )


@dataclass(frozen=True, slots=True)
class RowProduct:
    """How a weight (``rows``, ``columns``) is multiplied: ``group`` 4 of a 2:4 pattern or 8 of 4:8, ``normed`` what a LayerNorm gives."""

    rows: int
    columns: int
    group: int
    dtype: torch.dtype
    normed: bool
    tile: Tile

    @classmethod
    def of(cls, rows: int, columns: int, group: int, dtype: torch.dtype, normed: bool, here: Gpu) -> RowProduct:
        """With the tile that decode_nm.cu has for one activation row, where that is one row tile for each block, else with a usual one.

        Raises:
            InputError: the kernel has no form for the columns.
        """
        if columns % UNIT or (normed and columns > WIDEST_NORM):
            raise InputError(f"a row of {columns} columns: they are multiples of {UNIT}, with a LayerNorm up to {WIDEST_NORM}")
        source, tile = choose(_KERNEL, _PATTERNS[group][0], dtype, rows, columns, 1, here)
        if source.file != "decode_nm.cu" or (tile.n_tiles, tile.row_tiles, tile.warps_row, tile.splits) != (1, 1, 1, 1):
            tile = Tile(1, 1, 1, min(8, columns // UNIT), min_blocks=3)
        return cls(rows, columns, group, dtype, normed, tile)

    def macros(self) -> dict[str, int]:
        """What the source is compiled with."""
        return {
            **self.tile.macros(),
            "PATTERN": _PATTERNS[self.group][1],
            "ELEM_BF16": int(self.dtype is torch.bfloat16),
            "COLS": self.columns,
            "NORMED": int(self.normed),
        }

    def shared_bytes(self) -> int:
        """Shared memory of a block: zeros, the row, with a LayerNorm its shifts and moments; sums of two tiles; what is added to them."""
        norm = 2 * self.columns + -(-8 * (self.columns // UNIT) // 16) * 16 if self.normed else 0
        return _ZERO_BYTES + 2 * self.columns + norm + 8 * self.tile.warps_k * (self.tile.block_rows + 4) + 4 * self.tile.block_rows

    def blocks(self, here: Gpu) -> int:
        """Those that are resident at once, each with several tiles where there are more: a block normalises the row once."""
        return min(-(-self.rows // self.tile.block_rows), here.processors * blocks_at_once(self.tile, self.shared_bytes(), here))

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
        shapes: list[tuple[str, Tensor, tuple[int, ...]]] = [("x", x, (1, self.columns)), ("y", y, (1, self.rows))]
        shapes += [("the bias", bias, (self.rows,))] if bias is not None else []
        shapes += [("the residual", residual, (1, self.rows))] if residual is not None else []
        if norm is not None:
            shapes += [("the LayerNorm's scale", norm.scale, (self.columns,)), ("its shift", norm.shift, (self.columns,))]
        for name, tensor, shape in shapes:
            launching.check(name, tensor, shape, self.dtype, weight.device)
        extent = -(-self.rows // 16) * (self.columns // UNIT) * 9 * 32 * 16
        nbytes = weight.numel() * weight.element_size()
        if (norm is not None) != self.normed or nbytes != extent or not weight.is_contiguous():
            kind = "a LayerNorm" if self.normed else "no LayerNorm"
            raise InputError(f"a weight of {nbytes} bytes; {extent} are expected, and {kind}")
        read = (x, weight, *((norm.scale, norm.shift) if norm is not None else ()))
        if any(tensor.data_ptr() % 16 for tensor in read):
            raise InputError("a row, its weight or its LayerNorm does not begin at a multiple of 16 bytes")
        params = _Params(
            kernel_params(x, weight, bias, residual, y, self.columns // UNIT, relu),
            norm.scale.data_ptr() if norm is not None else None,
            norm.shift.data_ptr() if norm is not None else None,
            norm.eps if norm is not None else 0.0,
            _OWN_AHEAD,
            ahead or Ahead(),
        )
        launching.run(
            "decode_row.cu",
            "decode_row",
            self.macros(),
            (self.blocks(launching.gpu(weight.device.index)), 1),
            32 * self.tile.warps_k,
            params,
            weight.device,
            shared_bytes=self.shared_bytes(),
        )
