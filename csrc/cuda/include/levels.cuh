// 8-bit levels of a row of activations: level = x / scale, rounded to the nearest, with scale = the row's largest magnitude over the
// largest level. Macro LEVELS: 1 e4m3, 2 signed integers, as VALUES of prefill_common.cuh.
#pragma once

#define LARGEST_LEVEL (LEVELS == 1 ? 448.0f : 127.0f)

// Levels of eight neighbours, the first in the lowest byte.
__device__ __forceinline__ uint2 levels_of(const float (&f)[8], float times) {
  u32 word[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#if LEVELS == 1
    u16 low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(f[4 * i + 1] * times), "f"(f[4 * i] * times));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(f[4 * i + 3] * times), "f"(f[4 * i + 2] * times));
    word[i] = low | (u32)high << 16;
#else
    word[i] = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      word[i] |= ((u32)__float2int_rn(f[4 * i + j] * times) & 255) << (8 * j);
#endif
  }
  return make_uint2(word[0], word[1]);
}

// What brings a row to its levels, and the row's scale; a row of zeros has zeros for both.
__device__ __forceinline__ float times_of(float largest) { return largest > 0 ? LARGEST_LEVEL / largest : 0.0f; }
__device__ __forceinline__ float scale_of(float largest) { return largest / LARGEST_LEVEL; }

// The largest of a block's values, none below 0; every thread of the block calls it. `room` has a float for each warp.
template <int WARPS>
__device__ __forceinline__ float largest_of_block(float v, float* room) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, step));
  if ((threadIdx.x & 31) == 0) room[threadIdx.x / 32] = v;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WARPS; ++i)
    v = fmaxf(v, room[i]);
  return v;
}
