"""Which form of csrc/cuda/decode_row_stream.cu runs, if any: what a tuning table says, else rules; and what tuning measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from sparse_engine import tuning
from sparse_engine.backends.cuda_prefill import Call
from sparse_engine.backends.cuda_row_stream import MOST_ROWS, SOURCE, StreamRow, parse_row, row_of, run_rows, serves, x_rows_for
from sparse_engine.backends.cuda_sources import TYPICAL_DEPTH, UNIT, Gpu, gpu
from sparse_engine.backends.cuda_tiles import parse, unstructured_parts
from sparse_engine.registry import Config, Problem

__all__ = ["SMALL_UP_TO", "choose", "compilations", "configs", "product", "run_config", "usual_row"]

SMALL_UP_TO = 1024
"""Width of a model up to which blocks have one row tile: its rows come in units of 128 columns then."""
_RESIDENT_WARPS = 24
"""Warps of a multiprocessor that the kernel for unstructured weights has registers for."""
_FEWEST_WARPS = 4
"""Of a block, with which there is enough on its way from memory."""
_LONG_FROM = 10_240
"""Columns from which a row tile is enough work for the blocks of a cluster to share it."""
_SHORT_UP_TO = 2560
"""Columns of rows whose warps take halves of 256 columns of 2:4 and 4:8 weights."""
_MANY_FROM = 4096
"""Columns from which the kernel is clearly faster for row tiles that are more than multiprocessors, where units have 256 columns.

On an H200, with a LayerNorm inside that the other kernel lacks, qkv and fc1 of 1.3B took 1 % longer, those of 6.7B 1 % and 13B 4 % less;
the products without, whose row tiles are few or columns many, 2 to 46 % less.
"""


def _small_row(rows: int, columns: int, here: Gpu) -> StreamRow:
    """Unstructured weights: blocks of one row tile, with equally many units for each of their warps.

    A step of 125M took 0.149 ms with such tiles, and 0.176 with those of wider models. Its product `out`, whose six units leave half of
    twelve warps idle, takes them all the same: with six warps a step took 0.167 ms, though the product alone is but 7 % slower.
    """
    units = columns * unstructured_parts(columns) // UNIT
    rounds = -(-units // 12)
    warps, slots = -(-units // rounds), min(rounds, 2)
    if _tiles(rows) <= here.processors:
        fields = (12, 2, 8, 1, 4, 1) if rounds == 1 else (warps, slots, 4, 1, 4, 1)
    else:
        # Small blocks, so that all tiles are resident at once.
        fields = (warps, slots, 4, max(min(3, _RESIDENT_WARPS // (warps + 2)), 1), 2, 1)
    return row_of("unstructured", columns, *fields)


def _wide_row(rows: int, columns: int, here: Gpu) -> StreamRow:
    """Unstructured weights: one large block on each multiprocessor.

    Clusters share the tiles of long rows where a block has more than one: a multiprocessor has two or three of the last product of 13B,
    which took 17 % less time so, and one of 6.7B as much; other products took 5 to 56 % longer. With twelve warps instead of eight those
    of 1.3B to 6.7B took up to 8 % longer, with two blocks of six up to 52 %.
    """
    if columns >= _LONG_FROM and _tiles(rows) > here.processors:
        return row_of("unstructured", columns, 12, 2, 8, 1, 4, 2)
    return row_of("unstructured", columns, 8, 2, 8, 1, 4, 1)


def _tiles(rows: int) -> int:
    return -(-rows // 16)


def _balance(rows: int, blocks: int) -> float:
    """The part of the time that ``blocks`` have work, which share row tiles as evenly as these can be; those without any do not count."""
    tiles = _tiles(rows)
    return tiles / (-(-tiles // blocks) * min(blocks, tiles))


def _nm_row(pattern: str, rows: int, columns: int, here: Gpu) -> StreamRow:
    """2:4 and 4:8 weights: blocks of 8 warps that a kernel behind finds room beside, but where larger ones have more even shares.

    By steps of 125M, 1.3B, 2.7B, 6.7B, 13B and 30B on an H200, each within 2 % of what the best form of any one product made of it.
    """
    units, processors = columns // UNIT, here.processors
    if columns <= SMALL_UP_TO:
        return row_of(pattern, columns, 2 * units, 1, 2, 2, 4, 1)
    if rows <= SMALL_UP_TO:
        return row_of(pattern, columns, 12, 2, 2, 1, 4, 1)
    # 4:8 takes its time to be expanded: what has arrived early waits.
    slots = 3 if pattern == "2:4" else 2
    if _tiles(rows) <= processors:
        return row_of(pattern, columns, *((8, 2, 1, 2, 2, 1) if units <= 16 else (8, slots, 1, 1, 4, 1)))
    even = _balance(rows, 2 * processors)
    if columns <= _SHORT_UP_TO:
        return row_of(pattern, columns, *((12, 2, 2, 1, 4, 1) if even < 0.8 else (8, 2, 2, 2, 2, 1)))
    if columns >= _LONG_FROM:
        return row_of(pattern, columns, *((12, 2, 1, 1, 4, 2) if even < 0.9 else (8, 2, 1, 2, 2, 1)))
    if _tiles(rows) <= 3 * processors:
        return row_of(pattern, columns, 8, 2, 1, 1, 4, 1)
    if pattern == "4:8" and units <= 16:
        return row_of(pattern, columns, 8, 2, 1, 2, 2, 1)
    return row_of(pattern, columns, 8, slots + 1, 1, 1, 4, 1)


def usual_row(pattern: str, rows: int, columns: int, here: Gpu) -> StreamRow:
    """The form for a product of one activation row in a model of any width."""
    if pattern != "unstructured":
        return _nm_row(pattern, rows, columns, here)
    return (_small_row if min(rows, columns) <= SMALL_UP_TO else _wide_row)(rows, columns, here)


def _candidates(rows: int, columns: int, here: Gpu) -> Iterator[StreamRow]:
    """For one activation row by unstructured weights, the likely ones first."""
    yield usual_row("unstructured", rows, columns, here)
    if _tiles(rows) <= here.processors:
        yield _small_row(rows, columns, here)
    last = (12, 1, 4, 1, 4, 1) if unstructured_parts(columns) > 1 else (12, 2, 8, 1, 4, 2)
    for fields in ((8, 2, 8, 1, 4, 1), (12, 2, 8, 1, 4, 1), last, (6, 2, 4, 2, 2, 1)):
        yield row_of("unstructured", columns, *fields)


def _nm_candidates(pattern: str, rows: int, columns: int, here: Gpu) -> Iterator[StreamRow]:
    yield usual_row(pattern, rows, columns, here)
    if min(rows, columns) <= SMALL_UP_TO:
        found = [(12, 1, 2, 1, 4, 1), (12, 2, 2, 1, 4, 1), (12, 1, 4, 2, 4, 1), (6, 1, 2, 2, 4, 1), (6, 1, 1, 2, 4, 1)]
    else:
        found = [(8, 2, 1, 1, 4, 1), (8, 2, 1, 2, 2, 1), (8, 3, 1, 1, 4, 1), (8, 4, 1, 1, 4, 1), (12, 2, 1, 1, 4, 1)]
        if columns <= _SHORT_UP_TO:
            found += [(12, 2, 2, 1, 4, 1), (8, 2, 2, 2, 2, 1), (8, 4, 2, 1, 4, 1)]
        elif columns >= _LONG_FROM:
            found += [(16, 2, 1, 1, 4, 1), (12, 2, 1, 1, 4, 2), (16, 2, 1, 1, 4, 2)]
    for fields in found:
        yield row_of(pattern, columns, *fields)


def _several_candidates(pattern: str, columns: int, m: int) -> Iterator[StreamRow]:
    """For two to sixteen activation rows, of whose columns each block of a cluster holds a part only.

    Two blocks on a multiprocessor have no registers for more than eight rows.
    """
    own = 8 if pattern == "unstructured" else 1
    found = [(8, 2, own, 1, 4, 1), (12, 2, own, 1, 4, 1)]
    if pattern != "unstructured":
        found.append((8, 3, own, 1, 4, 1))
        found += [(8, 2, own, 2, 2, 1)] if m <= 8 else []
        if columns <= _SHORT_UP_TO:
            found += [(12, 2, 2, 1, 4, 1), (8, 2, 2, 1, 4, 1)]
            found += [(8, 2, 2, 2, 2, 1)] if m <= 8 else []
    if columns >= _MANY_FROM:
        found += [(8, 2, own, 1, 4, 2), (12, 2, own, 1, 4, 2)]
        if pattern != "unstructured":
            found.append((8, 3, own, 1, 4, 2))
        found += [(8, 2, own, 1, 4, 4), (12, 2, own, 1, 4, 4)]
    for fields in found:
        yield row_of(pattern, columns, *fields)


def configs(problem: Problem, here: Gpu) -> list[Config]:
    """What tuning measures for ``problem``: nothing where it has many rows, or rows that the kernel does not take."""
    rows, columns, m = problem.out_features, problem.in_features, problem.rows
    if m > MOST_ROWS or not serves(columns, here):
        return []
    pattern = tuning.pattern_key(problem.pattern)
    depth = 0 if problem.pattern.is_nm else -(-TYPICAL_DEPTH // unstructured_parts(columns))
    if m > 1:
        found = _several_candidates(pattern, columns, m)
    elif problem.pattern.is_nm:
        found = _nm_candidates(pattern, rows, columns, here)
    else:
        found = _candidates(rows, columns, here)
    fitted = (replace(each, x_rows=x_rows_for(m)).fitted(depth, here) for each in found)
    return list(dict.fromkeys(each.config for each in fitted if each is not None and each.tile.warps_k >= _FEWEST_WARPS))


def compilations(problem: Problem, config: Config, here: Gpu) -> tuple[tuple[str, str, tuple[tuple[str, int], ...]], ...]:
    """What NVRTC has to compile for a configuration: nothing for those of other kernels."""
    row = parse_row(tuning.pattern_key(problem.pattern), config, problem.in_features, problem.rows, here)
    return () if row is None else ((SOURCE, here.arch, tuple(sorted(row.macros(problem.dtype).items()))),)


def _rule(pattern: str, rows: int, columns: int, m: int, depth: int, here: Gpu) -> StreamRow | None:
    """The form for a shape that no table has, where the kernel was clearly faster than that for more rows."""
    if not serves(columns, here) or (m > 1 and (pattern == "2:4" or m > 8 or columns <= SMALL_UP_TO)):
        return None
    if m > 1:
        own = 8 if pattern == "unstructured" else 1
        whole, shared = (row_of(pattern, columns, 8, 2, own, 1, 4, cluster) for cluster in (1, 2))
        usual = [replace(row, x_rows=x_rows_for(m)) for row in ((whole, shared) if columns >= _MANY_FROM else (whole,))]
    elif pattern == "unstructured" and _tiles(rows) > here.processors and unstructured_parts(columns) == 1 and columns < _MANY_FROM:
        return None
    else:
        usual = [usual_row(pattern, rows, columns, here)]
    # What shared memory has no room for, rows or deep units, costs warps: that was not what was measured.
    fitted = ((row.fitted(depth, here), row.tile.warps_k) for row in usual)
    return next((found for found, warps in fitted if found is not None and found.tile.warps_k == warps), None)


@cache
def choose(kernel: str, pattern: str, dtype: torch.dtype, rows: int, columns: int, m: int, depth: int, here: Gpu) -> StreamRow | None:
    """The form for m activation rows by a (rows, columns) weight; None: another kernel's turn.

    ``pattern`` is "2:4", "4:8" or "unstructured", whose units have up to ``depth`` words then. What this GPU's table has for ``kernel``
    goes before the rule, whichever of the kernels it names.
    """
    measured = tuning.lookup(here.name, pattern, dtype, (rows, columns), m).get(kernel)
    if measured is not None:
        if (row := parse_row(pattern, measured.config, columns, m, here)) is not None:
            return row.fitted(depth, here)
        if parse(pattern, measured.config) is not None:
            return None
    return _rule(pattern, rows, columns, m, depth, here)


def product(kernel: str, call: Call) -> Tensor | None:
    """Run ``call`` with the form chosen for its shape and rows, or None: another kernel's turn. Tables have it under the name ``kernel``.

    Raises:
        InputError: shapes, types or devices do not fit.
        KernelUnavailableError: the kernel cannot be compiled or launched.
    """
    if not 0 < call.m <= MOST_ROWS:
        return None
    depth = call.streams.depth if call.streams is not None else 0
    row = choose(kernel, call.pattern, call.x.dtype, call.rows, call.columns, call.m, depth, gpu(call.x.device.index))
    return run_rows(row, call) if row is not None else None


def run_config(call: Call, config: Config) -> Tensor | None:
    """Run ``call`` as ``config`` says, or None where that is another kernel's."""
    row = parse_row(call.pattern, config, call.columns, call.m, gpu(call.x.device.index))
    return run_rows(row, call) if row is not None else None
