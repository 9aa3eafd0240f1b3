"""The decode kernels of csrc/cuda, as launches see them: sources, tiles, their shared memory and grids, and the GPU that they run on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from sparse_engine.errors import KernelUnavailableError

__all__ = [
    "AT_ONCE",
    "MAX_ROWS",
    "TYPICAL_DEPTH",
    "UNIT",
    "Gpu",
    "Source",
    "StreamSource",
    "StreamedSource",
    "Tile",
    "WarpgroupSource",
    "arrange_macros",
    "blocks_at_once",
    "fit",
    "fragment_bytes",
    "gpu",
    "macros_of",
    "resident_clusters",
    "row_input_bytes",
    "stream_bytes",
    "whole_lines",
]

UNIT = 256
"""Columns that a warp takes at a time."""
MAX_ROWS = 64
"""Activation rows of one launch of a kernel on mma.sync; more run as slabs."""
_ZERO_BYTES = 128
_HOPPER_SHARED = 232448
"""Bytes of shared memory that a block may have on the GPUs with wgmma."""
TYPICAL_DEPTH = 42
"""Words of the deepest unit at half density, for choosing tiles before a weight is seen."""
_SELDOM_DEEPER = 10
"""Words that a weight may be deeper without losing warps to buffers of activations."""
_SLOT_BYTES = 9 * 512
"""Bytes of 16 rows by 256 columns of a 2:4 or 4:8 weight in fragment order."""


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


@dataclass(frozen=True, slots=True)
class Tile:
    """How one launch divides its work: macros of decode_common.cuh, paired.cuh and decode_stream.cu, and ``splits`` of the columns.

    ``cluster`` blocks share activations, where a source knows that; with their ``splits`` they are a cluster, except with
    ``StreamedSource``: there ``splits`` is the clusters for each row group of ``cluster`` blocks; 0 takes as many clusters as fit the GPU.
    """

    n_tiles: int
    row_tiles: int
    warps_row: int
    warps_k: int
    parts: int = 1
    splits: int = 1
    stages: int = 2
    min_blocks: int = 1
    table_copies: int = 16
    cluster: int = 1

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
        """Shared memory of a block: buffers of x, which the sums of the warps reuse, and what the epilogue adds."""
        return max(tile.stages * self._buffer_bytes(tile, m) + _ZERO_BYTES, self._sums_bytes(tile, m)) + self._addends_bytes(tile)

    def _addends_bytes(self, tile: Tile) -> int:
        return 4 * tile.block_rows if tile.n_tiles == 1 else 0

    def _buffer_bytes(self, tile: Tile, m: int) -> int:
        return _staged_rows(tile, m) * (tile.warps_k * UNIT * 2 // tile.parts + self.x_pad)

    def _sums_bytes(self, tile: Tile, m: int) -> int:
        return tile.warps_k * _staged_rows(tile, m) * (tile.block_rows + 4) * 4

    def more_macros(self, tile: Tile) -> dict[str, int]:
        """What a tile sets beside its own macros."""
        return {}

    def grid(self, tile: Tile, rows: int, units: int, shared: int, here: Gpu) -> tuple[int, int]:
        """Blocks along the rows, and splits."""
        return -(-rows // tile.block_rows), tile.splits

    def cluster(self, tile: Tile) -> tuple[int, int]:
        """Blocks of a cluster along the rows, and splits."""
        return 1, tile.splits


@dataclass(frozen=True, slots=True)
class StreamSource(Source):
    """The kernel on mma.sync for unstructured weights: units arrive in slots of their own, and blocks stay for several row groups."""

    def shared_bytes(self, tile: Tile, m: int, depth: int, x_buffers: int = 2) -> int:
        x = whole_lines(_ZERO_BYTES + x_buffers * self._buffer_bytes(tile, m))
        sums = whole_lines(self._sums_bytes(tile, m))
        return (x + 2 * sums if tile.n_tiles <= 2 else max(x, sums)) + stream_bytes(tile, depth) + self._addends_bytes(tile)

    def x_buffers(self, tile: Tile, m: int, depth: int, units: int, here: Gpu) -> int:
        """One for every round of a row group, where as many blocks fit a multiprocessor then as with two."""
        rounds = -(-units // (tile.splits * tile.warps_k))
        return rounds if self._resident(tile, m, depth, rounds, here) >= self._resident(tile, m, depth, 2, here) else 2

    def _resident(self, tile: Tile, m: int, depth: int, x_buffers: int, here: Gpu) -> int:
        return blocks_at_once(tile, self.shared_bytes(tile, m, depth, x_buffers), here)

    def grid(self, tile: Tile, rows: int, units: int, shared: int, here: Gpu) -> tuple[int, int]:
        groups = -(-rows // tile.block_rows)
        if tile.n_tiles > 2:
            return groups, tile.splits
        return min(groups, max(here.processors * blocks_at_once(tile, shared, here) // tile.splits, 1)), tile.splits


AT_ONCE = {1: 1.0, 2: 1.0, 3: 0.95, 4: 0.91, 6: 0.82, 8: 0.91}
"""The part of a GPU that clusters of so many blocks can fill: they lie within a group of its multiprocessors (measured for 2, 4, 8)."""


def blocks_at_once(tile: Tile, shared: int, here: Gpu) -> int:
    """Blocks of a tile on one multiprocessor, whose shared memory is 1 KB more than a block may have and of which each block takes 1 KB."""
    return min(tile.min_blocks, (here.shared_limit + 1024) // (shared + 1024))


def resident_clusters(tile: Tile, rows: int, shared: int, here: Gpu) -> int:
    """One cluster for each row tile, or those that are resident at once, so that a block brings the activation row once for several."""
    blocks = int(AT_ONCE[tile.cluster] * here.processors) * blocks_at_once(tile, shared, here)
    return min(-(-rows // tile.block_rows), blocks // tile.cluster)


def row_input_bytes(columns: int, *, normed: bool) -> int:
    """Shared memory of row_input.cuh: the activation row; with a LayerNorm its shifts and moments."""
    return 2 * columns + (2 * columns + -(-8 * (columns // UNIT) // 16) * 16 if normed else 0)


def _staged_rows(tile: Tile, m: int) -> int:
    return m if tile.n_tiles == 1 else 8 * tile.n_tiles


@dataclass(frozen=True, slots=True)
class WarpgroupSource(Source):
    """A kernel on wgmma, for compute capability 9.0.

    ``expanded``: weights are expanded, which asks for another order of the columns.
    """

    max_rows: int = 128
    expanded: bool = False

    @property
    def arranged(self) -> bool:
        """Whether it reads activations in the form that csrc/cuda/arrange.cu gives them; else tensor copies bring them as they are."""
        return self.expanded

    def box(self, tile: Tile) -> tuple[int, int]:
        """Activation rows and columns that a tensor copy brings, a part of the rows where blocks share them."""
        return 8 * tile.n_tiles // tile.cluster, 64

    def threads(self, tile: Tile) -> int:
        return 32 * (tile.warps_row * tile.warps_k + 1)

    @property
    def _unstructured(self) -> bool:
        return dict(self.macros)["PATTERN"] == 0

    def more_macros(self, tile: Tile) -> dict[str, int]:
        """Buffers of activations for each k-warp, and how many times 64 columns they hold: no more than half a unit if it may be short.

        There are more of them where the slots of weights leave memory free: the activations come from afar, too.
        """
        if self._unstructured:
            subtiles = 1 if tile.n_tiles >= 8 else 2
            slots = stream_bytes(tile, (TYPICAL_DEPTH + _SELDOM_DEEPER) // tile.parts)
        else:
            subtiles = max(1, min(4, (16 if tile.warps_k == 1 else 8) // tile.n_tiles))
            slots = tile.warps_k * tile.warps_row * tile.stages * _SLOT_BYTES
        nbytes = subtiles * tile.n_tiles * 1024
        free = (_HOPPER_SHARED + 1024) // tile.min_blocks - 3072 - slots
        least = 3 if nbytes == 16384 and (tile.n_tiles == 4 or tile.warps_k > 1) else 4
        return {"CLUSTER": tile.cluster, "X_STAGES": max(least, min(8, free // (tile.warps_k * nbytes))), "X_SUBTILES": subtiles}

    def shared_bytes(self, tile: Tile, m: int, depth: int) -> int:
        macros = self.more_macros(tile)
        stages, slots = tile.warps_k * macros["X_STAGES"], tile.warps_k * tile.warps_row * tile.stages
        buffers = whole_lines(stages * macros["X_SUBTILES"] * tile.n_tiles * 1024 + 8 * (2 * stages + slots))
        buffers += stream_bytes(tile, depth) if depth else slots * _SLOT_BYTES
        return max(buffers, self._sums_bytes(tile, m))

    def grid(self, tile: Tile, rows: int, units: int, shared: int, here: Gpu) -> tuple[int, int]:
        """Whole clusters along the rows, and splits."""
        return -(-rows // (tile.block_rows * tile.cluster)) * tile.cluster, tile.splits

    def cluster(self, tile: Tile) -> tuple[int, int]:
        return tile.cluster, tile.splits


@dataclass(frozen=True, slots=True)
class StreamedSource(WarpgroupSource):
    """The kernel on wgmma whose clusters share activations and cut all row groups together into equal ranges."""

    @property
    def arranged(self) -> bool:
        return True

    def cluster(self, tile: Tile) -> tuple[int, int]:
        return tile.cluster, 1

    def shared_bytes(self, tile: Tile, m: int, depth: int) -> int:
        stages, slots = self._x_stages(tile), tile.warps_row * tile.stages
        buffers = whole_lines(stages * self._stage_bytes(tile) + 8 * (2 * stages + slots))
        return buffers + (stream_bytes(tile, depth) if depth else slots * _SLOT_BYTES)

    def _stage_bytes(self, tile: Tile) -> int:
        """Of a buffer of activations."""
        subtiles = (1 if tile.n_tiles >= 8 else 2) if self._unstructured else max(1, min(4, 16 // tile.n_tiles))
        return subtiles * tile.n_tiles * 1024

    def _x_stages(self, tile: Tile) -> int:
        """Buffers of activations: what the slots of weights leave free, on the GPUs that have wgmma."""
        if self._unstructured:
            return 4
        free = (_HOPPER_SHARED + 1024) // tile.min_blocks - 2048 - tile.warps_row * tile.stages * _SLOT_BYTES
        return max(2, min(8, free // self._stage_bytes(tile)))

    def more_macros(self, tile: Tile) -> dict[str, int]:
        return {"CLUSTER": tile.cluster, "X_STAGES": self._x_stages(tile)}

    def grid(self, tile: Tile, rows: int, units: int, shared: int, here: Gpu) -> tuple[int, int]:
        groups = -(-rows // (tile.block_rows * tile.cluster))
        fitting = here.processors * blocks_at_once(tile, shared, here) // tile.cluster
        return min(groups * tile.splits or fitting, groups * units) * tile.cluster, 1


def stream_bytes(tile: Tile, depth: int) -> int:
    """The expansion table, barriers and slots of every warp: a pair that keeps nothing reads one word before or behind a unit's."""
    slots = tile.warps_row * tile.warps_k * tile.stages
    slot = 96 + 32 + 512 // tile.parts + 128 * (depth + 1)
    return 512 * 8 * tile.table_copies + whole_lines(8 * slots) + slots * slot


def fragment_bytes(tile: Tile) -> int:
    """Barriers and slots of every warp of nm_slots.cuh: a unit's positions, and the values of one of its parts."""
    slots = tile.warps_row * tile.warps_k * tile.stages
    return whole_lines(8 * slots) + slots * (_SLOT_BYTES // 9 + 8 * (_SLOT_BYTES // 9) // tile.parts)


def whole_lines(nbytes: int) -> int:
    """``nbytes`` rounded up to lines of 128."""
    return -(-nbytes // 128) * 128


def fit(source: Source, tile: Tile, m: int, depth: int, here: Gpu) -> Tile:
    """``tile`` with as many warps and slots as its shared memory allows, and without splits where there are no clusters.

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
        elif isinstance(source, WarpgroupSource) and tile.stages > 2:
            # Units deeper than what the buffers of activations were made for.
            tile = replace(tile, stages=tile.stages - 1)
        else:
            raise KernelUnavailableError(f"{m} rows need {needed} bytes of shared memory a block, and this GPU has {here.shared_limit}")
    return tile


def macros_of(source: Source, tile: Tile, element: torch.dtype) -> tuple[tuple[str, int], ...]:
    """What the source is compiled with."""
    found = {**dict(source.macros), **tile.macros(), **source.more_macros(tile), "ELEM_BF16": int(element is torch.bfloat16)}
    return tuple(sorted(found.items()))


def arrange_macros(source: WarpgroupSource, tile: Tile) -> tuple[tuple[str, int], ...]:
    """What arrange.cu is compiled with for a kernel; it moves 16-bit elements of either type."""
    return (("ELEM_BF16", 1), ("EXPANDED", int(source.expanded)), ("N_TILES", tile.n_tiles))
