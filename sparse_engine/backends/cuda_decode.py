"""What the decode kernels of csrc/cuda share on the host: tile choice, checks of the arguments and the launch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from sparse_engine import cuda
from sparse_engine.errors import InputError, KernelUnavailableError

__all__ = [
    "MAX_ROWS",
    "UNIT",
    "Gpu",
    "Source",
    "StreamSource",
    "Streams",
    "Tile",
    "WarpgroupSource",
    "arrange_macros",
    "check_arguments",
    "fit",
    "fragment_linear_fake",
    "gpu",
    "kernel_params",
    "macros_of",
    "run_decode",
]

UNIT = 256
"""Columns that a warp takes at a time."""
MAX_ROWS = 64
"""Activation rows of one launch of a kernel on mma.sync; more run as slabs."""
_ZERO_BYTES = 128
_ARRANGE_THREADS = 256
_SLOT_BYTES = 9 * 512
"""Bytes of 16 rows by 256 columns of a 2:4 or 4:8 weight in fragment order."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How one launch divides its work: macros of decode_common.cuh and paired.cuh, and ``splits`` of the columns over a cluster."""

    n_tiles: int
    row_tiles: int
    warps_row: int
    warps_k: int
    parts: int = 1
    splits: int = 1
    stages: int = 2
    min_blocks: int = 1
    table_copies: int = 16

    @property
    def block_rows(self) -> int:
        return 16 * self.row_tiles * self.warps_row

    def macros(self) -> dict[str, int]:
        return {
            "N_TILES": self.n_tiles,
            "ROW_TILES": self.row_tiles,
            "WARPS_ROW": self.warps_row,
            "WARPS_K": self.warps_k,
            "PARTS": self.parts,
            "STAGES": self.stages,
            "MIN_BLOCKS": self.min_blocks,
            "TABLE_COPIES": self.table_copies,
        }


@dataclass(frozen=True, slots=True)
class Source:
    """A kernel ``function`` of csrc/cuda/``file``, compiled with ``macros`` and a tile's, for up to ``max_rows`` activation rows."""

    file: str
    function: str
    macros: tuple[tuple[str, int], ...] = ()
    x_pad: int = 0
    max_rows: int = MAX_ROWS

    def threads(self, tile: Tile) -> int:
        """Threads of a block."""
        return 32 * tile.warps_row * tile.warps_k

    def shared_bytes(self, tile: Tile, m: int, depth: int) -> int:
        """Shared memory of a block: buffers of x, which the sums of the warps reuse."""
        return max(tile.stages * self._buffer_bytes(tile, m) + _ZERO_BYTES, self._sums_bytes(tile, m))

    def _buffer_bytes(self, tile: Tile, m: int) -> int:
        return _staged_rows(tile, m) * (tile.warps_k * UNIT * 2 // tile.parts + self.x_pad)

    def _sums_bytes(self, tile: Tile, m: int) -> int:
        return tile.warps_k * _staged_rows(tile, m) * (tile.block_rows + 4) * 4

    def grid(self, tile: Tile, rows: int, shared: int, here: Gpu) -> tuple[int, int]:
        """Blocks along the rows, and splits."""
        return -(-rows // tile.block_rows), tile.splits


@dataclass(frozen=True, slots=True)
class StreamSource(Source):
    """The kernel on mma.sync for unstructured weights: units arrive in slots of their own, and blocks stay for several row groups."""

    def shared_bytes(self, tile: Tile, m: int, depth: int, x_buffers: int = 2) -> int:
        x = _whole_lines(_ZERO_BYTES + x_buffers * self._buffer_bytes(tile, m))
        sums = _whole_lines(self._sums_bytes(tile, m))
        return (x + 2 * sums if tile.n_tiles <= 2 else max(x, sums)) + _stream_bytes(tile, depth)

    def x_buffers(self, tile: Tile, m: int, depth: int, units: int, here: Gpu) -> int:
        """One for every round of a row group, where as many blocks fit a multiprocessor then as with two."""
        rounds = -(-units // (tile.splits * tile.warps_k))
        return rounds if self._resident(tile, m, depth, rounds, here) >= self._resident(tile, m, depth, 2, here) else 2

    def _resident(self, tile: Tile, m: int, depth: int, x_buffers: int, here: Gpu) -> int:
        return _blocks(tile, self.shared_bytes(tile, m, depth, x_buffers), here)

    def grid(self, tile: Tile, rows: int, shared: int, here: Gpu) -> tuple[int, int]:
        groups = -(-rows // tile.block_rows)
        if tile.n_tiles > 2:
            return groups, tile.splits
        return min(groups, max(here.processors * _blocks(tile, shared, here) // tile.splits, 1)), tile.splits


def _blocks(tile: Tile, shared: int, here: Gpu) -> int:
    """Blocks of a tile on one multiprocessor, whose shared memory is 1 KB more than a block may have and of which each block takes 1 KB."""
    return min(tile.min_blocks, (here.shared_limit + 1024) // (shared + 1024))


def _staged_rows(tile: Tile, m: int) -> int:
    return m if tile.n_tiles == 1 else 8 * tile.n_tiles


@dataclass(frozen=True, slots=True)
class WarpgroupSource(Source):
    """A kernel on wgmma, for compute capability 9.0; it reads activations in the form that csrc/cuda/arrange.cu gives them.

    ``expanded``: weights are expanded, which asks for another order of the columns.
    """

    max_rows: int = 128
    expanded: bool = False

    def threads(self, tile: Tile) -> int:
        return 32 * (tile.warps_row + 1)

    def shared_bytes(self, tile: Tile, m: int, depth: int) -> int:
        if depth:
            stages, subtiles = 4, 1 if tile.n_tiles >= 8 else 2
        else:
            stages, subtiles = 3 if tile.n_tiles == 4 else 4, max(1, min(4, 16 // tile.n_tiles))
        slots = tile.warps_row * tile.stages
        buffers = _whole_lines(stages * subtiles * tile.n_tiles * 1024 + 8 * (2 * stages + slots))
        buffers += _stream_bytes(tile, depth) if depth else slots * _SLOT_BYTES
        return max(buffers, self._sums_bytes(tile, m))


def _stream_bytes(tile: Tile, depth: int) -> int:
    """The expansion table, barriers and slots of every warp: a pair that keeps nothing reads one word before or behind a unit's."""
    slots = tile.warps_row * tile.warps_k * tile.stages
    slot = 96 + 32 + 512 // tile.parts + 128 * (depth + 1)
    return 512 * 8 * tile.table_copies + _whole_lines(8 * slots) + slots * slot


def _whole_lines(nbytes: int) -> int:
    return -(-nbytes // 128) * 128


class _Params(ctypes.Structure):
    """``Params`` of decode_common.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "offsets", "x", "bias", "residual", "y")),
        *((name, ctypes.c_int) for name in ("m", "rows", "cols", "ldx", "units", "relu", "x_vector", "y_vector", "depth", "x_buffers")),
    )


def kernel_params(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, y: Tensor, units: int, relu: bool
) -> ctypes.Structure:
    """``Params`` of decode_common.cuh for a kernel that takes all of x (m, columns), 16-byte aligned rows, at once; y is (..., rows)."""
    rows = y.shape[-1]
    stored = (y.data_ptr(), *(t.data_ptr() for t in (bias, residual) if t is not None))
    return _Params(
        weight.data_ptr(),
        None,
        x.data_ptr(),
        bias.data_ptr() if bias is not None else None,
        residual.data_ptr() if residual is not None else None,
        y.data_ptr(),
        x.shape[0],
        rows,
        x.shape[1],
        x.stride(0),
        units,
        int(relu),
        1,
        int(rows % 4 == 0 and all(at % 8 == 0 for at in stored)),
        0,
        0,
    )


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    arch: str
    processors: int
    hopper: bool
    shared_limit: int
    """Bytes of shared memory that one block may have."""


@cache
def gpu(index: int) -> Gpu:
    """What the tile choice needs to know of device ``index``."""
    major, minor = torch.cuda.get_device_capability(index)
    properties = torch.cuda.get_device_properties(index)
    arch = f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")
    return Gpu(properties.name, arch, properties.multi_processor_count, major >= 9, properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def fit(source: Source, tile: Tile, m: int, depth: int, here: Gpu) -> Tile:
    """``tile`` with as many warps as its shared memory allows, and without splits where there are no clusters.

    Raises:
        KernelUnavailableError: not even one is allowed.
    """
    if tile.splits > 1 and not here.hopper:
        tile = replace(tile, splits=1)
    if depth and tile.table_copies > 8:
        tile = replace(tile, table_copies=8)
    while (needed := source.shared_bytes(tile, m, depth)) > here.shared_limit:
        least = 1 if depth else tile.parts
        if depth and tile.table_copies > 4:
            tile = replace(tile, table_copies=tile.table_copies // 2)
        elif isinstance(source, WarpgroupSource) and tile.warps_row > 4:
            tile = replace(tile, warps_row=tile.warps_row - 4)
        elif tile.warps_k > least:
            tile = replace(tile, warps_k=max(tile.warps_k // 2 // least * least, least))
        else:
            raise KernelUnavailableError(f"{m} rows need {needed} bytes of shared memory a block, and this GPU has {here.shared_limit}")
    return tile


def macros_of(source: Source, tile: Tile, element: torch.dtype) -> tuple[tuple[str, int], ...]:
    """What the source is compiled with."""
    return tuple(sorted({**dict(source.macros), **tile.macros(), "ELEM_BF16": int(element is torch.bfloat16)}.items()))


def arrange_macros(source: WarpgroupSource, tile: Tile) -> tuple[tuple[str, int], ...]:
    """What arrange.cu is compiled with for a kernel; it moves 16-bit elements of either type."""
    return (("ELEM_BF16", 1), ("EXPANDED", int(source.expanded)), ("N_TILES", tile.n_tiles))


@cache
def _function(source: Source, arch: str, element: torch.dtype, tile: Tile) -> cuda.CudaFunction:
    return cuda.load(source.file, source.function, arch, macros_of(source, tile, element))


def check_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, rows: int, columns: int) -> None:
    """Raise InputError where the operands of x (..., columns) by a weight (rows, columns) and its epilogue do not fit each other."""
    if x.dtype is not weight.dtype:
        raise InputError(f"x is {x.dtype} but the weight's values are {weight.dtype}; cast x to the weight's type")
    if x.shape[-1] != columns:
        raise InputError(f"x has {x.shape[-1]} columns but the weight takes {columns}")
    if bias is not None and (bias.shape != (rows,) or bias.dtype is not x.dtype or not bias.is_contiguous()):
        raise InputError(f"bias is {bias.dtype} {tuple(bias.shape)}, expected contiguous {x.dtype} ({rows},)")
    shape = (*x.shape[:-1], rows)
    if residual is not None and (residual.shape != shape or residual.dtype is not x.dtype or not residual.is_contiguous()):
        raise InputError(f"residual is {residual.dtype} {tuple(residual.shape)}, expected contiguous {x.dtype} {shape}")
    if any(t is not None and t.device != x.device for t in (weight, bias, residual)):
        raise InputError(f"x lies on {x.device} and the weight, bias or residual elsewhere; move them to one device")


@dataclass(frozen=True, slots=True)
class Streams:
    """The further parts of an unstructured weight, see csrc/cuda/paired.cuh."""

    offsets: Tensor
    depth: int
    """Words of the deepest unit."""
    parts: int
    """Units are 256 / parts columns."""


def _arrange(source: WarpgroupSource, tile: Tile, params: _Params, x: Tensor, subtiles: int, here: Gpu, device: int) -> Tensor:
    """The image of the activations that ``params`` describes, ``subtiles`` of 64 columns, as csrc/cuda/arrange.cu lays it out."""
    image = x.new_empty(subtiles, 8 * tile.n_tiles, 64)
    arranged = _Params.from_buffer_copy(params)
    arranged.y, arranged.units = image.data_ptr(), subtiles
    function = cuda.load("arrange.cu", "arrange", here.arch, arrange_macros(source, tile))
    blocks = -(-subtiles * 8 * params.m // _ARRANGE_THREADS)
    cuda.launch(function, (blocks, 1), _ARRANGE_THREADS, 0, arranged, device, overlap=True)
    return image


def run_decode(
    choose: Callable[[torch.dtype, int, int, int, Gpu], tuple[Source, Tile]],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rows: int,
    columns: int,
    relu: bool,
    streams: Streams | None = None,
) -> Tensor:
    """x (..., columns) by the weight (rows, columns) behind ``weight``, plus bias, ReLU and residual; see decode_common.cuh.

    ``choose(dtype, rows, columns, m, gpu)`` gives the kernel and tile for m activation rows, of which the kernel may take fewer.
    ``streams`` belongs to an unstructured weight.

    Raises:
        InputError: shapes, types or devices do not fit.
        KernelUnavailableError: the kernel cannot be compiled or launched.
    """
    check_arguments(x, weight, bias, residual, rows, columns)
    y = x.new_empty((*x.shape[:-1], rows))
    m = x.numel() // columns
    if y.numel() == 0:
        return y
    flat = x.reshape(m, columns)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    device = x.device.index
    current = torch.cuda.current_device()
    if device != current:
        with torch.cuda.device(device):
            return run_decode(choose, x, weight, bias, residual, rows, columns, relu, streams)
    here = gpu(device)
    stride, itemsize = flat.stride(0), x.element_size()
    pointer, out = flat.data_ptr(), y.data_ptr()
    vector = int(pointer % 16 == 0 and columns % 8 == 0 and (m == 1 or stride % 8 == 0))
    stored = (out, *(t.data_ptr() for t in (bias, residual) if t is not None))
    y_vector = int(rows % 4 == 0 and all(at % 8 == 0 for at in stored))
    offsets: int | None = None
    depth, parts = 0, 1
    if streams is not None:
        offsets, depth, parts = streams.offsets.data_ptr(), streams.depth, streams.parts
    units = -(-columns * parts // UNIT)
    first = 0
    while first < m:
        source, tile = choose(x.dtype, rows, columns, m - first, here)
        count = min(source.max_rows, m - first)
        if streams is not None and tile.parts != parts:
            # What the layout has, whatever a table says.
            tile = replace(tile, parts=parts)
        tile = fit(source, tile, count, depth, here)
        x_buffers, shared = 0, source.shared_bytes(tile, count, depth)
        if isinstance(source, StreamSource):
            x_buffers = source.x_buffers(tile, count, depth, units, here)
            shared = source.shared_bytes(tile, count, depth, x_buffers)
        params = _Params(
            weight.data_ptr(),
            offsets,
            pointer + first * stride * itemsize,
            bias.data_ptr() if bias is not None else None,
            residual.data_ptr() + first * rows * itemsize if residual is not None else None,
            out + first * rows * itemsize,
            count,
            rows,
            columns,
            stride,
            units,
            int(relu),
            vector,
            y_vector,
            depth,
            x_buffers,
        )
        if isinstance(source, WarpgroupSource):
            image = _arrange(source, tile, params, x, units * (4 // parts), here, device)
            params.x = image.data_ptr()
        function = _function(source, here.arch, x.dtype, tile)
        grid = source.grid(tile, rows, shared, here)
        cuda.launch(function, grid, source.threads(tile), shared, params, device, cluster=(1, tile.splits), overlap=here.hopper)
        first += count
    return y


def fragment_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, rows: int, *_: object) -> Tensor:
    """Shape of the product, for tracing."""
    return x.new_empty((*x.shape[:-1], rows))
