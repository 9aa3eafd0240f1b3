"""What the bitmask kernels share: from mask bytes and kept values to the eight weights of each byte, in registers.

A tile has BYTES mask bytes of each of ROWS rows of W, so 8·BYTES columns. Weights and activations of a tile are held as eight
(ROWS, BYTES) tensors, number j for column 8b + j of byte b: what a byte says about its columns then stays inside a thread.

    byte   1 0 1 1 0 0 1 0  (bit j is column j)
    weight a 0 b c 0 0 d 0  with a, b, c, d the values from the byte's start on; the value of column j is number
                            "bits below j", its rank

Two ways to the value of a rank:

    four     every byte has four values (1:2, 2:4, 4:8), so a byte's start is 4b: all four come in one aligned load and the rank
             selects among them. For 2:4 that is one of two by a neighbouring bit (as the metadata of sparse tensor cores,
             Mishra et al. 2021, section 3); for 4:8 a queue of four, whose head leaves at each set bit.
    indexed  any other pattern: one load a column, of the value at start + rank, masked by the bit. The start is arithmetic
             where N:M has a whole number of groups in a byte, else an exclusive prefix sum of bit counts.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["CHUNK_BYTES", "eight_columns", "first_value", "join_columns", "tile_weights"]

CHUNK_BYTES = 64
"""Mask bytes of a row between two entries of ``chunk_starts``; a part of a split row begins at one of these."""

CHUNK = tl.constexpr(CHUNK_BYTES)


@triton.jit
def bit_count(byte):
    """Set bits of int32 in 0..255, counted in pairs, fours, eight: no popcount instruction is common to all of Triton's targets."""
    count = byte - ((byte >> 1) & 0x55)
    count = (count & 0x33) + ((count >> 2) & 0x33)
    return (count + (count >> 4)) & 0x0F


@triton.jit
def _four(tile):
    """(.., 2, 2) as four (..), the last axis counting fastest."""
    even, odd = tl.split(tile)
    c0, c2 = tl.split(even)
    c1, c3 = tl.split(odd)
    return c0, c1, c2, c3


@triton.jit
def eight_columns(x, x_stride, first_sample, M, first, C, SAMPLES: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Activations at the columns of BYTES mask bytes from byte ``first`` on: eight (SAMPLES, ROWS, BYTES) fp32, the same for all ROWS.

    Loaded once for each of ROWS so that a thread reads the columns of its own bytes, in vectors of 16 bytes, and nothing passes
    through shared memory. Two axes at the load, for with more the compiler's order of threads differs between its versions.
    """
    samples = first_sample + tl.arange(0, SAMPLES * ROWS) // ROWS
    sample_inside = (samples < M)[:, None]
    pointers = x + (samples.to(tl.int64) * x_stride)[:, None]
    if x.dtype.element_ty.primitive_bitwidth == 32:
        part = tl.arange(0, BYTES * 4)
        low = first * 8 + part // 4 * 8 + part % 4
        high = low + 4
        x_low = tl.load(pointers + low[None, :], mask=sample_inside & (low < C)[None, :], other=0.0)
        x_high = tl.load(pointers + high[None, :], mask=sample_inside & (high < C)[None, :], other=0.0)
        c0, c1, c2, c3 = _four(tl.reshape(x_low, (SAMPLES, ROWS, BYTES, 2, 2)))
        c4, c5, c6, c7 = _four(tl.reshape(x_high, (SAMPLES, ROWS, BYTES, 2, 2)))
    else:
        columns = first * 8 + tl.arange(0, BYTES * 8)
        tile = tl.load(pointers + columns[None, :], mask=sample_inside & (columns < C)[None, :], other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(tile, (SAMPLES, ROWS, BYTES, 2, 2, 2)))
        c0, c2, c4, c6 = _four(even)
        c1, c3, c5, c7 = _four(odd)
    return c0, c1, c2, c3, c4, c5, c6, c7


@triton.jit
def join_columns(w, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Eight (ROWS, BYTES) as (ROWS, 8 · BYTES), number j in the columns 8b + j."""
    even = tl.join(tl.join(w[0], w[4]), tl.join(w[2], w[6]))
    odd = tl.join(tl.join(w[1], w[5]), tl.join(w[3], w[7]))
    return tl.reshape(tl.join(even, odd), (ROWS, BYTES * 8))


@triton.jit
def four_values(rows_of_values, first, row_inside, row_values, TYPE: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Four (ROWS, BYTES) tensors of TYPE: the values of each of BYTES bytes, from byte ``first`` on; 0 behind the row's end."""
    places = first * 4 + tl.arange(0, BYTES * 4)
    inside = row_inside[:, None] & (places < row_values)[None, :]
    tile = tl.load(rows_of_values[:, None] + places[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
    return _four(tl.reshape(tile.to(TYPE), (ROWS, BYTES, 2, 2)))


@triton.jit
def _of_two(b0, b1, b2, b3, v0, v1):
    # Two of the four bits are set, so bit 1 is the second where bit 0 is set, and bit 2 the first where bit 3 is.
    zero = tl.zeros_like(v0)
    w1 = tl.where(b1, tl.where(b0, v1, v0), zero)
    w2 = tl.where(b2, tl.where(b3, v0, v1), zero)
    return tl.where(b0, v0, zero), w1, w2, tl.where(b3, v1, zero)


@triton.jit
def _pop(bit, v0, v1, v2, v3):
    return tl.where(bit, v0, tl.zeros_like(v0)), tl.where(bit, v1, v0), tl.where(bit, v2, v1), tl.where(bit, v3, v2)


@triton.jit
def from_four(byte, v, GROUP: tl.constexpr):
    """The eight weights of bytes whose four values are ``v``; GROUP is M of 1:2, 2:4 or 4:8."""
    b0, b1, b2, b3 = (byte & 1) != 0, (byte & 2) != 0, (byte & 4) != 0, (byte & 8) != 0
    b4, b5, b6, b7 = (byte & 16) != 0, (byte & 32) != 0, (byte & 64) != 0, (byte & 128) != 0
    if GROUP == 4:
        w0, w1, w2, w3 = _of_two(b0, b1, b2, b3, v[0], v[1])
        w4, w5, w6, w7 = _of_two(b4, b5, b6, b7, v[2], v[3])
    else:
        v0, v1, v2, v3 = v
        w0, v0, v1, v2 = _pop(b0, v0, v1, v2, v3)
        w1, v0, v1, v2 = _pop(b1, v0, v1, v2, v3)
        w2, v0, v1, v2 = _pop(b2, v0, v1, v2, v3)
        w3, v0, v1, v2 = _pop(b3, v0, v1, v2, v3)
        w4, v0, v1, v2 = _pop(b4, v0, v1, v2, v3)
        w5, v0, v1, v2 = _pop(b5, v0, v1, v2, v3)
        w6, v0, v1, v2 = _pop(b6, v0, v1, v2, v3)
        w7, v0, v1, v2 = _pop(b7, v0, v1, v2, v3)
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def _next(byte, j: tl.constexpr, pointer, TYPE: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr):
    bit = (byte >> j) & 1
    weight = tl.load(pointer, mask=bit != 0, other=0.0)
    return tl.reshape(weight.to(TYPE), (ROWS, BYTES)), pointer + bit


@triton.jit
def from_indexed(byte, rows_of_values, position, TYPE: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """The eight weights of bytes whose values start at ``position`` (ROWS, BYTES) int32 of their rows."""
    # One axis at the loads: no axis of theirs is contiguous, and with two the compiler may lay a warp's lanes along the rows.
    pointer = tl.reshape(rows_of_values[:, None] + position, (ROWS * BYTES,))
    byte = tl.reshape(byte, (ROWS * BYTES,))
    w0, pointer = _next(byte, 0, pointer, TYPE, ROWS, BYTES)
    w1, pointer = _next(byte, 1, pointer, TYPE, ROWS, BYTES)
    w2, pointer = _next(byte, 2, pointer, TYPE, ROWS, BYTES)
    w3, pointer = _next(byte, 3, pointer, TYPE, ROWS, BYTES)
    w4, pointer = _next(byte, 4, pointer, TYPE, ROWS, BYTES)
    w5, pointer = _next(byte, 5, pointer, TYPE, ROWS, BYTES)
    w6, pointer = _next(byte, 6, pointer, TYPE, ROWS, BYTES)
    w7, pointer = _next(byte, 7, pointer, TYPE, ROWS, BYTES)
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def first_value(
    row_offsets,
    chunk_starts,
    rows,
    row_inside,
    begin,
    row_bytes,
    row_values,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Where each row's values start, int64, and how many of them lie before mask byte ``begin``, int32 (ROWS,) each.

    Bytes 0 and multiples of CHUNK_BYTES are the only ones that ``begin`` may be; ``rows`` is int64.
    """
    start = rows * row_values
    before = tl.zeros_like(rows).to(tl.int32)
    if GROUP != 0:
        before += begin * 8 // GROUP * KEEP
    else:
        start = tl.load(row_offsets + rows, mask=row_inside, other=0)
        if chunk_starts is not None:
            chunks = (row_bytes + CHUNK - 1) // CHUNK
            before = tl.load(chunk_starts + rows * chunks + begin // CHUNK, mask=row_inside, other=0)
    return start, before


@triton.jit
def tile_weights(
    byte,  # (ROWS, BYTES) int32, 0 outside of W
    rows_of_values,  # (ROWS,) pointers to the rows' first values
    first,  # number of the tile's first byte in its row
    before,  # (ROWS,) int32: values of the row in earlier tiles; read and advanced where a prefix sum is needed
    row_inside,  # (ROWS,) bool
    row_values,  # values in a row of an N:M weight
    KEEP: tl.constexpr,  # N of N:M, 0 for unstructured
    GROUP: tl.constexpr,  # M of N:M, 0 for unstructured
    TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """The tile's weights as eight (ROWS, BYTES) of TYPE, and ``before`` of the next tile."""
    if KEEP * 2 == GROUP and GROUP != 0 and GROUP <= 8:
        v = four_values(rows_of_values, first, row_inside, row_values, TYPE, ROWS, BYTES)
        w = from_four(byte, v, GROUP)
    else:
        if GROUP != 0 and GROUP <= 8:
            position = (first + tl.arange(0, BYTES)) * (8 // GROUP * KEEP)
            position = tl.broadcast_to(position[None, :], (ROWS, BYTES))
        else:
            count = bit_count(byte)
            position = before[:, None] + tl.cumsum(count, axis=1) - count
            before += tl.sum(count, axis=1)
        w = from_indexed(byte, rows_of_values, position, TYPE, ROWS, BYTES)
    return w, before
