"""y = x Wᵀ + b for many activation rows: tiles of a packed W are expanded in registers and multiplied by ``tl.dot``.

Any number of rows of x: program axis 0 runs over tiles of BLOCK_M of them for each tile of W, neighbours sharing the tile of W
in cache, and axis 1 over parts of the columns.

                        8 · BYTES columns                                 BLOCK_M rows of x
                       +-----------------+                               +-----------------+
    BLOCK_ROWS rows    | mask + values   |  expand   +-----------+       |                 | 8 · BYTES columns
    of W               | of a step       |  ------>  | W, dense  |   x   | xᵀ              |
                       +-----------------+           +-----------+       +-----------------+
                                                              |
                                                              v
                       sums (BLOCK_ROWS, BLOCK_M) fp32, added over the steps of a part -> y[part] (M, R)

W is the left operand: its rows fill the 16 or 64 of a tensor core instruction's larger side, and x the side that can be small.
Weights between kept ones exist as zeros in registers alone (as in Flash-LLM, Xia et al. 2023, section 4: load as sparse,
compute as dense). With several parts split_k.add_parts sums them; no sum depends on the order in which programs run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bitmask_expand import first_value, join_columns, tile_weights

__all__ = ["bitmask_dot"]


# Nothing may be known of row_bytes and row_values: a lane then loads the mask byte and the values that are its own, where a known
# alignment would have it take several neighbours' and pass them on through shared memory.
@triton.jit(do_not_specialize=["row_bytes", "row_values"])
def bitmask_dot(
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
    TYPE: tl.constexpr,  # type of the operands of tl.dot: the element type, or fp32 where that would be exact and is needed
    BLOCK_M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    m_tiles = tl.cdiv(M, BLOCK_M)
    rows = tl.program_id(0) // m_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    samples = tl.program_id(0) % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
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
    rows_of_x = x + wide_samples * x_stride

    sums = tl.zeros((BLOCK_ROWS, BLOCK_M), dtype=tl.float32)
    places = begin + tl.arange(0, BYTES)
    byte = tl.load(rows_of_mask[:, None] + places[None, :], mask=row_inside[:, None] & (places < end)[None, :], other=0)
    for first in range(begin, end, BYTES):
        # A step ahead: where a value lies is known from the mask alone, so its load would wait for that of the mask.
        places += BYTES
        next_byte = tl.load(rows_of_mask[:, None] + places[None, :], mask=row_inside[:, None] & (places < end)[None, :], other=0)
        columns = first * 8 + tl.arange(0, BYTES * 8)
        reads = sample_inside[:, None] & (columns < C)[None, :]
        a = tl.load(rows_of_x[:, None] + columns[None, :], mask=reads, other=0.0).to(TYPE)
        w, before = tile_weights(
            byte.to(tl.int32), rows_of_values, first, before, row_inside, row_values, KEEP, GROUP, TYPE, BLOCK_ROWS, BYTES
        )
        # "ieee": fp32 operands stay fp32; it changes nothing for the others.
        sums = tl.dot(join_columns(w, BLOCK_ROWS, BYTES), tl.trans(a), sums, input_precision="ieee")
        byte = next_byte

    if bias is not None:
        sums += tl.load(bias + rows, mask=row_inside, other=0.0).to(tl.float32)[:, None]
    out = y + (tl.program_id(1).to(tl.int64) * M + wide_samples)[None, :] * R + rows[:, None]
    tl.store(out, sums.to(y.dtype.element_ty), mask=row_inside[:, None] & sample_inside[None, :])
