// Sums of a row tile of 16 over the columns of one slot, or of a part of it; weights as decode_nm.cu lays them out.
#pragma once
#include "half/block.cuh"
#include "expand.cuh"
#include "mma_sparse.cuh"

// Operand B of a step: only column 0 has an activation row, which lanes 0 to 3 hold.
__device__ __forceinline__ void load_activations(u32 address, u32 (&b)[4]) {
  asm volatile("{\n"
               ".reg .pred first;\n"
               "setp.lt.u32 first, %5, 4;\n"
               "mov.u32 %0, 0;\n"
               "mov.u32 %1, 0;\n"
               "mov.u32 %2, 0;\n"
               "mov.u32 %3, 0;\n"
               "@first ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               "}"
               : "=&r"(b[0]), "=&r"(b[1]), "=&r"(b[2]), "=&r"(b[3])
               : "r"(address), "r"(threadIdx.x & 31)
               : "memory");
}

// Two steps of 32 columns for each of the lane's WORDS words of positions. `values` is the shared address of the first step's values,
// `x` that of the first step's activations. The sums of rows lane / 4 and lane / 4 + 8 come out as sum[0] and sum[2] of lanes 0, 4, 8 ...
template <int WORDS>
__device__ __forceinline__ void multiply(float (&sum)[4], const u32 (&positions)[WORDS], u32 values, u32 x) {
  constexpr int TOGETHER = WORDS < 2 ? WORDS : 2;
  const int lane = threadIdx.x & 31;
  float other[4] = {};
  values += lane * 16;
  x += lane * 16;
#pragma unroll
  for (int begin = 0; begin < WORDS; begin += TOGETHER) {
    u32 v[2 * TOGETHER][4], b[2 * TOGETHER][4];
#pragma unroll
    for (int s = 0; s < 2 * TOGETHER; ++s)
      load_shared_x4(values + (2 * begin + s) * 512, v[s]);
#pragma unroll
    for (int s = 0; s < 2 * TOGETHER; ++s)
      load_activations(x + (2 * begin + s) * 64, b[s]);
#pragma unroll
    for (int w = 0; w < TOGETHER; ++w) {
      const u32 at = positions[begin + w];
      const uint4 first = make_uint4(v[2 * w][0], v[2 * w][1], v[2 * w][2], v[2 * w][3]);
      const uint4 second = make_uint4(v[2 * w + 1][0], v[2 * w + 1][1], v[2 * w + 1][2], v[2 * w + 1][3]);
#if PATTERN == 24
      mma_sparse<0>(sum, first, b[2 * w], at);
      mma_sparse<1>(other, second, b[2 * w + 1], at);
#else
      u32 codes[4], a[8];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        codes[i] = code_selectors(at, i);
      expand_step(first, codes, a);
      mma_dense(sum, a[0], a[1], a[2], a[3], b[2 * w][0], b[2 * w][1]);
      mma_dense(sum, a[4], a[5], a[6], a[7], b[2 * w][2], b[2 * w][3]);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        codes[i] >>= 16;
      expand_step(second, codes, a);
      mma_dense(other, a[0], a[1], a[2], a[3], b[2 * w + 1][0], b[2 * w + 1][1]);
      mma_dense(other, a[4], a[5], a[6], a[7], b[2 * w + 1][2], b[2 * w + 1][3]);
#endif
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    sum[i] += other[i];
}

// Of a whole slot: 16 rows over 256 columns, whose activations begin at shared address `x`.
__device__ __forceinline__ void multiply_slot(float (&sum)[4], u32 slot, u32 x) {
  u32 positions[4];
  load_shared_x4(slot + (threadIdx.x & 31) * 16, positions);
  multiply<4>(sum, positions, slot + 512, x);
}

// The sum of row lane % 16 in every lane.
__device__ __forceinline__ float row_sum(const float (&sum)[4]) {
  const int lane = threadIdx.x & 31, from = (lane & 7) * 4;
  const float low = __shfl_sync(ALL, sum[0], from), high = __shfl_sync(ALL, sum[2], from);
  return lane & 8 ? high : low;
}
