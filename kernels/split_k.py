"""The second stage of split-K: partial products are added in the order of their parts, so that a result has the same bits every time.

                         R ->
parts (P, M, R) fp32     p0 p0 p0 ..       BLOCK elements of one activation row a program: the sum over its parts in registers,
                         p1 p1 p1 ..  -->  + bias of the row of W, rounded once to y's type
                         ..
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["add_parts"]


@triton.jit
def add_parts(
    parts,  # (PARTS, M, R) fp32, contiguous
    bias,  # (R,) element type, or None
    y,  # (M, R) element type, contiguous; written once, never read
    M,  # activation rows
    R,  # rows of W
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(R, BLOCK)
    rows = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    inside = rows < R
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + (sample + tl.cast(M, tl.int64) * part) * R + rows, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + sample * R + rows, total.to(y.dtype.element_ty), mask=inside)
