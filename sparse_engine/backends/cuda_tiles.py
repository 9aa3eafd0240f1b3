"""Which tile a CUDA decode kernel uses: measured ones from a table per GPU, else a rule; and the candidates that tuning measures.

Tables are JSON: ``{"gpu": ..., "tiles": {pattern: {"RxC": {"M": [file, tile fields ..., µs]}}}}`` with M the most activation rows
that an entry is for. One for the H200 is installed beside this file; one in the cache folder of :mod:`sparse_engine.cuda` (written by
``bench/tune_decode_gpu.py``) goes before it.
"""

from __future__ import annotations

import json
from dataclasses import astuple
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sparse_engine import cuda
from sparse_engine.backends.cuda_decode import MAX_ROWS, UNIT, Gpu, Source, Tile, fit, gpu
from sparse_engine.errors import KernelUnavailableError
from sparse_engine.registry import Problem

__all__ = ["BUCKETS", "candidates", "choose", "cost_us", "entry_of", "sources", "table_path", "unstructured_parts"]

BUCKETS = (1, 4, 8, 16, 32, 64, 128)
"""Activation rows that are tuned; other numbers use the next larger one."""

MMA_24 = Source("decode_nm.cu", "decode_nm", (("PATTERN", 24),), x_pad=16)
MMA_48 = Source("decode_nm.cu", "decode_nm", (("PATTERN", 48),), x_pad=64)
WGMMA_24 = Source("decode_wgmma_24.cu", "decode_wgmma_24", max_rows=128)
UNSTRUCTURED = Source("decode_unstructured.cu", "decode_unstructured", x_pad=64)
_SOURCES = {"2:4": (MMA_24, WGMMA_24), "4:8": (MMA_48,), "unstructured": (UNSTRUCTURED,)}


def sources(pattern: str, gpu: Gpu) -> list[Source]:
    """The kernels for "2:4", "4:8" or "unstructured" that this GPU can run."""
    return [source for source in _SOURCES[pattern] if source is not WGMMA_24 or gpu.arch == "sm_90a"]


def unstructured_parts(columns: int) -> int:
    """Units of 256 / parts columns: small ones where a row is short, so that enough warps share it. Fixed in the layout."""
    return 1 if columns > 1024 else 2


def _tile(source: Source, n_tiles: int, shape: tuple[int, int, int, int, int]) -> Tile:
    """A tile of (row_tiles, warps_row, warps_k, parts, splits) with as many blocks as the registers it needs allow; 0 if it must spill."""
    row_tiles, warps_row, warps_k, parts, splits = shape
    held = row_tiles * n_tiles
    if source is WGMMA_24:
        return Tile(n_tiles, 1, warps_row, 1, 1, splits, 3 if n_tiles == 16 else 4, 2 if n_tiles == 4 and warps_row <= 8 else 1)
    if source is UNSTRUCTURED:
        registers = {1: 128, 2: 80, 4: 64}[parts] if n_tiles <= 2 else 128 if n_tiles <= 4 else 168
    elif held == 1:
        registers = {1: 80, 2: 64, 4: 56}[parts]
    else:
        registers = 104 if held == 2 else 128 if held <= 4 else 168 if held <= 8 else 255
    blocks = 65536 // (32 * registers) // (warps_row * warps_k)
    return Tile(n_tiles, row_tiles, warps_row, warps_k, parts, splits, 2, blocks)


# (row_tiles, warps_row, warps_k, parts, splits), at most a dozen each.
_FEW_ROWS = {
    "2:4": [
        (1, 1, 3, 1, 1),
        (1, 1, 4, 1, 1),
        (1, 1, 6, 2, 1),
        (1, 1, 8, 1, 1),
        (1, 1, 8, 2, 1),
        (1, 1, 12, 1, 1),
        (1, 1, 16, 2, 1),
        (1, 2, 4, 1, 1),
    ],
    "4:8": [
        *((1, 1, 3, 1, 1), (1, 1, 4, 1, 1), (1, 1, 4, 1, 2), (1, 1, 6, 2, 1), (1, 1, 8, 1, 1), (1, 1, 8, 2, 1), (1, 1, 12, 2, 1)),
        *((1, 1, 12, 4, 1), (1, 1, 16, 2, 1), (1, 1, 16, 2, 2), (1, 2, 4, 1, 1)),
    ],
    "unstructured": [(1, 1, 3, 1, 1), (1, 1, 4, 1, 1), (1, 1, 6, 1, 1), (1, 1, 8, 1, 1), (1, 1, 8, 1, 2), (1, 2, 4, 1, 1), (1, 2, 6, 1, 1)],
}
_MORE_ROWS = {
    "2:4": [
        *((1, 1, 16, 2, 1), (1, 1, 8, 1, 1), (1, 2, 4, 1, 1), (1, 4, 4, 1, 1), (1, 4, 4, 1, 2), (2, 2, 4, 1, 1), (2, 2, 4, 1, 4)),
        *((2, 4, 4, 1, 1), (1, 1, 3, 1, 1), (1, 1, 12, 4, 1), (1, 1, 12, 2, 1), (1, 2, 6, 2, 1)),
    ],
    "4:8": [
        *((1, 1, 16, 2, 1), (1, 1, 8, 2, 1), (1, 2, 4, 1, 1), (1, 4, 4, 2, 1), (1, 4, 4, 1, 1), (1, 4, 4, 1, 2), (2, 4, 2, 1, 1)),
        *((1, 4, 4, 1, 4), (2, 4, 2, 1, 2), (2, 4, 2, 1, 4), (1, 1, 12, 4, 1), (1, 2, 6, 2, 1)),
    ],
    "unstructured": [
        *((1, 1, 8, 1, 1), (1, 2, 4, 1, 1), (1, 2, 6, 1, 1), (1, 2, 4, 1, 2), (1, 4, 2, 1, 1), (1, 4, 2, 1, 4), (1, 4, 4, 1, 1)),
        *((1, 4, 4, 1, 4), (1, 8, 2, 1, 1)),
    ],
}
_WARPGROUPS = [(1, rows, 1, 1, splits) for rows in (8, 12) for splits in (1, 2, 4, 8)]


def candidates(pattern: str, rows: int, columns: int, m: int, gpu: Gpu) -> list[tuple[Source, Tile]]:
    """What tuning measures for ``m`` activation rows; kernels that take fewer rows at a time are measured with all their slabs."""
    found: dict[tuple[Source, Tile], None] = {}
    for source in sources(pattern, gpu):
        count = min(m, source.max_rows)
        if source is WGMMA_24:
            if m <= 8:
                continue
            shapes, n_tiles = _WARPGROUPS, 4 if m <= 32 else 8 if m <= 64 else 16
        else:
            shapes, n_tiles = _FEW_ROWS[pattern] if m <= 4 else _MORE_ROWS[pattern], -(-count // 8)
        for row_tiles, warps_row, warps_k, parts, splits in shapes:
            if source is UNSTRUCTURED:
                parts = unstructured_parts(columns)
            unit = UNIT // parts if source is UNSTRUCTURED else UNIT
            across = warps_k if source is UNSTRUCTURED else warps_k // parts
            if across * splits > max(-(-columns // unit), across if across <= 3 else 1):
                continue
            tile = _tile(source, n_tiles, (row_tiles, warps_row, warps_k, parts, splits))
            if tile.min_blocks == 0:
                continue
            try:
                found[source, fit(source, tile, count, 48 // parts if source is UNSTRUCTURED else 0, gpu)] = None
            except KernelUnavailableError:
                continue
    return list(found)


def _rule(pattern: str, rows: int, columns: int, m: int, gpu: Gpu) -> tuple[Source, Tile]:
    """A tile for a shape that no table has.

    Few row tiles leave multiprocessors idle, so more warps share the columns of each; from 9 activation rows on, x is a
    sizable part of the traffic, so more row tiles share a block.
    """
    source = sources(pattern, gpu)[-1 if m > 16 else 0]
    count = min(m, source.max_rows)
    n_tiles, tiles = -(-count // 8), -(-rows // 16)
    parts = unstructured_parts(columns) if source is UNSTRUCTURED else 1
    units = -(-columns // (UNIT // parts if source is UNSTRUCTURED else UNIT))
    crowded = tiles > 2.5 * gpu.processors
    splits = 1
    if source is WGMMA_24:
        n_tiles = 4 if m <= 32 else 8 if m <= 64 else 16
        blocks, room = -(-rows // 128), gpu.processors * (2 if n_tiles == 4 else 1)
        while splits < 8 and blocks * splits * 2 <= 1.1 * room and units >= 4 * splits:
            splits *= 2
        return source, _tile(source, n_tiles, (1, 8, 1, 1, splits))
    if m <= 8:
        warps = 4 if crowded and pattern != "2:4" else 8 if crowded or units < 12 else 12
        if source is not UNSTRUCTURED and not crowded and units >= 8:
            return source, _tile(source, n_tiles, (1, 1, 16, 2, 1))
        return source, _tile(source, n_tiles, (1, 1, min(warps, units), parts, 1))
    if n_tiles <= 2 or source is UNSTRUCTURED:
        warps_row = 1 if tiles <= 0.75 * gpu.processors else 2 if units <= 12 else 4
        splits = 2 if warps_row == 4 and not crowded else 1
        return source, _tile(source, n_tiles, (1, warps_row, min(8 if warps_row == 1 else 4, units), parts, splits))
    while splits < 8 and tiles / 8 * splits < 0.9 * gpu.processors and units >= 4 * splits:
        splits *= 2
    return source, _tile(source, n_tiles, (2, 4, 2, 1, splits))


def table_path(gpu: Gpu) -> Path:
    """The user's own table for ``gpu``."""
    return cuda.cache_folder() / f"tiles-{_slug(gpu)}.json"


def _slug(gpu: Gpu) -> str:
    return gpu.name.lower().replace(" ", "-")


@cache
def _table(gpu: Gpu) -> dict[str, Any]:
    for path in (table_path(gpu), Path(__file__).with_name(f"cuda_tiles_{_slug(gpu)}.json")):
        if path.is_file():
            tiles: dict[str, Any] = json.loads(path.read_text())["tiles"]
            return tiles
    return {}


def _entry(pattern: str, rows: int, columns: int, m: int, gpu: Gpu) -> list[Any] | None:
    entries = _table(gpu).get(pattern, {}).get(f"{rows}x{columns}", {})
    for bucket in BUCKETS:
        if m <= bucket and str(bucket) in entries:
            found: list[Any] = entries[str(bucket)]
            return found
    return None


def entry_of(source: Source, tile: Tile, us: float) -> list[Any]:
    """A table's entry for a measured choice."""
    return [source.file, *astuple(tile), round(us, 2)]


@cache
def choose(pattern: str, rows: int, columns: int, m: int, gpu: Gpu) -> tuple[Source, Tile]:
    """Kernel and tile for m activation rows of a (rows, columns) weight with ``pattern`` "2:4", "4:8" or "unstructured"."""
    if entry := _entry(pattern, rows, columns, min(m, BUCKETS[-1]), gpu):
        file, *fields, _ = entry
        for source in sources(pattern, gpu):
            tile = Tile(*fields)
            if source.file == file and min(m, source.max_rows) <= 8 * tile.n_tiles:
                # A smaller number of rows than the entry's needs fewer accumulators.
                n_tiles = tile.n_tiles if source is WGMMA_24 else -(-min(m, source.max_rows) // 8)
                return source, Tile(n_tiles, *fields[1:])
    return _rule(pattern, rows, columns, min(m, MAX_ROWS) if gpu.arch != "sm_90a" else m, gpu)


def cost_us(pattern: str, problem: Problem, nbytes: float) -> float:
    """Estimated time of ``problem``: measured where this GPU's table has the shape, else a launch and reading ``nbytes`` a slab of rows."""
    shape, last = (problem.out_features, problem.in_features), BUCKETS[-1]
    slabs = -(-problem.rows // last)
    if torch.cuda.is_available():
        entry = _entry(pattern, *shape, min(problem.rows, last), gpu(torch.cuda.current_device()))
        if entry:
            return slabs * float(entry[-1])
    # The H200's reading speed, which kernels on mma.sync reach for few rows; every 64 rows read the weights again.
    return -(-problem.rows // MAX_ROWS) * (2.0 + nbytes / 4.0e6)
