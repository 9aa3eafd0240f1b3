"""Which source and tile a CUDA decode kernel runs with: the tuned one where this GPU's table has the shape, else a rule.

A configuration, as tuning tables hold it, is the source's file and the tile's fields.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, replace
from functools import cache

import torch

from sparse_engine import tuning
from sparse_engine.backends.cuda_sources import (
    AT_ONCE,
    MAX_ROWS,
    TYPICAL_DEPTH,
    UNIT,
    Gpu,
    Source,
    StreamedSource,
    StreamSource,
    Tile,
    WarpgroupSource,
    arrange_macros,
    blocks_at_once,
    fit,
    gpu,
    macros_of,
)
from sparse_engine.errors import KernelUnavailableError
from sparse_engine.registry import Config, Problem

__all__ = ["TYPICAL_DEPTH", "choose", "compilations", "configs", "estimate_us", "parse", "sources", "unstructured_parts"]

MMA_24 = Source("decode_nm.cu", "decode_nm", (("PATTERN", 24),), x_pad=16)
MMA_48 = Source("decode_nm.cu", "decode_nm", (("PATTERN", 48),), x_pad=64)
MMA_UNSTRUCTURED = StreamSource("decode_unstructured.cu", "decode_unstructured", x_pad=64)
WGMMA_24 = WarpgroupSource("decode_wgmma.cu", "decode_wgmma", (("PATTERN", 24),))
WGMMA_48 = WarpgroupSource("decode_wgmma.cu", "decode_wgmma", (("PATTERN", 48),), expanded=True)
STREAMED_24 = StreamedSource("decode_stream.cu", "decode_stream", (("PATTERN", 24),))
STREAMED_48 = StreamedSource("decode_stream.cu", "decode_stream", (("PATTERN", 48),), expanded=True)
STREAMED_UNSTRUCTURED = StreamedSource("decode_stream.cu", "decode_stream", (("PATTERN", 0),), expanded=True)
WGMMA_UNSTRUCTURED = WarpgroupSource("decode_wgmma.cu", "decode_wgmma", (("PATTERN", 0),), expanded=True)
_SOURCES: dict[str, tuple[Source, ...]] = {
    "2:4": (MMA_24, WGMMA_24, STREAMED_24),
    "4:8": (MMA_48, WGMMA_48, STREAMED_48),
    "unstructured": (MMA_UNSTRUCTURED, WGMMA_UNSTRUCTURED, STREAMED_UNSTRUCTURED),
}


def sources(pattern: str, here: Gpu) -> list[Source]:
    """The kernels for "2:4", "4:8" or "unstructured" that this GPU can run."""
    return [source for source in _SOURCES[pattern] if here.arch == "sm_90a" or not isinstance(source, WarpgroupSource)]


def unstructured_parts(columns: int) -> int:
    """Units of 256 / parts columns: small ones where a row is short, so that enough warps share it. Fixed in the layout."""
    return 1 if columns > 1024 else 2


# (row_tiles, warps_row, warps_k, parts, splits), the likely ones first, should a tuning run be short of time.
_FEW_ROWS = {
    "2:4": [
        *((1, 1, 8, 1, 1), (1, 1, 3, 1, 1), (1, 1, 4, 1, 1), (1, 1, 6, 2, 1), (1, 1, 8, 2, 1), (1, 1, 12, 1, 1), (1, 1, 16, 2, 1)),
        (1, 2, 4, 1, 1),
    ],
    "4:8": [
        *((1, 1, 8, 1, 1), (1, 1, 16, 2, 1), (1, 1, 8, 2, 1), (1, 1, 4, 1, 1), (1, 1, 12, 2, 1), (1, 1, 3, 1, 1), (1, 2, 4, 1, 1)),
        *((1, 1, 12, 4, 1), (1, 1, 6, 2, 1), (1, 1, 16, 2, 2), (1, 1, 4, 1, 2)),
    ],
    "unstructured": [
        *((1, 1, 8, 1, 1), (1, 1, 4, 1, 1), (1, 2, 4, 1, 1), (1, 1, 12, 1, 1), (1, 1, 6, 1, 1), (1, 4, 2, 1, 1), (1, 1, 3, 1, 1)),
        *((1, 1, 16, 1, 1), (1, 2, 8, 1, 1)),
    ],
}
_MORE_ROWS = {
    "2:4": [
        *((1, 1, 16, 2, 1), (1, 1, 8, 1, 1), (1, 2, 4, 1, 1), (1, 4, 4, 1, 1), (1, 4, 4, 1, 2), (2, 2, 4, 1, 1), (2, 2, 4, 1, 4)),
        *((2, 4, 4, 1, 1), (1, 1, 3, 1, 1), (1, 1, 12, 4, 1), (1, 1, 12, 2, 1), (1, 2, 6, 2, 1)),
    ],
    "4:8": [
        *((1, 1, 16, 2, 1), (1, 4, 4, 1, 1), (1, 1, 8, 2, 1), (1, 2, 6, 2, 1), (1, 4, 4, 2, 1), (1, 2, 4, 1, 1), (1, 4, 4, 1, 2)),
        *((2, 4, 2, 1, 1), (2, 4, 2, 1, 2), (1, 1, 12, 4, 1), (1, 4, 4, 1, 4)),
    ],
    "unstructured": [
        *((1, 1, 8, 1, 1), (1, 2, 4, 1, 1), (1, 1, 4, 1, 1), (1, 4, 2, 1, 1), (1, 1, 6, 1, 1), (1, 2, 6, 1, 1), (1, 1, 16, 1, 1)),
        *((1, 4, 4, 1, 1), (1, 4, 4, 1, 2)),
    ],
}
_WARPGROUPS = {
    "nm": ((4, 1, 4, 2), (8, 1, 2, 1), (12, 1, 2, 1), (4, 2, 3, 1), (4, 1, 8, 1)),
    "unstructured": ((4, 2, 2, 1), (4, 1, 3, 1), (8, 1, 2, 1), (4, 1, 2, 2), (12, 1, 2, 1)),
}
"""(warps_row, warps_k, slots, blocks on a multiprocessor). Sixteen warps would leave too few registers for 64 activation rows."""
_STREAMED = {
    "nm": ((8, 3, 1, 1), (12, 2, 1, 1), (12, 3, 1, 1), (4, 3, 2, 1), (8, 3, 1, 2), (12, 2, 1, 2)),
    "unstructured": ((8, 2, 1, 1), (12, 2, 1, 1)),
}
"""(warps_row, slots, blocks on a multiprocessor, cluster)"""
_LARGE = 1 << 25
"""Weights of fewer elements are faster with whole row groups or halves of them for each block."""
_SMALL, _TINY = 1 << 24, 1 << 22
"""Weights of more elements are faster through wgmma, whatever the tile: beyond ``_SMALL`` from 32 activation rows on, beyond ``_TINY``
from more."""


def _tile(source: Source, n_tiles: int, shape: tuple[int, int, int, int, int]) -> Tile:
    """A tile of (row_tiles, warps_row, warps_k, parts, splits) with as many blocks as the registers it needs allow; 0 if it must spill."""
    row_tiles, warps_row, warps_k, parts, splits = shape
    blocks, copies = _by_registers(source, n_tiles, shape), 16
    if source is MMA_UNSTRUCTURED:
        # Every block of a multiprocessor has a table, which is filled before its first product. Eight warps of long units keep the
        # memory busy, and with more copies of the table they wait less for it.
        copies = 8 if n_tiles == 1 else 4
        if n_tiles == 1:
            blocks = min(blocks, max(1, (8 if parts == 1 else 20) // (warps_row * warps_k)))
    return Tile(n_tiles, row_tiles, warps_row, warps_k, parts, splits, 2, blocks, copies)


def _by_registers(source: Source, n_tiles: int, shape: tuple[int, int, int, int, int]) -> int:
    """Blocks on a multiprocessor that the registers of a tile allow."""
    row_tiles, warps_row, warps_k, parts, _ = shape
    held = row_tiles * n_tiles
    if source is MMA_UNSTRUCTURED:
        registers = 112 if n_tiles == 1 else 128 if n_tiles <= 4 else 168
    elif held == 1:
        registers = {1: 80, 2: 64, 4: 56}[parts]
    else:
        registers = 104 if held == 2 else 128 if held <= 4 else 168 if held <= 8 else 255
    return 65536 // (32 * registers) // (warps_row * warps_k)


def _warpgroup_tiles(source: WarpgroupSource, rows: int, columns: int, m: int, here: Gpu) -> list[Tile]:
    """Tiles whose blocks run at once, with the most splits that do and the next fewer: first those that come near one block for each
    multiprocessor, each followed by the one whose blocks share activations in pairs, if there is one."""
    n_tiles = _warpgroup_columns(m)
    unstructured = source is WGMMA_UNSTRUCTURED
    parts = unstructured_parts(columns) if unstructured else 1
    depth = -(-TYPICAL_DEPTH // parts) if unstructured else 0
    found: list[tuple[float, Tile]] = []
    for warps_row, warps_k, slots, blocks in _WARPGROUPS["unstructured" if unstructured else "nm"]:
        tile = Tile(n_tiles, 1, warps_row, warps_k, parts, 1, slots, blocks, 4 if unstructured else 16)
        if (shared := source.shared_bytes(tile, m, depth)) > here.shared_limit:
            continue
        room = here.processors * blocks_at_once(tile, shared, here)
        groups = -(-rows // tile.block_rows)
        units = -(-columns * parts // UNIT)
        fitting = [s for s, part in AT_ONCE.items() if groups * s <= part * room and warps_k * s <= units]
        cuts = fitting[:-3:-1] or [1]
        found += [(abs(math.log(groups * splits / here.processors)), replace(tile, splits=splits)) for splits in cuts]
    plain = [tile for _, tile in sorted(found, key=lambda each: each[0])]
    return [each for tile in plain for each in (tile, *_in_pairs(source, tile, rows, m, here))]


def _in_pairs(source: WarpgroupSource, tile: Tile, rows: int, m: int, here: Gpu) -> list[Tile]:
    """``tile`` in clusters of two row groups that share activations, where those are much of the traffic and all blocks run at once."""
    size = 2 * tile.splits
    if source.arranged or m <= 16 or size not in AT_ONCE:
        return []
    paired = replace(tile, cluster=2)
    room = here.processors * blocks_at_once(paired, source.shared_bytes(paired, m, 0), here)
    blocks = -(-rows // (2 * tile.block_rows)) * size
    return [paired] if blocks <= AT_ONCE[size] * room else []


def _streamed_tiles(source: StreamedSource, rows: int, columns: int, m: int, here: Gpu) -> list[Tile]:
    """Tiles for as many clusters as fit the GPU, or for one or a few for each row group where nearly as many result."""
    n_tiles = _warpgroup_columns(m)
    unstructured = source is STREAMED_UNSTRUCTURED
    parts = unstructured_parts(columns) if unstructured else 1
    found = []
    for warps_row, slots, blocks, cluster in _STREAMED["unstructured" if unstructured else "nm"]:
        groups, fitting = -(-rows // (16 * warps_row * cluster)), here.processors * blocks // cluster
        splits = fitting // groups
        whole = 1 <= splits <= -(-columns * parts // UNIT) and splits * groups > 0.9 * fitting
        found.append(Tile(n_tiles, 1, warps_row, 1, parts, splits if whole else 0, slots, blocks, 4 if unstructured else 16, cluster))
    return found


def _warpgroup_columns(m: int) -> int:
    """N-tiles of the narrowest wgmma form that holds m activation rows."""
    return next(n for n in (1, 2, 4, 8, 16) if m <= 8 * n)


def _tiles(pattern: str, rows: int, columns: int, m: int, here: Gpu) -> Iterator[tuple[Source, Tile]]:
    """Sources and tiles worth measuring, the likely ones first."""
    many = (m >= 16 and rows * columns > _SMALL) or (m >= 32 and rows * columns > _TINY)
    many = many or (pattern == "unstructured" and m > 4 and rows * columns >= _LARGE)
    for source in sources(pattern, here)[:: -1 if many else 1]:
        if isinstance(source, StreamedSource):
            if m > 4 and rows * columns >= _LARGE:
                yield from ((source, tile) for tile in _streamed_tiles(source, rows, columns, m, here))
            continue
        if isinstance(source, WarpgroupSource):
            # For few rows the copy of x that it needs costs more than it brings.
            if m > 16 or (m > 4 and rows * columns >= _LARGE):
                yield from ((source, tile) for tile in _warpgroup_tiles(source, rows, columns, m, here))
            continue
        if here.arch == "sm_90a" and m >= 32 and rows * columns > (_SMALL if m == 32 else _TINY):
            continue
        shapes = _FEW_ROWS[pattern] if m <= 4 else _MORE_ROWS[pattern]
        for row_tiles, warps_row, warps_k, parts, splits in shapes:
            if source is MMA_UNSTRUCTURED:
                parts = unstructured_parts(columns)
            unit, across = (UNIT // parts, warps_k) if source is MMA_UNSTRUCTURED else (UNIT, warps_k // parts)
            # More warps than units along the columns would idle.
            if across * splits > max(-(-columns // unit), across if across <= 3 else 1):
                continue
            tile = _tile(source, -(-min(m, source.max_rows) // 8), (row_tiles, warps_row, warps_k, parts, splits))
            if tile.min_blocks > 0:
                yield source, tile


def configs(pattern: str, problem: Problem, here: Gpu) -> list[Config]:
    """What tuning measures for ``problem``, as many rows at a time as the source takes."""
    found: dict[Config, None] = {}
    for source, tile in _tiles(pattern, problem.out_features, problem.in_features, min(problem.rows, 128), here):
        depth = -(-TYPICAL_DEPTH // tile.parts) if source in _SOURCES["unstructured"] else 0
        try:
            fitted = fit(source, tile, min(problem.rows, source.max_rows), depth, here)
        except KernelUnavailableError:
            continue
        found[(source.file, *astuple(fitted))] = None
    return list(found)


def parse(pattern: str, config: Config) -> tuple[Source, Tile] | None:
    """Source and tile of a configuration, or None where a table of another version holds something else."""
    file, *fields = config or ("",)
    # Tables of older versions lack the last field.
    known = len(Tile.__dataclass_fields__) - len(fields) in (0, 1)
    for source in _SOURCES[pattern]:
        if source.file == file and known and all(isinstance(f, int) for f in fields):
            return source, Tile(*fields)  # type: ignore[arg-type]
    return None


def compilations(pattern: str, problem: Problem, config: Config, here: Gpu) -> tuple[tuple[str, str, tuple[tuple[str, int], ...]], ...]:
    """What NVRTC has to compile for a configuration."""
    if (chosen := parse(pattern, config)) is None:
        return ()
    source, tile = chosen
    own = (source.file, here.arch, macros_of(source, tile, problem.dtype))
    if isinstance(source, WarpgroupSource) and source.arranged:
        return own, ("arrange.cu", here.arch, arrange_macros(source, tile))
    return (own,)


def _rule(pattern: str, rows: int, columns: int, m: int, here: Gpu) -> tuple[Source, Tile]:
    """Source and tile for a shape that no table has.

    Few row tiles leave multiprocessors idle, so more warps share the columns of each; from 9 activation rows on, x is a
    sizable part of the traffic, so more row tiles share a block.
    """
    source = sources(pattern, here)[1 if m > 16 and here.arch == "sm_90a" else 0]
    count = min(m, source.max_rows)
    tiles = -(-rows // 16)
    parts = unstructured_parts(columns) if pattern == "unstructured" else 1
    units = -(-columns * parts // UNIT)
    if isinstance(source, WarpgroupSource):
        return source, _warpgroup_tiles(source, rows, columns, count, here)[0]
    n_tiles = -(-count // 8)
    crowded = tiles > 2.5 * here.processors
    splits = 1
    if m <= 8:
        if pattern == "unstructured":
            warps = 4 if tiles > 1.5 * here.processors else 8
        elif not crowded and units >= 8:
            return source, _tile(source, n_tiles, (1, 1, 16, 2, 1))
        else:
            warps = 4 if crowded and units < 12 and pattern == "4:8" else 8
        return source, _tile(source, n_tiles, (1, 1, min(warps, units), parts, 1))
    if n_tiles <= 2 or pattern == "unstructured":
        warps_row = 1 if tiles <= 0.75 * here.processors else 2 if units <= 12 else 4
        splits = 2 if warps_row == 4 and not crowded else 1
        return source, _tile(source, n_tiles, (1, warps_row, min(8 if warps_row == 1 else 4, units), parts, splits))
    while splits < 8 and tiles / 8 * splits < 0.9 * here.processors and units >= 4 * splits:
        splits *= 2
    return source, _tile(source, n_tiles, (2, 4, 2, 1, splits))


@cache
def choose(kernel: str, pattern: str, dtype: torch.dtype, rows: int, columns: int, m: int, here: Gpu) -> tuple[Source, Tile]:
    """Source and tile for m activation rows of a (rows, columns) weight with ``pattern`` "2:4", "4:8" or "unstructured"."""
    measured = tuning.lookup(here.name, pattern, dtype, (rows, columns), min(m, 128)).get(kernel)
    if measured is not None and (chosen := parse(pattern, measured.config)) is not None:
        source, tile = chosen
        if source in sources(pattern, here) and min(m, source.max_rows) <= 8 * tile.n_tiles:
            return source, _within_registers(source, tile)
    return _rule(pattern, rows, columns, m if here.arch == "sm_90a" else min(m, MAX_ROWS), here)


def _within_registers(source: Source, tile: Tile) -> Tile:
    """``tile`` with no more blocks than this version's kernel has registers for, whichever version the table was measured with."""
    if source is not MMA_UNSTRUCTURED:
        return tile
    allowed = _by_registers(source, tile.n_tiles, (1, tile.warps_row, tile.warps_k, tile.parts, tile.splits))
    return replace(tile, min_blocks=max(min(tile.min_blocks, allowed), 1))


def estimate_us(problem: Problem, nbytes: float) -> float:
    """Estimated time of ``problem`` where none was measured: a launch and reading ``nbytes`` for each slab of rows.

    The speed is an H200's, which the kernels on mma.sync reach for few rows; every further 64 rows read the weights again.
    """
    return -(-problem.rows // MAX_ROWS) * (2.0 + nbytes / 4.0e6)


def current_gpu() -> Gpu:
    return gpu(torch.cuda.current_device())
