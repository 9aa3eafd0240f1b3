"""The product of one to sixteen activation rows with a sparse weight on Hopper: csrc/cuda/decode_row_stream.cu.

A configuration, as tuning tables hold it, is the source's file, a block's warps that multiply, the slots of each, copies of the table (of
2:4 and 4:8, which need none: the parts of a unit of 256 columns), blocks on a multiprocessor, warps that bring the rows, and blocks of a
cluster. Which one runs is chosen in :mod:`sparse_engine.backends.cuda_row_forms`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from sparse_engine import cuda
from sparse_engine.backends.cuda_decode import Ahead, RowParams, check_arguments, kernel_params
from sparse_engine.backends.cuda_prefill import Call
from sparse_engine.backends.cuda_sources import (
    UNIT,
    Gpu,
    Tile,
    fragment_bytes,
    gpu,
    resident_clusters,
    row_input_bytes,
    stream_bytes,
    whole_lines,
)
from sparse_engine.backends.cuda_tiles import unstructured_parts
from sparse_engine.errors import KernelUnavailableError
from sparse_engine.registry import Config

__all__ = ["MOST_ROWS", "SOURCE", "StreamRow", "parse_row", "row_of", "run_rows", "serves", "x_rows_for"]

SOURCE = "decode_row_stream.cu"
_FUNCTION = SOURCE.removesuffix(".cu")
MOST_ROWS = 16
"""Activation rows of two fragments of the tensor cores."""
_LARGEST_CLUSTER = 4
_PATTERN_MACRO = {"2:4": 24, "4:8": 48, "unstructured": 0}


def serves(columns: int, here: Gpu) -> bool:
    """Whether the kernel takes rows of so many columns on this GPU."""
    return here.hopper and columns % UNIT == 0


def x_rows_for(m: int) -> int:
    """Activation rows that a form for m of them has room for."""
    return 1 << (m - 1).bit_length()


@dataclass(frozen=True, slots=True)
class StreamRow:
    """How a block multiplies rows of ``columns``, a multiple of 256.

    Attributes:
        pattern: "2:4", "4:8" or "unstructured".
        tile: of one n-tile, row tile and warp along the rows, without splits; its clusters share row tiles. Its parts are the layout's
            where weights are unstructured.
        row_warps: of a block, beside those that multiply.
        normed: by the LayerNorm of the row, which is one then.
        x_rows: activation rows that shared memory has room for.
    """

    pattern: str
    columns: int
    tile: Tile
    row_warps: int
    normed: bool = False
    x_rows: int = 1

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * (self.tile.warps_k + self.row_warps)

    @property
    def config(self) -> Config:
        tile = self.tile
        own = tile.table_copies if self.pattern == "unstructured" else tile.parts
        return SOURCE, tile.warps_k, tile.stages, own, tile.min_blocks, self.row_warps, tile.cluster

    def macros(self, element: torch.dtype) -> dict[str, int]:
        """What the source is compiled with."""
        own = {
            "PATTERN": _PATTERN_MACRO[self.pattern],
            "COLS": self.columns,
            "NORMED": int(self.normed),
            "ROW_WARPS": self.row_warps,
            "CLUSTER": self.tile.cluster,
            "X_ROWS": self.x_rows,
            "ELEM_BF16": int(element is torch.bfloat16),
        }
        return {**self.tile.macros(), **own}

    @property
    def _units(self) -> int:
        return self.columns * self.tile.parts // UNIT

    @property
    def equal_shares(self) -> bool:
        """Whether warps of a cluster have equal shares of each row tile, without which its blocks would need all of several rows."""
        return self.x_rows == 1 or self.tile.cluster == 1 or self._units % (self.tile.cluster * self.tile.warps_k) == 0

    def shared_bytes(self, depth: int) -> int:
        """The rows, with a LayerNorm its shifts and moments; sums of tiles and their barriers; the slots, and the table of a weight whose
        deepest unit has ``depth`` words."""
        warps = self.tile.cluster * self.tile.warps_k
        ring = max(4 if self.x_rows <= 2 else 2, -(-warps // self._units))
        sums = ring * min(warps, self._units) * self.x_rows * (self.tile.block_rows + 4) * 4
        if self.x_rows == 1:
            rows = row_input_bytes(self.columns, normed=self.normed)
        else:
            rows = self.x_rows * (2 * self.columns // self.tile.cluster + (16 if self.pattern == "2:4" else 64))
        slots = stream_bytes(self.tile, depth) if self.pattern == "unstructured" else fragment_bytes(self.tile)
        return whole_lines(rows + sums + 16 * ring) + slots

    def fitted(self, depth: int, here: Gpu) -> StreamRow | None:
        """With as many copies of the table and as many warps as shared memory allows beside units of ``depth`` words; None: not one."""
        found = self
        while found.shared_bytes(depth) > here.shared_limit or not found.equal_shares:
            tile = found.tile
            if self.pattern == "unstructured" and tile.table_copies > 4 and found.equal_shares:
                found = replace(found, tile=replace(tile, table_copies=tile.table_copies // 2))
            elif tile.warps_k > 1:
                found = replace(found, tile=replace(tile, warps_k=tile.warps_k - 1))
            else:
                return None
        return found


def row_of(pattern: str, columns: int, warps: int, slots: int, own: int, blocks: int, row_warps: int, cluster: int) -> StreamRow:
    """The form that a configuration's fields describe, for one activation row."""
    unstructured = pattern == "unstructured"
    parts, copies = (unstructured_parts(columns), own) if unstructured else (own, 1)
    tile = Tile(1, 1, 1, warps, parts, stages=slots, min_blocks=blocks, table_copies=copies, cluster=cluster)
    return StreamRow(pattern, columns, tile, row_warps)


def parse_row(pattern: str, config: Config, columns: int, m: int, here: Gpu) -> StreamRow | None:
    """The form of a configuration for m activation rows; None where it is another kernel's, or this one's of another version, or does not
    take such rows."""
    file, *fields = config or ("",)
    if file != SOURCE or len(fields) != 6 or not 0 < m <= MOST_ROWS or not serves(columns, here):
        return None
    if not all(isinstance(field, int) and field > 0 for field in fields):
        return None
    row = replace(row_of(pattern, columns, *fields), x_rows=x_rows_for(m))  # type: ignore[arg-type]
    known = row.threads <= 1024 and row.tile.cluster <= _LARGEST_CLUSTER and row.tile.parts in (1, 2, 4)
    return row if known and row.equal_shares else None


@cache
def _prepared(row: StreamRow, dtype: torch.dtype, rows: int, depth: int, here: Gpu) -> tuple[cuda.CudaFunction, tuple[int, int], int, int]:
    """The function, its grid, a block's threads and shared memory."""
    if (fitted := row.fitted(depth, here)) is None:
        raise KernelUnavailableError(f"units of {depth} words leave no shared memory for {row.x_rows} rows of {row.columns} columns")
    shared = fitted.shared_bytes(depth)
    function = cuda.load(SOURCE, _FUNCTION, here.arch, tuple(sorted(fitted.macros(dtype).items())))
    return function, (resident_clusters(fitted.tile, rows, shared, here), fitted.tile.cluster), fitted.threads, shared


def run_rows(row: StreamRow, call: Call) -> Tensor:
    """The product of up to ``row.x_rows`` activation rows.

    Raises:
        InputError: shapes, types or devices do not fit.
        KernelUnavailableError: the kernel cannot be compiled or launched, or units are too deep for it.
    """
    x, rows, streams = call.x, call.rows, call.streams
    check_arguments(x, call.weight, call.bias, call.residual, rows, row.columns)
    device = x.device.index
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return run_rows(row, call)
    here = gpu(device)
    y = x.new_empty((*x.shape[:-1], rows))
    if y.numel() == 0:
        return y
    flat = x.reshape(-1, row.columns)
    if flat.stride(1) != 1 or flat.data_ptr() % 16 or (len(flat) > 1 and flat.stride(0) % 8):
        flat = flat.clone(memory_format=torch.contiguous_format)
    function, grid, threads, shared = _prepared(row, x.dtype, rows, streams.depth if streams is not None else 0, here)
    product = kernel_params(flat, call.weight, call.bias, call.residual, y, row.columns // UNIT, call.relu, streams)
    argument = RowParams(product, None, None, 0.0, Ahead())
    cuda.launch(function, grid, threads, shared, argument, device, cluster=(1, grid[1]), overlap=here.hopper)
    return y
