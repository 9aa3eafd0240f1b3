"""What the kernels over csrc/cuda/prefill_common.cuh share on the host: tiles, the description of the activations, and the launch.

They run on compute capability 9.0 and read the layouts of the decode kernels. A form made of one is a :class:`WgmmaForm`.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from sparse_engine import cuda
from sparse_engine.backends.cuda_decode import UNIT, Gpu, gpu
from sparse_engine.backends.cuda_prefill import Call, Compilations, Form
from sparse_engine.backends.cuda_prefill.shared_tiles import flags, sharers, workspace
from sparse_engine.errors import KernelUnavailableError
from sparse_engine.registry import Config

__all__ = ["CLOCKS_PER_US", "Levels", "PrefillSource", "PrefillTile", "WgmmaForm", "estimated_clocks", "run_prefill", "tile_of"]

_CHUNK_TOKENS = 32
_CHUNK_ROWS = 64
_X_BYTES = 128
"""Of a row of a buffer."""
_CHUNK_BYTES = _CHUNK_TOKENS * 128
_MOST_CHUNKS = 8
_MOST_SUMS = 40
"""Of a thread, in fours, that leave a consumer registers to spare."""
_MOST_SHARED_BYTES = 232448
"""Of a block on Hopper."""
CLOCKS_PER_US = 1.6e3
"""Of an H200 under such load, for estimates."""


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """How one launch divides its work: macros of prefill_common.cuh, and ``batch`` of prefill_nm.cu.

    ``splits`` 0: clusters share the tiles that are left behind whole rounds.
    """

    n_tiles: int
    m_blocks: int
    consumers: int
    stages: int
    cluster: int = 1
    splits: int = 1
    min_blocks: int = 1
    batch: int = 1

    @property
    def rows(self) -> int:
        """Weight rows."""
        return 64 * self.m_blocks * self.consumers

    @property
    def tokens(self) -> int:
        """Activation rows."""
        return 8 * self.n_tiles

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)

    def tiles(self, rows: int, m: int) -> int:
        """Tiles of the clusters of a product, ``splits`` aside."""
        return -(-rows // (self.rows * self.cluster)) * -(-m // self.tokens)

    def clusters(self, here: Gpu) -> int:
        """That are resident at a time."""
        return max(here.processors // (self.cluster * max(self.splits, 1)) * self.min_blocks, 1)

    def beside(self, rows: int, m: int, here: Gpu) -> int:
        """Blocks that a multiprocessor runs at a time."""
        return min(self.min_blocks, -(-self.tiles(rows, m) * self.cluster * max(self.splits, 1) // here.processors))

    def shares(self, rows: int, m: int, here: Gpu) -> bool:
        """Whether clusters share tiles: there are some left behind whole rounds."""
        return self.splits == 0 and self.tiles(rows, m) % self.clusters(here) != 0

    def serves(self, rows: int, columns: int, m: int, here: Gpu) -> bool:
        """Whether the product is not cut into more parts than it has, or into those of another tile."""
        return self.shares(rows, m, here) if self.splits == 0 else self.splits == 1 or self.splits * UNIT <= columns

    def clocks(self, rows: int, m: int, here: Gpu, multiply: float, store: float) -> float:
        """Of a launch whose blocks take ``multiply`` for all columns of a tile and ``store`` behind that."""
        rounds = self.tiles(rows, m) / self.clusters(here)
        return (math.ceil(rounds) if self.splits else rounds) * multiply / max(self.splits, 1) + math.ceil(rounds) * store

    def macros(self) -> dict[str, int]:
        return {
            "N_TILES": self.n_tiles,
            "M_BLOCKS": self.m_blocks,
            "CONSUMERS": self.consumers,
            "STAGES": self.stages,
            "CLUSTER": self.cluster,
            "SPLITS": self.splits,
            "MIN_BLOCKS": self.min_blocks,
            "BATCH": self.batch,
        }


@dataclass(frozen=True, slots=True)
class PrefillSource:
    """A kernel ``function`` of csrc/cuda/``file``, compiled with ``macros`` and a tile's.

    Attributes:
        join_units: units that are multiplied in the time that it takes to join the sums of a tile's other sharers, for each.
    """

    file: str
    function: str
    macros: tuple[tuple[str, int], ...] = ()
    join_units: ClassVar[float] = 2.3

    def stores(self, tile: PrefillTile) -> int:
        """Chunks of sums that a warpgroup may have on their way to y, as many as there is room for; of 2, threads write them."""
        buffers = tile.stages * (tile.tokens * _X_BYTES + self.weight_stage_bytes(tile) + 16)
        left = (_MOST_SHARED_BYTES + 1024) // tile.min_blocks - 1024 - buffers
        return max(2, min(left // (tile.consumers * _CHUNK_BYTES), tile.tokens // _CHUNK_TOKENS * tile.m_blocks, _MOST_CHUNKS))

    def leaving(self, tile: PrefillTile) -> int:
        """Of those chunks, how many leave together: a whole m64 block's where that leaves room for the next, else a divisor of them.

        One by one where the sums leave no registers for more.
        """
        chunks, room = tile.tokens // _CHUNK_TOKENS, self.stores(tile)
        most = chunks if room >= chunks * min(tile.m_blocks, 2) else room // 2
        if tile.m_blocks * tile.n_tiles > _MOST_SUMS:
            return 1
        return next(count for count in range(most, 0, -1) if chunks % count == 0)

    def tensor_stores(self, tile: PrefillTile) -> bool:
        """Whether sums leave by tensor stores."""
        return self.stores(tile) > 2

    def weight_stage_bytes(self, tile: PrefillTile) -> int:
        """Of a buffer: what its weights take."""
        return 0

    def shared_bytes(self, tile: PrefillTile, depth: int = 0) -> int:
        """Shared memory of a block: buffers, a place to transpose sums in, barriers; the sums of splits reuse it.

        ``depth`` is that of an unstructured weight, whose units take some more.
        """
        buffers = tile.stages * (tile.tokens * _X_BYTES + self.weight_stage_bytes(tile))
        staging = tile.consumers * self.stores(tile) * _CHUNK_BYTES
        sums = tile.tokens * (tile.rows + 4) * 4 if tile.splits > 1 else 0
        return max(buffers + staging + 16 * tile.stages, sums)

    def fits(self, tile: PrefillTile, here: Gpu, depth: int = 0) -> bool:
        """Whether ``tile`` has a form and its blocks have the shared memory that they need."""
        share = (here.shared_limit + 1024) // tile.min_blocks - 1024
        return self.shared_bytes(tile, depth) <= share and tile.tokens % (8 * tile.cluster) == 0 and tile.cluster * tile.splits <= 8

    def all_macros(self, tile: PrefillTile, element: torch.dtype) -> tuple[tuple[str, int], ...]:
        """What the source is compiled with."""
        own = {"STORES": self.stores(tile), "LEAVING": self.leaving(tile), "ELEM_BF16": int(element is torch.bfloat16)}
        return tuple(sorted({**dict(self.macros), **tile.macros(), **own}.items()))


class _Params(ctypes.Structure):
    """``Params`` of prefill_common.cuh."""

    _fields_ = (
        ("x", cuda.TensorMap),
        ("y_map", cuda.TensorMap),
        *((name, ctypes.c_void_p) for name in ("weight", "offsets", "bias", "residual", "y", "weight_scales", "x_scales")),
        *((name, ctypes.c_int) for name in ("m", "rows", "units", "relu", "depth", "y_vector")),
        *((name, ctypes.c_void_p) for name in ("y_times", "workspace", "flags")),
        ("sharers", ctypes.c_int),
        # The structure's alignment is that of a tensor map, and so its size a multiple of 64.
        ("padding", ctypes.c_int * 5),
    )


@cache
def _function(source: PrefillSource, arch: str, element: torch.dtype, tile: PrefillTile) -> cuda.CudaFunction:
    return cuda.load(source.file, source.function, arch, source.all_macros(tile, element))


def _grid(tile: PrefillTile, rows: int, m: int, here: Gpu) -> tuple[int, int]:
    """Blocks along tiles (whole clusters that stay for several tiles, or one for each tile where splits add up) and splits."""
    clusters, resident = tile.tiles(rows, m), tile.clusters(here)
    if tile.splits == 1:
        clusters = min(clusters, resident)
    if tile.splits == 0:
        clusters = resident
    return clusters * tile.cluster, max(tile.splits, 1)


@dataclass(frozen=True, slots=True)
class Levels:
    """Quantised activations: ``x`` (m, columns) of 8-bit levels, aligned, and float32 scales of their rows and of the weight's.

    ``y`` (m, rows), and the inverses of its rows' scales, where the product is left as such levels, too, behind a ReLU.
    Scales of activations are as :func:`~sparse_engine.levels.new_levels` makes them.
    """

    x: Tensor
    x_scales: Tensor
    weight_scales: Tensor
    y: Tensor | None = None
    y_times: Tensor | None = None


def run_prefill(source: PrefillSource, tile: PrefillTile, call: Call, levels: Levels | None = None) -> Tensor:
    """The product of ``call`` on the current device; of ``levels`` in the place of its activations where the weight is quantised.

    Raises:
        KernelUnavailableError: there is no such form, or it cannot be compiled or launched.
    """
    x, rows, residual, bias = call.x, call.rows, call.residual, call.bias
    offsets, depth, parts = None, 0, 1
    if call.streams is not None:
        offsets, depth, parts = call.streams.offsets.data_ptr(), call.streams.depth, call.streams.parts
    here, units = gpu(x.device.index), -(-call.columns * parts // UNIT)
    if here.arch != "sm_90a" or not source.fits(tile, here, depth) or tile.splits > units:
        raise KernelUnavailableError(f"{source.function} has no form for {tile} and {call.columns} columns on {here.name}")
    left = levels.y if levels is not None else None
    y = left if left is not None else x.new_empty((*x.shape[:-1], rows))
    if y.numel() == 0:
        return y
    flat = cuda.describable(x.reshape(call.m, call.columns)) if levels is None else levels.x
    stored = (y.data_ptr(), *(t.data_ptr() for t in (residual,) if t is not None))
    y_vector = rows % 8 == 0 and all(at % 16 == 0 for at in stored)
    mapped = (y_vector and source.tensor_stores(tile)) or left is not None
    params = _Params(
        cuda.tensor_map(flat, (tile.tokens // tile.cluster, _X_BYTES // flat.element_size())),
        cuda.tensor_map(y if left is not None else y.view(call.m, rows), (source.leaving(tile) * _CHUNK_TOKENS, _CHUNK_ROWS))
        if mapped
        else cuda.TensorMap(),
        call.weight.data_ptr(),
        offsets,
        bias.data_ptr() if bias is not None else None,
        residual.data_ptr() if residual is not None else None,
        y.data_ptr(),
        levels.weight_scales.data_ptr() if levels is not None else None,
        levels.x_scales.data_ptr() if levels is not None else None,
        call.m,
        rows,
        units,
        int(call.relu),
        depth,
        int(y_vector),
        levels.y_times.data_ptr() if levels is not None and levels.y_times is not None else None,
    )
    function = _function(source, here.arch, x.dtype, tile)
    blocks = _grid(tile, rows, call.m, here)
    if tile.shares(rows, call.m, here):
        room = workspace(blocks[0], tile.rows * tile.tokens, x.device), flags()
        params.workspace, params.flags = (t.data_ptr() for t in room)
        params.sharers = sharers(units, source.join_units)
    cluster = (tile.cluster, blocks[1])
    cuda.launch(function, blocks, tile.threads, source.shared_bytes(tile, depth), params, x.device.index, cluster=cluster, overlap=True)
    return y


def estimated_clocks(tile: PrefillTile, rows: int, columns: int, m: int, here: Gpu, unit: int = UNIT) -> float:
    """Estimated clocks of a launch whose tiles run in whole rounds, the time of each fitted to measurements on an H100.

    A product of m64 takes half a clock for each activation row, some for its weights and more where few m64 blocks share the
    activations; a step, eight of which are ``unit`` columns, has one for each block.
    """
    step = (tile.tokens / 2 + 60 + 55 * tile.tokens / tile.rows) * (tile.rows // 64)
    store = tile.rows * tile.tokens / 12 * (1.0 if tile.splits == 1 else 2.5)
    steps = -(-columns // UNIT) * UNIT * 8 / unit
    beside = tile.beside(rows, m, here)
    return tile.clocks(rows, m, here, steps * step * beside, store * beside + 1500)


def tile_of(config: Config) -> PrefillTile:
    """The tile of a configuration: a name, then the tile's fields.

    Raises:
        KernelUnavailableError: it is of another version.
    """
    if not _holds_tile(config):
        raise KernelUnavailableError(f"{list(config)} is no configuration of a prefill kernel")
    return PrefillTile(*config[1:])  # type: ignore[arg-type]


def _holds_tile(config: Config) -> bool:
    return len(config) == 1 + len(PrefillTile.__dataclass_fields__) and all(isinstance(field, int) for field in config[1:])


class WgmmaForm(Form):
    """A form made of one kernel; a configuration is its name and a tile's fields.

    Attributes:
        source: the kernel.
        tiles: what tuning measures, some twenty at most.
    """

    source: ClassVar[PrefillSource]
    tiles: ClassVar[tuple[PrefillTile, ...]]

    def unsupported(self, here: Gpu) -> str | None:
        return None if here.arch == "sm_90a" else f"runs on compute capability 9.0, not on {here.arch}"

    def clocks(self, tile: PrefillTile, rows: int, columns: int, m: int, here: Gpu) -> float:
        """Estimated clocks of a launch."""
        return estimated_clocks(tile, rows, columns, m, here)

    def configs(self, pattern: str, rows: int, columns: int, m: int, here: Gpu) -> Sequence[Config]:
        able = [tile for tile in self.tiles if self.source.fits(tile, here) and tile.serves(rows, columns, m, here)]
        return [(self.name, *astuple(tile)) for tile in sorted(able, key=lambda tile: self.clocks(tile, rows, columns, m, here))]

    def understands(self, config: Config) -> bool:
        return _holds_tile(config)

    def tile_of(self, config: Config) -> PrefillTile:
        """The tile of a configuration.

        Raises:
            KernelUnavailableError: it is of another version.
        """
        return tile_of(config)

    def compilations(self, pattern: str, dtype: torch.dtype, config: Config, here: Gpu) -> Compilations:
        return ((self.source.file, here.arch, self.source.all_macros(tile_of(config), dtype)),)

    def estimate_us(self, pattern: str, rows: int, columns: int, m: int, here: Gpu) -> float:
        best = tile_of(self.configs(pattern, rows, columns, m, here)[0])
        return 3.0 + self.clocks(best, rows, columns, m, here) / CLOCKS_PER_US

    def run(self, call: Call, config: Config) -> Tensor:
        return run_prefill(self.source, tile_of(config), call)
