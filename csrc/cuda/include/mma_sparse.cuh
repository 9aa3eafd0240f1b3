// The sparse product of one warp, sm_80 and newer. Needs fragments.cuh before it.
#pragma once

// d (16 x 8) += A (16 x 32, two of four kept) · B (32 x 8). A lane's `meta` serves two steps of 32 columns, which SELECTOR tells apart.
template <int SELECTOR>
__device__ __forceinline__ void mma_sparse(float (&d)[4], const uint4& a, const u32 (&b)[4], u32 meta) {
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col." MMA_TYPES
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta), "n"(SELECTOR));
}
