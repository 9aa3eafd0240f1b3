"""4:8 and unstructured weights and many activation rows on Hopper: expanded in registers into dense wgmma, no dense copy in memory.

The kernels are csrc/cuda/prefill_48.cu and prefill_unstructured.cu.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparse_engine.backends.cuda_decode import UNIT, Gpu, gpu
from sparse_engine.backends.cuda_prefill import Call, Compilations, register
from sparse_engine.backends.cuda_prefill.wgmma import PrefillSource, PrefillTile, WgmmaForm, run_prefill
from sparse_engine.backends.cuda_tiles import TYPICAL_DEPTH
from sparse_engine.registry import Config

__all__ = ["NMForm", "UnstructuredForm", "fitted"]

_SLOTS, _BATCH = 2, 2


@dataclass(frozen=True, slots=True)
class UnitSource(PrefillSource):
    """Every consumer warp has slots for units of its row tile, behind the frame's shared memory."""

    join_units: ClassVar[float] = 0.8

    def stores(self, tile: PrefillTile) -> int:
        return 2

    def all_macros(self, tile: PrefillTile, element: torch.dtype) -> tuple[tuple[str, int], ...]:
        found = dict(PrefillSource.all_macros(self, tile, element))
        return tuple(sorted({**found, "SLOTS": _SLOTS, "BATCH": _BATCH}.items()))

    def unit_bytes(self, depth: int) -> int:
        """Of a slot."""
        return 9 * 512

    def table_bytes(self, tile: PrefillTile) -> int:
        return 0

    def shared_bytes(self, tile: PrefillTile, depth: int = 0) -> int:
        slots = 4 * tile.consumers * _SLOTS
        frame = PrefillSource.shared_bytes(self, replace(tile, splits=1))
        units = -(-frame // 128) * 128 + self.table_bytes(tile) + -(-8 * slots // 128) * 128 + slots * self.unit_bytes(depth)
        return max(units, PrefillSource.shared_bytes(self, tile))


@dataclass(frozen=True, slots=True)
class StreamSource(UnitSource):
    """Units of an unstructured weight differ in size and need a table; see csrc/cuda/paired.cuh."""

    parts: int = 1

    def copies(self, tile: PrefillTile) -> int:
        """Of the table: fewer make place for one more buffer of the widest tile."""
        return 2 if tile.tokens * tile.stages > 640 else 4

    def all_macros(self, tile: PrefillTile, element: torch.dtype) -> tuple[tuple[str, int], ...]:
        return tuple(sorted({**dict(UnitSource.all_macros(self, tile, element)), "TABLE_COPIES": self.copies(tile)}.items()))

    def unit_bytes(self, depth: int) -> int:
        return 96 + 32 + 512 // self.parts + 128 * (depth + 1)

    def table_bytes(self, tile: PrefillTile) -> int:
        return 512 * 8 * self.copies(tile)


class ExpandedForm(WgmmaForm):
    """Tensor cores are not twice as fast on these weights.

    Attributes:
        slowness: of a step, in the time of its products, as measured on an H200: what expanding and shared memory add.
    """

    needs_measuring: ClassVar[bool] = True
    slowness: ClassVar[float]

    def clocks(self, tile: PrefillTile, rows: int, columns: int, m: int, here: Gpu) -> float:
        step = self.slowness * max(tile.tokens * tile.rows / 64, 256.0)
        store = tile.rows * tile.tokens / 12 * (1.0 if tile.splits == 1 else 2.5)
        return tile.clocks(rows, m, here, -(-columns // UNIT) * 8 * step, store + 1500)


class NMForm(ExpandedForm):
    name: ClassVar[str] = "wgmma-4:8"
    patterns: ClassVar[frozenset[str]] = frozenset({"4:8"})
    slowness: ClassVar[float] = 1.15
    source: ClassVar[PrefillSource] = UnitSource("prefill_48.cu", "prefill_48")
    tiles: ClassVar[tuple[PrefillTile, ...]] = (
        PrefillTile(32, 1, 2, 4, 2),
        PrefillTile(32, 1, 2, 4, 1),
        PrefillTile(24, 1, 2, 5, 2),
        PrefillTile(16, 1, 2, 6, 2),
        PrefillTile(16, 1, 2, 6, 1),
        PrefillTile(32, 1, 2, 4, 1, 2),
        PrefillTile(16, 1, 2, 6, 1, 2),
        PrefillTile(8, 1, 2, 6, 1, 2),
        PrefillTile(32, 1, 2, 4, 2, 0),
        PrefillTile(16, 1, 2, 6, 1, 0),
    )


def _streams(parts: int) -> StreamSource:
    return StreamSource("prefill_unstructured.cu", "prefill_unstructured", (("PARTS", parts),), parts)


class UnstructuredForm(ExpandedForm):
    name: ClassVar[str] = "wgmma-unstructured"
    patterns: ClassVar[frozenset[str]] = frozenset({"unstructured"})
    slowness: ClassVar[float] = 1.45
    source: ClassVar[PrefillSource] = _streams(1)
    sources: ClassVar[dict[int, StreamSource]] = {parts: _streams(parts) for parts in (1, 2)}
    tiles: ClassVar[tuple[PrefillTile, ...]] = (
        PrefillTile(32, 1, 2, 3, 1),
        PrefillTile(32, 1, 2, 2, 1),
        PrefillTile(24, 1, 2, 3, 1),
        PrefillTile(16, 1, 2, 4, 1),
        PrefillTile(16, 1, 2, 4, 2),
        PrefillTile(32, 1, 2, 2, 1, 2),
        PrefillTile(16, 1, 2, 4, 1, 2),
        PrefillTile(8, 1, 2, 6, 1, 2),
        PrefillTile(32, 1, 2, 2, 1, 0),
        PrefillTile(16, 1, 2, 4, 1, 0),
    )

    def configs(self, pattern: str, rows: int, columns: int, m: int, here: Gpu) -> Sequence[Config]:
        found = super().configs(pattern, rows, columns, m, here)
        return [config for config in found if self.source.fits(self.tile_of(config), here, TYPICAL_DEPTH)]

    def compilations(self, pattern: str, dtype: torch.dtype, config: Config, here: Gpu) -> Compilations:
        tile = self.tile_of(config)
        return [(source.file, here.arch, source.all_macros(tile, dtype)) for source in self.sources.values()]

    def run(self, call: Call, config: Config) -> Tensor:
        assert call.streams is not None
        source, here = self.sources[call.streams.parts], gpu(call.x.device.index)
        return run_prefill(source, fitted(source, self.tile_of(config), call.streams.depth, here), call)


def fitted(source: StreamSource, tile: PrefillTile, depth: int, here: Gpu) -> PrefillTile:
    """``tile`` with fewer buffers, or narrower, where units of ``depth`` words ask for it: those of a dense block are the deepest."""
    while not source.fits(tile, here, depth) and tile.stages > 2:
        tile = replace(tile, stages=tile.stages - 1)
    return tile if source.fits(tile, here, depth) else replace(tile, n_tiles=min(tile.n_tiles, 16))


register(NMForm())
register(UnstructuredForm())
