"""2:4 weights through sparse wgmma (csrc/cuda/prefill_nm.cu), in the decode kernels' layout: for many activation rows on Hopper."""

from __future__ import annotations

from typing import ClassVar

from sparse_engine.backends.cuda_decode import UNIT, Gpu
from sparse_engine.backends.cuda_prefill import register
from sparse_engine.backends.cuda_prefill.wgmma import PrefillSource, PrefillTile, WgmmaForm

__all__ = ["PREFILL_24", "SparseWgmmaForm"]

PREFILL_24 = PrefillSource("prefill_nm.cu", "prefill_nm")


class SparseWgmmaForm(WgmmaForm):
    name: ClassVar[str] = "wgmma-sparse"
    patterns: ClassVar[frozenset[str]] = frozenset({"2:4"})
    source: ClassVar[PrefillSource] = PREFILL_24
    tiles: ClassVar[tuple[PrefillTile, ...]] = (
        PrefillTile(32, 1, 2, 5, 2),
        PrefillTile(32, 1, 2, 6, 2),
        PrefillTile(32, 1, 2, 5, 1),
        PrefillTile(24, 1, 3, 6, 2),
        PrefillTile(16, 2, 2, 6, 1),
        PrefillTile(32, 1, 2, 6, 1, splits=2),
        PrefillTile(32, 1, 2, 6, 1, splits=3),
        PrefillTile(32, 1, 2, 6, 1, splits=4),
        PrefillTile(16, 2, 2, 5, 1, splits=3),
        PrefillTile(16, 1, 2, 6, 2),
        PrefillTile(16, 1, 2, 6, 1, splits=2),
        PrefillTile(16, 1, 2, 6, 1, splits=4),
        PrefillTile(8, 1, 2, 6, 1),
        PrefillTile(8, 1, 2, 6, 1, splits=2),
        PrefillTile(8, 1, 2, 6, 1, splits=4),
        PrefillTile(8, 1, 2, 4, 1, min_blocks=2),
        PrefillTile(32, 1, 2, 5, 2, splits=0),
        PrefillTile(24, 1, 2, 6, 2, splits=0),
        PrefillTile(16, 1, 2, 6, 1, splits=0),
    )

    def clocks(self, tile: PrefillTile, rows: int, columns: int, m: int, here: Gpu) -> float:
        """Fitted to measurements on an H100: a product of m64 takes half a clock for each activation row and about as much for its weights
        as for 120 of them, unless the L2 cache is slower, which gives a multiprocessor some 43 bytes in a clock.
        """
        # Where a warpgroup has few sums, it waits more for the operands of the next product.
        product = tile.tokens / 2 + (85 if tile.m_blocks == 1 and tile.tokens <= 128 else 60)
        step = max(product * (tile.rows // 64), (tile.tokens * 64 / tile.cluster + tile.rows * 36) / 43)
        store = 700.0 if tile.splits == 1 else tile.rows * tile.tokens / 12 * 2.5
        beside = tile.beside(rows, m, here)
        return tile.clocks(rows, m, here, -(-columns // UNIT) * (UNIT // 32) * step * beside, store * beside + 1500)


register(SparseWgmmaForm())
