"""y = x Wᵀ + b on any GPU that Triton compiles for, reading a packed W as the checkpoint holds it; 1 to 16 activation rows.

One kernel for every N:M and for unstructured weights, since both are a bitmask and the kept values in row and column order;
they differ only in where a row's values start. Weights of W between kept ones are never formed in memory.

Work of one program, BLOCK_ROWS rows of W, in steps of BLOCK_BYTES mask bytes (8 columns each):

                 columns of W ->
                 step 0              step 1              last step
               +-------------------+-------------------+- - - - -+
    row r      | byte byte .. byte | byte byte .. byte |    |masked
    row r + 1  | byte byte .. byte |                   |         |   -> BLOCK_ROWS x M partial sums per byte of a step,
    ..         |                   |                   |         |      fp32, added over the bytes after the last step
               +-------------------+-------------------+- - - - -+

    one byte    bits (column 8b + j is bit j)   1 0 1 1 0 0 1 0
                its values                      v   v v     v     values[start], [start + 1], [start + 2], [start + 3]
                start = row start + values in the row's earlier steps (running total)
                                  + values in the step's earlier bytes (exclusive prefix sum of bit counts)

Programs: ceil(R / BLOCK_ROWS), each all of a row's columns, so no sum crosses programs and results do not depend on timing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["MAX_ROWS", "bitmask_linear"]

MAX_ROWS = 16
"""Most activation rows of one launch: their sums are held in registers, a set for each."""

# Activation rows (padded to a power of two) -> (BLOCK_ROWS, BLOCK_BYTES, warps): at most 16 sums a thread, and few rows of W a
# program, because a layer of 768 rows would otherwise leave processors without one.
_BLOCKS = {1: (4, 128, 4), 2: (4, 128, 4), 4: (4, 128, 4), 8: (4, 64, 4), 16: (4, 32, 4)}


@triton.jit
def _bitmask_linear(
    x,  # (M, C) element type, columns adjacent, rows x_stride elements apart
    values,  # (nnz,) element type: the kept values of W, row by row in column order
    bitmask,  # (R, ceil(C / 8)) uint8, contiguous; bit j of byte b is column 8b + j; bits from C on are 0
    row_offsets,  # (R + 1,) int64: where each row's values start; None for N:M
    bias,  # (R,) element type, or None
    y,  # (M, R) element type, contiguous; written once, never read
    M,  # activation rows
    R,  # rows of W
    C,  # columns of W
    x_stride,  # elements
    row_values,  # values in a row of an N:M weight, C * N / M; 0 where row_offsets is given
    ROWS_PADDED: tl.constexpr,  # M rounded up to a power of two
    BLOCK_ROWS: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_inside = rows < R
    # 64 bits for whatever a row number is multiplied by: a large layer's values need more than 31.
    wide_rows = rows.to(tl.int64)
    row_start = wide_rows * row_values
    if row_offsets is not None:
        row_start = tl.load(row_offsets + wide_rows, mask=row_inside, other=0)
    row_bytes = (C + 7) // 8
    mask_rows = bitmask + wide_rows * row_bytes
    value_rows = values + row_start

    samples = tl.arange(0, ROWS_PADDED)
    sample_inside = samples < M
    x_rows = x + samples.to(tl.int64) * x_stride

    seen = tl.zeros((BLOCK_ROWS,), dtype=tl.int32)
    sums = tl.zeros((BLOCK_ROWS, ROWS_PADDED, BLOCK_BYTES), dtype=tl.float32)
    for first in range(0, row_bytes, BLOCK_BYTES):
        places = first + tl.arange(0, BLOCK_BYTES)
        inside = row_inside[:, None] & (places < row_bytes)[None, :]
        byte = tl.load(mask_rows[:, None] + places[None, :], mask=inside, other=0).to(tl.int32)
        # Bits counted in pairs, then fours, then eight: no popcount instruction is common to all of Triton's targets.
        count = byte - ((byte >> 1) & 0x55)
        count = (count & 0x33) + ((count >> 2) & 0x33)
        count = (count + (count >> 4)) & 0x0F
        position = seen[:, None] + tl.cumsum(count, axis=1) - count
        seen += tl.sum(count, axis=1)
        for j in tl.static_range(8):
            bit = (byte >> j) & 1
            weight = tl.load(value_rows[:, None] + position, mask=bit != 0, other=0.0).to(tl.float32)
            position += bit
            columns = places * 8 + j
            reads = sample_inside[:, None] & (columns < C)[None, :]
            activation = tl.load(x_rows[:, None] + columns[None, :], mask=reads, other=0.0).to(tl.float32)
            sums += weight[:, None, :] * activation[None, :, :]

    total = tl.sum(sums, axis=2)
    if bias is not None:
        total += tl.load(bias + rows, mask=row_inside, other=0.0).to(tl.float32)[:, None]
    places_out = y + samples.to(tl.int64)[None, :] * R + rows[:, None]
    tl.store(places_out, total.to(y.dtype.element_ty), mask=row_inside[:, None] & sample_inside[None, :])


def bitmask_linear(
    x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor | None, bias: Tensor | None, n: int, m: int, out: Tensor
) -> Tensor:
    """Write x Wᵀ + b to ``out`` and return it. Arguments are trusted; the operator in front of this checks them.

    Args:
        x: (M, C), 1 <= M <= 16, unit column stride, bf16, fp16 or fp32.
        values: contiguous, of x's type: (R, C·N/M) of an N:M weight or (nnz,) of an unstructured one.
        bitmask: (R, ceil(C / 8)) uint8, contiguous, as :func:`sparse_engine.formats.base.pack_bits` makes it.
        row_offsets: (R + 1,) int64, or None for N:M.
        bias: (R,) of x's type, or None.
        n, m: the N:M pattern; not read where ``row_offsets`` is given.
        out: (M, R) of x's type, contiguous; on the device that is current.
    """
    samples, columns = x.shape
    rows = bitmask.shape[0]
    padded = triton.next_power_of_2(samples)
    block_rows, block_bytes, warps = _BLOCKS[padded]
    row_values = columns // m * n if row_offsets is None else 0
    grid = (triton.cdiv(rows, block_rows),)
    _bitmask_linear[grid](
        x,
        values,
        bitmask,
        row_offsets,
        bias,
        out,
        samples,
        rows,
        columns,
        x.stride(0),
        row_values,
        ROWS_PADDED=padded,
        BLOCK_ROWS=block_rows,
        BLOCK_BYTES=block_bytes,
        num_warps=warps,
    )
    return out
