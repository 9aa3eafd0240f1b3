"""The product of one activation row, or of its LayerNorm, with a packed weight, one launch.

Each layout of weights has a kernel of its own: a subclass here for 2:4 and 4:8 in fragment order (csrc/cuda/decode_row.cu has the whole row
in shared memory before its blocks go from row tile to row tile; csrc/cuda/decode_nm.cu brings it unit by unit, for rows so long that the
products must not wait for all of it), another in :mod:`sparse_engine.engine.kernels.row_stream`.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_engine.backends.cuda_decode import Ahead, RowParams, Streams, kernel_params
from sparse_engine.backends.cuda_sources import UNIT, Gpu, Tile, macros_of, resident_clusters, row_input_bytes
from sparse_engine.backends.cuda_tiles import MMA_24, MMA_48
from sparse_engine.engine.kernels import launching
from sparse_engine.errors import InputError

__all__ = ["WIDEST_NORM", "NmRowProduct", "RowNorm", "RowProduct"]

WIDEST_NORM = 8192
"""Columns up to which layernorm.cu, whose results these are, has one vector for each of its threads."""
_SOURCES = {4: MMA_24, 8: MMA_48}
_ZERO_BYTES = 128


@dataclass(frozen=True, slots=True)
class RowNorm:
    """A LayerNorm: scale and shift (columns,), and eps."""

    scale: Tensor
    shift: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class RowProduct(ABC):
    """How a weight (``rows``, ``columns``) is multiplied by one row.

    Attributes:
        tile: of one n-tile, row tile and warp along the rows, without splits; its clusters share a row tile.
        normed: by the row's LayerNorm.

    Raises:
        InputError: there is no such kernel.
    """

    rows: int
    columns: int
    dtype: torch.dtype
    tile: Tile
    normed: bool

    def __post_init__(self) -> None:
        if self.columns % UNIT or (self.normed and self.columns > WIDEST_NORM):
            raise InputError(f"a row of {self.columns} columns: they are multiples of {UNIT}, with a LayerNorm up to {WIDEST_NORM}")

    @property
    @abstractmethod
    def file(self) -> str:
        """The source, whose function has its name."""

    @abstractmethod
    def macros(self) -> dict[str, int]:
        """What the source is compiled with."""

    @abstractmethod
    def shared_bytes(self) -> int:
        """Shared memory of a block."""

    @abstractmethod
    def _misfit(self, weight: Tensor) -> str | None:
        """What is wrong with a weight, and what is expected."""

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.tile.warps_k

    def blocks(self, here: Gpu) -> int:
        """Clusters of the grid."""
        return resident_clusters(self.tile, self.rows, self.shared_bytes(), here)

    @property
    def _streams(self) -> Streams | None:
        """The further parts of an unstructured weight."""
        return None

    def _argument(self, params: RowParams) -> ctypes.Structure:
        """The kernel's."""
        return params

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
        if (norm is not None) != self.normed:
            raise InputError(f"the product takes {'a' if self.normed else 'no'} LayerNorm")
        if (wrong := self._misfit(weight)) is not None:
            raise InputError(wrong)
        read = (x, weight, *((norm.scale, norm.shift) if norm is not None else ()))
        if any(tensor.data_ptr() % 16 for tensor in read):
            raise InputError("a row, its weight or its LayerNorm does not begin at a multiple of 16 bytes")
        params = RowParams(
            kernel_params(x, weight, bias, residual, y, self.columns // UNIT, relu, self._streams),
            norm.scale.data_ptr() if norm is not None else None,
            norm.shift.data_ptr() if norm is not None else None,
            norm.eps if norm is not None else 0.0,
            ahead or Ahead(),
        )
        launching.run(
            self.file,
            self.file.removesuffix(".cu"),
            self.macros(),
            (self.blocks(launching.gpu(weight.device.index)), self.tile.cluster),
            self.threads,
            self._argument(params),
            weight.device,
            cluster=self.tile.cluster,
            shared_bytes=self.shared_bytes(),
        )


@dataclass(frozen=True, slots=True)
class NmRowProduct(RowProduct):
    """The product with a 2:4 or 4:8 weight in fragment order.

    Attributes:
        group: 4 of a 2:4 pattern or 8 of 4:8.
        by_unit: through decode_nm.cu, which neither has LayerNorms nor asks for what the next launch reads.
    """

    group: int
    by_unit: bool = False

    def __post_init__(self) -> None:
        RowProduct.__post_init__(self)
        if self.normed and self.by_unit:
            raise InputError("a LayerNorm of a row that comes unit by unit")

    @property
    def file(self) -> str:
        return "decode_nm.cu" if self.by_unit else "decode_row.cu"

    def macros(self) -> dict[str, int]:
        own = {} if self.by_unit else {"COLS": self.columns, "NORMED": int(self.normed)}
        return {**dict(macros_of(_SOURCES[self.group], self.tile, self.dtype)), **own}

    def shared_bytes(self) -> int:
        """Zeros, the row, with a LayerNorm its shifts and moments; sums of two tiles; what is added to them."""
        if self.by_unit:
            return _SOURCES[self.group].shared_bytes(self.tile, 1, 0)
        sums = 8 * self.tile.warps_k * (self.tile.block_rows + 4)
        return _ZERO_BYTES + row_input_bytes(self.columns, normed=self.normed) + sums + 4 * self.tile.block_rows

    def _misfit(self, weight: Tensor) -> str | None:
        nbytes, expected = weight.numel() * weight.element_size(), -(-self.rows // 16) * (self.columns // UNIT) * 9 * 32 * 16
        fits = nbytes == expected and weight.is_contiguous()
        return None if fits else f"a weight of {nbytes} bytes; {expected} are expected, without gaps"

    def blocks(self, here: Gpu) -> int:
        return -(-self.rows // self.tile.block_rows) if self.by_unit else RowProduct.blocks(self, here)

    def _argument(self, params: RowParams) -> ctypes.Structure:
        if self.by_unit and params.ahead.bytes:
            raise InputError("decode_nm.cu asks for nothing of what the next launch reads")
        return params.product if self.by_unit else params
