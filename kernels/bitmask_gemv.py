"""y = x Wᵀ + b for a few activation rows: plain multiply-adds in fp32, W packed as the checkpoint holds it (1 to 16 rows a program).

Bytes of W bind here, and an activation row is small: a program reads every byte of its part of W once and expands it in
registers (:mod:`bitmask_expand`), each row of x in vectors that all its rows of W share.

                 columns of W ->
                 part 0 (program axis 1)              part 1
               +-----------------------------------+-----------------------------------+
    row r      | tile: BYTES bytes | tile          | tile              | last, masked  |
    row r + 1  |                   |               |                   |               |   BLOCK_ROWS rows a program
    ..         |                   |               |                   |               |   (program axis 0, times tiles of x's rows)
               +-----------------------------------+-----------------------------------+
                 sums (BLOCK_M, BLOCK_ROWS, BYTES) fp32, one a thread and byte; added over the bytes after the last tile
                      |                                   |
                      v                                   v
                 y[0] (M, R)                         y[1] (M, R)      with several parts: fp32, then split_k.add_parts

A warp's 32 lanes lie along the bytes, so that the values of neighbouring lanes are neighbours in memory. No sum depends on
the order in which programs run. The split of a row is split-K as in Stream-K's account of it (Osama et al. 2023, section 2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bitmask_expand import eight_columns, first_value, tile_weights

__all__ = ["bitmask_gemv"]


# Nothing may be known of row_bytes and row_values: a lane then loads the mask byte and the values that are its own, where a known
# alignment would have it take several neighbours' and pass them on through shared memory.
@triton.jit(do_not_specialize=["row_bytes", "row_values"])
def bitmask_gemv(
    x,  # (M, C) element type, columns adjacent, rows x_stride elements apart
    values,  # (nnz,) element type: the kept values of W, row by row in column order
    bitmask,  # (R, row_bytes) uint8, contiguous; bit j of byte b is column 8b + j; bits from C on are 0
    row_offsets,  # (R + 1,) int64: where each row's values start; None for N:M
    chunk_starts,  # (R, ceil(row_bytes / CHUNK_BYTES)) int32: values of the row before each chunk; None for N:M or one part
    bias,  # (R,) element type, or None; None with several parts
    y,  # (parts, M, R) contiguous: element type with one part, fp32 with several; written once, never read
    M,  # activation rows
    R,  # rows of W
    C,  # columns of W
    x_stride,  # elements
    row_bytes,  # ceil(C / 8)
    row_values,  # values in a row of an N:M weight, C * N / M; 0 for unstructured
    part_bytes,  # mask bytes of a part, a multiple of CHUNK_BYTES and of BYTES
    KEEP: tl.constexpr,  # N of N:M, 0 for unstructured
    GROUP: tl.constexpr,  # M of N:M, 0 for unstructured
    WHOLE_BYTES: tl.constexpr,  # whether C is a multiple of 8
    BLOCK_M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ABREAST: tl.constexpr,  # 32 * num_warps / BYTES: rows of W that the threads cover at one byte each
    BYTES: tl.constexpr,
    UNROLL: tl.constexpr,  # tiles whose loads are in flight together
):
    m_tiles = tl.cdiv(M, BLOCK_M)
    rows = tl.program_id(0) // m_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_sample = tl.program_id(0) % m_tiles * BLOCK_M
    samples = first_sample + tl.arange(0, BLOCK_M)
    row_inside, sample_inside = rows < R, samples < M
    begin = tl.program_id(1) * part_bytes
    end = tl.minimum(begin + part_bytes, row_bytes)
    # 64 bits for whatever a row number is multiplied by: a large layer's values need more than 31.
    wide_rows, wide_samples = rows.to(tl.int64), samples.to(tl.int64)
    if KEEP * 2 == GROUP and WHOLE_BYTES:
        # The compiler then knows that a byte's four values are aligned to their size, and nothing beyond: a lane's widest load is
        # its own byte's values.
        row_values = row_bytes * 4
    start, before = first_value(row_offsets, chunk_starts, wide_rows, row_inside, begin, row_bytes, row_values, KEEP, GROUP)
    rows_of_values = values + start
    rows_of_mask = bitmask + wide_rows * row_bytes

    GROUPS: tl.constexpr = BLOCK_ROWS // ABREAST
    sums = tl.zeros((BLOCK_M, GROUPS, ABREAST, BYTES), dtype=tl.float32)
    for first in tl.range(begin, end, BYTES, loop_unroll_factor=UNROLL):
        places = first + tl.arange(0, BYTES)
        inside = row_inside[:, None] & (places < end)[None, :]
        byte = tl.load(rows_of_mask[:, None] + places[None, :], mask=inside, other=0).to(tl.int32)
        a = eight_columns(x, x_stride, first_sample, M, first, C, BLOCK_M, ABREAST, BYTES)
        w, before = tile_weights(byte, rows_of_values, first, before, row_inside, row_values, KEEP, GROUP, tl.float32, BLOCK_ROWS, BYTES)
        for j in tl.static_range(8):
            sums += tl.reshape(w[j], (1, GROUPS, ABREAST, BYTES)) * a[j][:, None, :, :]

    total = tl.reshape(tl.sum(sums, axis=3), (BLOCK_M, BLOCK_ROWS))
    if bias is not None:
        total += tl.load(bias + rows, mask=row_inside, other=0.0).to(tl.float32)[None, :]
    out = y + (tl.program_id(1).to(tl.int64) * M + wide_samples)[:, None] * R + rows[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=row_inside[None, :] & sample_inside[:, None])
