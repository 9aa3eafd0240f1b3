"""y = x Wᵀ + b on any GPU that Triton compiles for, reading a packed W as the checkpoint holds it: which kernel, tile and split.

Two forms for every N:M and for unstructured weights, since both are a bitmask and the kept values in row and column order:

    few activation rows    bitmask_gemv   multiply-adds in fp32, no padding of the activation rows
    more of them           bitmask_dot    W expanded to a dense tile in registers for tensor cores

Either may split the columns of W over programs (split-K) where a layer has too few rows to occupy a GPU; split_k adds the parts
in a fixed order. Launches have no limit on activation rows, R or C.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .bitmask_dot import bitmask_dot
from .bitmask_expand import CHUNK_BYTES
from .bitmask_gemv import bitmask_gemv
from .split_k import add_parts

__all__ = ["CHUNK_BYTES", "MAX_PARTS", "OutOfResources", "Tile", "bitmask_linear", "default_tile", "part_bytes", "tiles", "why_not"]

MAX_PARTS = 16
"""Most parts of a row: their sums are read together."""

_PROGRAMS = 512
"""Programs from which a row is no longer split: about four on each processor of a large GPU."""

_ADD_BLOCK = 512


class Tile(NamedTuple):
    """How a product is cut up; sizes are powers of two, ``parts`` is any number from 1 to MAX_PARTS."""

    form: str
    """"gemv" or "dot"."""
    block_m: int
    """Activation rows a program."""
    block_rows: int
    """Rows of W a program; for gemv a multiple of 32 · warps / block_bytes, the rows that a warp's lanes cover at a byte each."""
    block_bytes: int
    """Mask bytes a step, 8 columns each."""
    depth: int
    """gemv: steps whose loads are in flight together; dot: stages of the compiler's pipeline."""
    parts: int
    """Parts of a row of W, at most: their length is rounded up to whole chunks."""
    warps: int


def why_not(form: str, sizes: tuple[int, ...]) -> str | None:
    """What makes the fields of a :class:`Tile` from outside none that can be launched, or None."""
    names = Tile._fields
    if form not in ("gemv", "dot") or len(sizes) != len(names) - 1 or min(sizes) < 1:
        return f"it is not ({', '.join(names)}) with a form of gemv or dot and sizes above 0"
    tile = Tile(form, *sizes)
    if tile.parts > MAX_PARTS:
        return f"a row is split into at most {MAX_PARTS} parts, not {tile.parts}"
    for name in ("block_m", "block_rows", "block_bytes", "warps"):
        size = getattr(tile, name)
        if size & (size - 1):
            return f"{name} is {size}, which is no power of two"
    if form == "gemv":
        abreast = 32 * tile.warps // tile.block_bytes
        if not 1 <= abreast <= tile.block_rows:
            return f"{tile.warps} warps on {tile.block_bytes} bytes a step cover {abreast} rows, not 1 to block_rows = {tile.block_rows}"
    elif min(tile.block_m, tile.block_rows, tile.block_bytes * 8) < 16:
        return "a dot needs at least 16 activation rows, 16 rows of W and 16 columns (2 bytes) a step"
    return None


def _padded(m: int) -> int:
    return 1 << (max(m, 1) - 1).bit_length()


def _gemv_tile(m: int, rows: int) -> Tile:
    # Sixteen rows' x and sums do not fit the registers.
    block_m = min(_padded(m), 8)
    if block_m > 1:
        # Rows of W share the loads of x, up to four a thread if there are many.
        block_rows = 4 if rows < 2048 else 8 if rows < 8192 else 16
        return Tile("gemv", block_m, block_rows, 32, 1, 1, 4)
    if rows < 2048:
        # Four warps along one row: a layer of 768 rows has to occupy every processor without a second launch.
        return Tile("gemv", 1, 1, 128, 1, 1, 4)
    # A row a warp with four steps in flight; from 8192 rows on two rows share the loads of x and there are warps enough.
    return Tile("gemv", 1, 4, 32, 4, 1, 4) if rows < 8192 else Tile("gemv", 1, 8, 32, 2, 1, 4)


def _dot_tile(m: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        # No tensor cores for exact fp32: a small tile, since both operands of each multiply-add are registers.
        return Tile("dot", 16 if m <= 16 else 32, 32, 4, 1, 1, 4)
    if m <= 16:
        # Few steps of many columns: a step's latency is what a program waits for.
        return Tile("dot", 16, 64, 16, 3, 1, 4)
    # 64 rows of W are one warpgroup instruction of Hopper; 64 KiB of shared memory at most, which every GPU has.
    if m >= 256:
        # An expanded tile of W serves twice as many rows, and its expansion costs as much as their products.
        return Tile("dot", 256, 64, 4, 3, 1, 8)
    return Tile("dot", min(max(_padded(m), 32), 128), 64, 8, 3, 1, 4)


def _split(tile: Tile, m: int, rows: int, row_bytes: int) -> Tile:
    programs = -(-m // tile.block_m) * -(-rows // tile.block_rows)
    chunk = max(CHUNK_BYTES, tile.block_bytes)
    return tile._replace(parts=max(1, min(_PROGRAMS // programs, -(-row_bytes // chunk), MAX_PARTS)))


def default_tile(m: int, rows: int, columns: int, dtype: torch.dtype) -> Tile:
    """The tile for m activation rows by a (rows, columns) weight where nothing was measured; the same on every GPU."""
    # Beyond these, expanding for tensor cores costs less than a multiply-add for every column and activation row.
    few = m <= (16 if dtype == torch.float32 else 4)
    return _split(_gemv_tile(m, rows) if few else _dot_tile(m, dtype), m, rows, -(-columns // 8))


def tiles(m: int, rows: int, columns: int, dtype: torch.dtype) -> list[Tile]:
    """What is worth measuring for a problem, the default first. Left out: 128 x 128, which spills registers with four warps and was the
    slowest with eight."""
    row_bytes = -(-columns // 8)
    found = [default_tile(m, rows, columns, dtype)]
    if m <= (16 if dtype == torch.float32 else 8):
        gemv = _gemv_tile(m, rows)
        found.append(_split(gemv, m, rows, row_bytes))
        if m == 1:
            found += [
                Tile("gemv", 1, 1, 128, 1, 1, 4),  # four warps a row: no second launch for few rows
                Tile("gemv", 1, 2, 64, 2, 1, 4),  # two warps a row: columns that fill half of the step above
                Tile("gemv", 1, 4, 32, 4, 1, 4),  # a warp a row, most loads in flight
                Tile("gemv", 1, 8, 32, 2, 1, 4),  # two rows a warp share the loads of x
                Tile("gemv", 1, 4, 32, 1, min(4, MAX_PARTS), 4),  # split although there are programs enough
            ]
        else:
            found += [gemv._replace(block_rows=size) for size in (4, 8, 16)]
    if m > 1:
        dot = _dot_tile(m, dtype)
        found += [dot, _split(dot, m, rows, row_bytes), dot._replace(block_bytes=dot.block_bytes // 2)]
        if dtype != torch.float32:
            found.append(dot._replace(depth=2))  # a stage less of shared memory lets one more program run on a processor
            if m >= 256:
                found.append(dot._replace(depth=4))  # 76 KiB of shared memory
                found.append(Tile("dot", 256, 64, 8, 3, 1, 8))  # half the steps, 115 KiB: few programs
                found.append(Tile("dot", 256, 128, 8, 3, 1, 8))  # x is read half as often, 131 KiB: unstructured, many rows
                found.append(Tile("dot", 128, 64, 8, 3, 1, 4))  # the default for fewer rows
    distinct = dict.fromkeys(found)
    return [tile for tile in distinct if tile.parts == 1 or part_bytes(tile, row_bytes) < row_bytes]


def part_bytes(tile: Tile, row_bytes: int) -> int:
    """Mask bytes of a part: whole chunks and whole steps, so that the last part may be shorter and none is empty."""
    unit = max(CHUNK_BYTES, tile.block_bytes)
    return max(-(-row_bytes // (tile.parts * unit)), 1) * unit


def _dot_type(dtype: torch.dtype) -> tl.dtype:
    if dtype == torch.bfloat16:
        # The interpreter keeps bf16 as integers and would multiply those; fp32 holds bf16 and its products exactly.
        return tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32


def bitmask_linear(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    row_offsets: Tensor | None,
    chunk_starts: Tensor | None,
    bias: Tensor | None,
    n: int,
    m: int,
    tile: Tile,
    out: Tensor,
) -> Tensor:
    """Write x Wᵀ + b to ``out`` and return it. Arguments are trusted; the operator in front of this checks them.

    Args:
        x: (M, C) with M and C at least 1, unit column stride, bf16, fp16 or fp32.
        values: contiguous, of x's type: (R, C·N/M) of an N:M weight or (nnz,) of an unstructured one.
        bitmask: (R, ceil(C / 8)) uint8, contiguous, as :func:`sparse_engine.formats.base.pack_bits` makes it.
        row_offsets: (R + 1,) int64, or None for N:M.
        chunk_starts: (R, ceil(C / 8 / CHUNK_BYTES)) int32, values of a row before each chunk of its mask; not read for N:M. None
            for an unstructured weight makes one part of each row.
        bias: (R,) of x's type, or None.
        n, m: the N:M pattern; 0 where ``row_offsets`` is given.
        tile: see :func:`default_tile`.
        out: (M, R) of x's type, contiguous; on the device that is current.

    Raises:
        OutOfResources: the tile needs more shared memory than a program can have on this GPU.
    """
    samples, columns = x.shape
    rows, row_bytes = bitmask.shape
    if row_offsets is not None and chunk_starts is None:
        tile = tile._replace(parts=1)
    length = part_bytes(tile, row_bytes)
    parts = triton.cdiv(row_bytes, length)
    # fp32 sums of every part, each written once.
    y = out if parts == 1 else torch.empty((parts, samples, rows), dtype=torch.float32, device=x.device)
    arguments = (
        x,
        values,
        bitmask,
        row_offsets,
        chunk_starts if parts > 1 else None,
        bias if parts == 1 else None,
        y,
        samples,
        rows,
        columns,
        x.stride(0),
        row_bytes,
        columns // m * n if m else 0,
        length,
    )
    sizes = {"KEEP": n, "GROUP": m, "WHOLE_BYTES": columns % 8 == 0}
    sizes |= {"BLOCK_M": tile.block_m, "BLOCK_ROWS": tile.block_rows, "BYTES": tile.block_bytes}
    grid = (triton.cdiv(rows, tile.block_rows) * triton.cdiv(samples, tile.block_m), parts)
    if tile.form == "gemv":
        abreast = 32 * tile.warps // tile.block_bytes
        bitmask_gemv[grid](*arguments, **sizes, ABREAST=abreast, UNROLL=tile.depth, num_warps=tile.warps)
    else:
        bitmask_dot[grid](*arguments, **sizes, TYPE=_dot_type(x.dtype), num_warps=tile.warps, num_stages=tile.depth)
    if parts > 1:
        add_grid = (samples * triton.cdiv(rows, _ADD_BLOCK),)
        add_parts[add_grid](y, bias, out, samples, rows, PARTS=parts, BLOCK=_ADD_BLOCK, num_warps=4)
    return out
