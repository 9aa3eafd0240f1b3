"""2:4 weights through sparse wgmma (csrc/cuda/prefill_nm.cu), in the decode kernels' layout: for many activation rows on Hopper."""

from __future__ import annotations

from typing import ClassVar

from sparse_engine.backends.cuda_prefill import register
from sparse_engine.backends.cuda_prefill_wgmma import PrefillSource, PrefillTile, WgmmaForm

__all__ = ["PREFILL_24", "SparseWgmmaForm"]

PREFILL_24 = PrefillSource("prefill_nm.cu", "prefill_nm")


class SparseWgmmaForm(WgmmaForm):
    name: ClassVar[str] = "wgmma-sparse"
    patterns: ClassVar[frozenset[str]] = frozenset({"2:4"})
    source: ClassVar[PrefillSource] = PREFILL_24
    tiles: ClassVar[tuple[PrefillTile, ...]] = (
        PrefillTile(24, 2, 2, 4, 1, a_shared=1),
        PrefillTile(24, 2, 2, 4, 2, a_shared=1),
        PrefillTile(24, 1, 3, 4, 2),
        PrefillTile(32, 1, 2, 4, 2),
        PrefillTile(32, 1, 2, 4, 2, a_shared=1),
        PrefillTile(16, 2, 2, 4, 2, batch=2),
        PrefillTile(16, 2, 2, 4, 1, splits=3, batch=2),
        PrefillTile(16, 1, 2, 6, 2),
        PrefillTile(16, 1, 2, 6, 1, splits=3),
        PrefillTile(8, 2, 2, 6, 1),
        PrefillTile(8, 2, 2, 6, 1, splits=2),
        PrefillTile(8, 1, 2, 4, 1, min_blocks=2),
    )


register(SparseWgmmaForm())
