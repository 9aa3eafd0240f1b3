"""2:4 and many activation rows on Ampere and newer: csrc/cuda/prefill_mma.cu, sparse tensor-core products behind asynchronous copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_engine import cuda
from sparse_engine.backends.cuda_decode import UNIT, Gpu, gpu, kernel_params
from sparse_engine.backends.cuda_prefill import TENSOR_FLOPS_PER_US, Call, Compilations, Form, register
from sparse_engine.errors import KernelUnavailableError
from sparse_engine.registry import Config

__all__ = ["MmaForm", "MmaTile"]


@dataclass(frozen=True, slots=True)
class MmaTile:
    """Macros of prefill_mma.cu: tiles of 16 weight rows and of 8 activation rows held by a warp, warps of a block, stages."""

    row_tiles: int
    n_tiles: int
    warps_row: int
    warps_n: int
    stages: int
    min_blocks: int

    @property
    def block_rows(self) -> int:
        return 16 * self.row_tiles * self.warps_row

    @property
    def block_tokens(self) -> int:
        return 8 * self.n_tiles * self.warps_n

    @property
    def shared_bytes(self) -> int:
        """A stage holds 64 columns: of x, of the values, and a word of positions for each lane."""
        return self.stages * (self.block_tokens * 128 + self.block_rows // 16 * (1024 + 128))

    def macros(self, element: torch.dtype) -> tuple[tuple[str, int], ...]:
        names = ("ROW_TILES", "N_TILES", "WARPS_ROW", "WARPS_N", "STAGES", "MIN_BLOCKS")
        return tuple(sorted({**dict(zip(names, astuple(self), strict=True)), "ELEM_BF16": int(element is torch.bfloat16)}.items()))


_TILES = (
    MmaTile(4, 8, 2, 2, 3, 2),  # 128 x 128
    MmaTile(4, 8, 2, 4, 3, 1),  # 128 x 256, least traffic
    MmaTile(4, 8, 2, 2, 4, 1),  # 128 x 128 with more on its way, one block
    MmaTile(2, 8, 2, 2, 4, 2),  # 64 x 128
    MmaTile(2, 4, 2, 2, 4, 3),  # 64 x 64, for few tiles
)


def _able(here: Gpu) -> list[MmaTile]:
    return [tile for tile in _TILES if tile.min_blocks * (tile.shared_bytes + 1024) <= here.shared_limit + 1024]


class MmaForm(Form):
    name: ClassVar[str] = "mma-sparse"
    patterns: ClassVar[frozenset[str]] = frozenset({"2:4"})
    needs_measuring: ClassVar[bool] = True

    def configs(self, pattern: str, rows: int, columns: int, m: int, here: Gpu) -> Sequence[Config]:
        able = _able(here)
        # The largest tiles that still give every multiprocessor a block come first.
        able.sort(key=lambda tile: (_blocks(tile, rows, m) < here.processors, _TILES.index(tile)))
        return [(self.name, *astuple(tile)) for tile in able]

    def understands(self, config: Config) -> bool:
        return _holds_tile(config)

    def compilations(self, pattern: str, dtype: torch.dtype, config: Config, here: Gpu) -> Compilations:
        return [("prefill_mma.cu", here.arch, _tile(config).macros(dtype))]

    def estimate_us(self, pattern: str, rows: int, columns: int, m: int, here: Gpu) -> float:
        # Measured on an H100. Elsewhere it is taken to be as fast as a dense product, which needs no copy of the weight.
        rate = 3.3e8 if here.arch == "sm_90a" else TENSOR_FLOPS_PER_US
        return 4.0 + 2.0 * m * rows * columns / rate

    def run(self, call: Call, config: Config) -> Tensor:
        tile, here = _tile(config), gpu(call.x.device.index)
        x, y = call.aligned(), call.x.new_empty((*call.x.shape[:-1], call.rows))
        if y.numel() == 0:
            return y
        params = kernel_params(x, call.weight, call.bias, call.residual, y, -(-call.columns // UNIT), call.relu)
        function = cuda.load("prefill_mma.cu", "prefill_mma", here.arch, tile.macros(call.x.dtype))
        blocks, threads = _blocks(tile, call.rows, call.m), 32 * tile.warps_row * tile.warps_n
        cuda.launch(function, (blocks, 1), threads, tile.shared_bytes, params, call.x.device.index, overlap=here.hopper)
        return y


def _blocks(tile: MmaTile, rows: int, m: int) -> int:
    return -(-rows // tile.block_rows) * -(-m // tile.block_tokens)


def _holds_tile(config: Config) -> bool:
    return config[1:] in map(astuple, _TILES)


def _tile(config: Config) -> MmaTile:
    if not _holds_tile(config):
        raise KernelUnavailableError(f"{MmaForm.name} has no tile {list(config[1:])}")
    return MmaTile(*config[1:])  # type: ignore[arg-type]


register(MmaForm())
