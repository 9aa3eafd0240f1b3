// y from fragments of accumulators. Needs decode_common.cuh before it. The code of a kernel's end is fetched while nothing else goes on, so
// it is kept short: what few calls need stands in branches of its own.
#pragma once

// Transposes an 8 x 8 matrix of 16-bit elements that a warp holds as a fragment.
__device__ __forceinline__ u32 transpose(u32 v) {
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(v));
  return v;
}

__device__ __forceinline__ u32 from_floats(float low, float high) {
  u32 v;
#if ELEM_BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#endif
  return v;
}

// Stores 16 rows, from `row` on, for activation rows 8 * first .. 8 * (first + COUNT) - 1; every lane of the warp calls it.
template <int COUNT>
__device__ __forceinline__ void store_fragments(const Params& p, float (&d)[COUNT][4], int first, int row) {
  const int lane = threadIdx.x & 31, group = lane >> 2, pair = (lane & 3) * 2;
  if (p.bias) {
    const float low = row + group < p.rows ? to_float(p.bias[row + group]) : 0;
    const float high = row + group + 8 < p.rows ? to_float(p.bias[row + group + 8]) : 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      d[i][0] += low;
      d[i][1] += low;
      d[i][2] += high;
      d[i][3] += high;
    }
  }
  if (p.relu) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        d[i][j] = fmaxf(d[i][j], 0.0f);
  }
  if (p.y_vector) {
    // A lane holds two activation rows of one weight row; transposed, two neighbouring weight rows of one activation row.
    const size_t at = (size_t)(8 * first + group) * p.rows + row + pair, step = (size_t)8 * p.rows;
    const int left = p.m - 8 * first - group; // activation rows from this lane's first one on
    const bool inside[2] = {row + pair < p.rows, row + pair + 8 < p.rows};
    if (p.residual) {
      const u16* residual = p.residual + at;
#pragma unroll
      for (int i = 0; i < COUNT; ++i, residual += step)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const u32 v = transpose(8 * i < left && inside[half] ? *(const u32*)(residual + 8 * half) : 0);
          d[i][2 * half] += to_float((u16)v);
          d[i][2 * half + 1] += to_float((u16)(v >> 16));
        }
    }
    u16* y = p.y + at;
#pragma unroll
    for (int i = 0; i < COUNT; ++i, y += step)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const u32 v = transpose(from_floats(d[i][2 * half], d[i][2 * half + 1]));
        if (8 * i < left && inside[half]) *(u32*)(y + 8 * half) = v;
      }
    return;
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int n = 8 * (first + i) + pair + (j & 1), r = row + group + (j >> 1) * 8;
      if (n >= p.m || r >= p.rows) continue;
      const size_t at = (size_t)n * p.rows + r;
      p.y[at] = from_float(p.residual ? d[i][j] + to_float(p.residual[at]) : d[i][j]);
    }
}
