"""The product of a single activation row with an unstructured weight on Hopper: csrc/cuda/decode_row_unstructured.cu.

A configuration, as tuning tables hold it, is the source's file, a block's warps that multiply, the slots of each, copies of the table,
blocks on a multiprocessor, warps that bring the row, and blocks of a cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from sparse_engine import cuda, tuning
from sparse_engine.backends.cuda_decode import Ahead, RowParams, Streams, check_arguments, kernel_params
from sparse_engine.backends.cuda_sources import (
    TYPICAL_DEPTH,
    UNIT,
    Gpu,
    Tile,
    gpu,
    resident_clusters,
    row_input_bytes,
    stream_bytes,
    whole_lines,
)
from sparse_engine.backends.cuda_tiles import parse, unstructured_parts
from sparse_engine.errors import KernelUnavailableError
from sparse_engine.registry import Config, Problem

__all__ = [
    "SMALL_UP_TO",
    "SOURCE",
    "StreamRow",
    "choose",
    "compilations",
    "configs",
    "parse_row",
    "run_row",
    "usual_row",
]

SOURCE = "decode_row_unstructured.cu"
_FUNCTION = SOURCE.removesuffix(".cu")
_LEAST_RING = 4
"""The least ``RING`` of the source."""
_RESIDENT_WARPS = 24
"""Warps of a multiprocessor that the kernel has registers for."""
SMALL_UP_TO = 1024
"""Width of a model up to which blocks have one row tile: its rows come in units of 128 columns then."""
_LONG_FROM = 10_240
"""Columns from which a row tile is enough work for the blocks of a cluster to share it."""
_MANY_FROM = 4096
"""Columns from which the kernel is clearly faster for row tiles that are more than multiprocessors, where units have 256 columns.

On an H200, with a LayerNorm inside that the other kernel lacks, qkv and fc1 of 1.3B took 1 % longer, those of 6.7B 1 % and 13B 4 % less;
the products without, whose row tiles are few or columns many, 2 to 46 % less.
"""


@dataclass(frozen=True, slots=True)
class StreamRow:
    """How a block multiplies a row of ``columns``, a multiple of 256.

    Attributes:
        tile: of one n-tile, row tile and warp along the rows, without splits; its clusters share row tiles. Its parts are the layout's.
        row_warps: of a block, beside those that multiply.
        normed: by the row's LayerNorm.
    """

    columns: int
    tile: Tile
    row_warps: int
    normed: bool = False

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * (self.tile.warps_k + self.row_warps)

    @property
    def config(self) -> Config:
        tile = self.tile
        return SOURCE, tile.warps_k, tile.stages, tile.table_copies, tile.min_blocks, self.row_warps, tile.cluster

    def macros(self, element: torch.dtype) -> dict[str, int]:
        """What the source is compiled with."""
        own = {
            "COLS": self.columns,
            "NORMED": int(self.normed),
            "ROW_WARPS": self.row_warps,
            "CLUSTER": self.tile.cluster,
            "ELEM_BF16": int(element is torch.bfloat16),
        }
        return {**self.tile.macros(), **own}

    def shared_bytes(self, depth: int) -> int:
        """The row, with a LayerNorm its shifts and moments; sums of tiles and their barriers; the table and the slots."""
        warps, units = self.tile.cluster * self.tile.warps_k, self.columns * self.tile.parts // UNIT
        ring = max(_LEAST_RING, -(-warps // units))
        sums = ring * min(warps, units) * (self.tile.block_rows + 4) * 4
        row = row_input_bytes(self.columns, normed=self.normed)
        return whole_lines(row + sums + 16 * ring) + stream_bytes(self.tile, depth)

    def fitted(self, depth: int, here: Gpu) -> StreamRow | None:
        """With as many copies of the table and as many warps as shared memory allows beside units of ``depth`` words; None: not one."""
        found = self
        while found.shared_bytes(depth) > here.shared_limit:
            tile = found.tile
            if tile.table_copies > 4:
                found = replace(found, tile=replace(tile, table_copies=tile.table_copies // 2))
            elif tile.warps_k > 1:
                found = replace(found, tile=replace(tile, warps_k=tile.warps_k - 1))
            else:
                return None
        return found


def _row(columns: int, warps: int, slots: int, copies: int, blocks: int, row_warps: int, cluster: int) -> StreamRow:
    tile = Tile(1, 1, 1, warps, unstructured_parts(columns), stages=slots, min_blocks=blocks, table_copies=copies, cluster=cluster)
    return StreamRow(columns, tile, row_warps)


def _serves(columns: int, here: Gpu) -> bool:
    return here.hopper and columns % UNIT == 0


def _small_row(rows: int, columns: int, here: Gpu) -> StreamRow:
    """Blocks of one row tile, with equally many units for each of their warps.

    A step of 125M took 0.149 ms with such tiles, and 0.176 with those of wider models. Its product `out`, whose six units leave half of
    twelve warps idle, takes them all the same: with six warps a step took 0.167 ms, though the product alone is but 7 % slower.
    """
    units = columns * unstructured_parts(columns) // UNIT
    rounds = -(-units // 12)
    warps, slots = -(-units // rounds), min(rounds, 2)
    if -(-rows // 16) <= here.processors:
        return _row(columns, 12, 2, 8, 1, 4, 1) if rounds == 1 else _row(columns, warps, slots, 4, 1, 4, 1)
    # Small blocks, so that all tiles are resident at once.
    return _row(columns, warps, slots, 4, max(min(3, _RESIDENT_WARPS // (warps + 2)), 1), 2, 1)


def _wide_row(rows: int, columns: int, here: Gpu) -> StreamRow:
    """One large block on each multiprocessor.

    Clusters share the tiles of long rows where a block has more than one: a multiprocessor has two or three of the last product of 13B,
    which took 17 % less time so, and one of 6.7B as much; other products took 5 to 56 % longer. With twelve warps instead of eight those
    of 1.3B to 6.7B took up to 8 % longer, with two blocks of six up to 52 %.
    """
    if columns >= _LONG_FROM and -(-rows // 16) > here.processors:
        return _row(columns, 12, 2, 8, 1, 4, 2)
    return _row(columns, 8, 2, 8, 1, 4, 1)


def usual_row(rows: int, columns: int, here: Gpu) -> StreamRow:
    """The form for a product of a model of any width."""
    return (_small_row if min(rows, columns) <= SMALL_UP_TO else _wide_row)(rows, columns, here)


def _candidates(rows: int, columns: int, here: Gpu) -> Iterator[StreamRow]:
    """What is worth measuring, the likely ones first."""
    yield usual_row(rows, columns, here)
    if -(-rows // 16) <= here.processors:
        yield _small_row(rows, columns, here)
    yield _row(columns, 8, 2, 8, 1, 4, 1)
    yield _row(columns, 12, 2, 8, 1, 4, 1)
    yield _row(columns, 12, 1, 4, 1, 4, 1) if unstructured_parts(columns) > 1 else _row(columns, 12, 2, 8, 1, 4, 2)
    yield _row(columns, 6, 2, 4, 2, 2, 1)


def configs(problem: Problem, here: Gpu) -> list[Config]:
    """What tuning measures for ``problem``: nothing where it has several rows, or rows that the kernel does not take."""
    rows, columns = problem.out_features, problem.in_features
    if problem.rows != 1 or not _serves(columns, here):
        return []
    depth = -(-TYPICAL_DEPTH // unstructured_parts(columns))
    fitted = (each.fitted(depth, here) for each in _candidates(rows, columns, here))
    return list(dict.fromkeys(each.config for each in fitted if each is not None))


def parse_row(config: Config, columns: int, here: Gpu) -> StreamRow | None:
    """The form of a configuration; None where it is another kernel's, or this one's of another version, or does not take such rows."""
    file, *fields = config or ("",)
    if file != SOURCE or len(fields) != 6 or not _serves(columns, here):
        return None
    if not all(isinstance(field, int) and field > 0 for field in fields):
        return None
    row = _row(columns, *fields)  # type: ignore[arg-type]
    return row if row.threads <= 1024 and row.tile.cluster <= 2 else None


def compilations(problem: Problem, config: Config, here: Gpu) -> tuple[tuple[str, str, tuple[tuple[str, int], ...]], ...]:
    """What NVRTC has to compile for a configuration: nothing for those of other kernels."""
    row = parse_row(config, problem.in_features, here)
    return () if row is None else ((SOURCE, here.arch, tuple(sorted(row.macros(problem.dtype).items()))),)


def _rule(rows: int, columns: int, depth: int, here: Gpu) -> StreamRow | None:
    """The form for a shape that no table has, where the kernel was clearly faster than that for several rows."""
    if not _serves(columns, here):
        return None
    if -(-rows // 16) > here.processors and unstructured_parts(columns) == 1 and columns < _MANY_FROM:
        return None
    row = usual_row(rows, columns, here)
    fitted = row.fitted(depth, here)
    # Deep units that cost warps were not what was measured.
    return fitted if fitted is not None and fitted.tile.warps_k == row.tile.warps_k else None


@cache
def choose(kernel: str, dtype: torch.dtype, rows: int, columns: int, depth: int, here: Gpu) -> StreamRow | None:
    """The form for one activation row by a (rows, columns) weight whose units have up to ``depth`` words; None: another kernel's turn.

    What this GPU's table has for ``kernel`` goes before the rule, whichever of the kernels it names.
    """
    measured = tuning.lookup(here.name, "unstructured", dtype, (rows, columns), 1).get(kernel)
    if measured is not None:
        if (row := parse_row(measured.config, columns, here)) is not None:
            return row.fitted(depth, here)
        if parse("unstructured", measured.config) is not None:
            return None
    return _rule(rows, columns, depth, here)


@cache
def _prepared(row: StreamRow, dtype: torch.dtype, rows: int, depth: int, here: Gpu) -> tuple[cuda.CudaFunction, tuple[int, int], int, int]:
    """The function, its grid, a block's threads and shared memory."""
    if (fitted := row.fitted(depth, here)) is None:
        raise KernelUnavailableError(f"units of {depth} words leave no room for a row of {row.columns} columns in shared memory")
    shared = fitted.shared_bytes(depth)
    function = cuda.load(SOURCE, _FUNCTION, here.arch, tuple(sorted(fitted.macros(dtype).items())))
    return function, (resident_clusters(fitted.tile, rows, shared, here), fitted.tile.cluster), fitted.threads, shared


def run_row(
    row: StreamRow,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rows: int,
    relu: bool,
    streams: Streams,
) -> Tensor:
    """One activation row x (..., columns) by the weight (rows, columns), plus bias, ReLU and residual.

    Raises:
        InputError: shapes, types or devices do not fit.
        KernelUnavailableError: the kernel cannot be compiled or launched, or units are too deep for it.
    """
    check_arguments(x, weight, bias, residual, rows, row.columns)
    device = x.device.index
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return run_row(row, x, weight, bias, residual, rows, relu, streams)
    here = gpu(device)
    y = x.new_empty((*x.shape[:-1], rows))
    if y.numel() == 0:
        return y
    flat = x.reshape(1, row.columns)
    if flat.stride(1) != 1 or flat.data_ptr() % 16:
        flat = flat.clone(memory_format=torch.contiguous_format)
    function, grid, threads, shared = _prepared(row, x.dtype, rows, streams.depth, here)
    product = kernel_params(flat, weight, bias, residual, y, row.columns // UNIT, relu, streams)
    argument = RowParams(product, None, None, 0.0, Ahead())
    cuda.launch(function, grid, threads, shared, argument, device, cluster=(1, grid[1]), overlap=here.hopper)
    return y
