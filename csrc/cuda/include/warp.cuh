// Sums and maxima over the lanes of a warp.
#pragma once

#define ALL 0xffffffffu

// Of the SIZE lanes, a power of two, that the lane is in a group with.
template <int SIZE>
__device__ __forceinline__ float group_sum(float v) {
#pragma unroll
  for (int offset = SIZE / 2; offset; offset >>= 1)
    v += __shfl_xor_sync(ALL, v, offset);
  return v;
}

__device__ __forceinline__ float warp_sum(float v) { return group_sum<32>(v); }

// Of the lanes with the same place in their groups of SIZE.
template <int SIZE>
__device__ __forceinline__ float sum_of_groups(float v) {
#pragma unroll
  for (int offset = SIZE; offset < 32; offset <<= 1)
    v += __shfl_xor_sync(ALL, v, offset);
  return v;
}

template <int SIZE>
__device__ __forceinline__ float max_of_groups(float v) {
#pragma unroll
  for (int offset = SIZE; offset < 32; offset <<= 1)
    v = fmaxf(v, __shfl_xor_sync(ALL, v, offset));
  return v;
}
