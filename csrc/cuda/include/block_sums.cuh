// How the sums of decode_wgmma.cu's warps and blocks meet and leave: what finish_and_store of decode_common.cuh does, for the many sums of
// many activation rows. Residuals, the bias and other blocks' sums are far, so a thread fetches several before it uses the first; such a
// kernel has the registers. Needs decode_common.cuh before it.
#pragma once
#include "addend.cuh"

// Fours that a thread has on their way at once.
#define AT_ONCE 4

// The bias, which comes from memory like the weights, on its way to L2: the epilogue would wait for it.
__device__ __forceinline__ void prefetch_bias(const Params& p) {
  const int first = blockIdx.x * BLOCK_ROWS, last = min(first + BLOCK_ROWS, p.rows);
  for (int row = first; p.bias && row < last; row += 64)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p.bias + row));
}

// Four of the sums of all k-warps.
__device__ __forceinline__ float4 add_warps(const float4* red, const Params& p, int at) {
  const int plane = staged_rows(p.m) * (RED_PITCH / 4);
  float4 sum = red[at];
#pragma unroll
  for (int k = 1; k < WARPS_K; ++k)
    add_four(sum, red[k * plane + at]);
  return sum;
}

// Adds up what the warps have collected and writes it to y.
__device__ __forceinline__ void store_sums(const float4* red, const Params& p, int first_row) {
  constexpr int PITCH = RED_PITCH / 4, FOURS = BLOCK_ROWS / 4;
  const int count = p.m * FOURS;
  for (int first = threadIdx.x; first < count; first += AT_ONCE * THREADS) {
    Addend add[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int e = first + i * THREADS;
      if (e < count) add[i] = load_addend(p, e / FOURS, first_row + e % FOURS * 4);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int e = first + i * THREADS, n = e / FOURS, four = e % FOURS;
      if (e < count) store_vector(p, n, first_row + four * 4, add_warps(red, p, n * PITCH + four), add[i]);
    }
  }
}

// Adds up this block's share of what the splits, S at most, have collected and writes it to y, FLIGHT fours for each thread at a time.
// VECTOR: y_vector.
template <int S, int FLIGHT, bool VECTOR>
__device__ __forceinline__ void store_splits(const float4* red, const Params& p, int first_row) {
  constexpr int PITCH = RED_PITCH / 4, FOURS = BLOCK_ROWS / 4;
  const int splits = gridDim.y, count = p.m * FOURS, step = splits * THREADS, column = blockIdx.x % CLUSTER;
  // Every thread of the cluster goes as many rounds, one at least.
  for (int first = 0; first < count; first += FLIGHT * step) {
    const int own = first + blockIdx.y * THREADS + threadIdx.x;
    Addend add[FLIGHT];
    float4 parts[FLIGHT][S];
#pragma unroll
    for (int i = 0; i < FLIGHT; ++i) {
      const int e = own + i * step;
      if (VECTOR && e < count) add[i] = load_addend(p, e / FOURS, first_row + e % FOURS * 4);
    }
#pragma unroll
    for (int i = 0; i < FLIGHT; ++i) {
      const int e = min(own + i * step, count - 1);
      const u32 address = shared_address(red + e / FOURS * PITCH + e % FOURS);
#pragma unroll
      for (int s = 0; s < S; ++s)
        if (s < splits && first + i * step < count) parts[i][s] = cluster_read(address, s * CLUSTER + column);
    }
#pragma unroll
    for (int i = 0; i < FLIGHT; ++i)
#pragma unroll
      for (int s = 1; s < S; ++s)
        if (s < splits) add_four(parts[i][0], parts[i][s]);
    // A block may not leave while others still read its shared memory: what it stores need not have arrived.
    __syncwarp();
    if (first + FLIGHT * step >= count) cluster_arrive();
#pragma unroll
    for (int i = 0; i < FLIGHT; ++i) {
      const int e = own + i * step, n = e / FOURS, row = first_row + e % FOURS * 4;
      if (e >= count) continue;
      if (VECTOR)
        store_vector(p, n, row, parts[i][0], add[i]);
      else
        store_four(p, n, row, parts[i][0]);
    }
    __syncwarp();
  }
  cluster_wait();
}

// Sums what the warps have collected over k-warps and cluster blocks and writes y's rows of this block row; every thread of the block calls
// it, after a barrier.
__device__ __forceinline__ void finish_block(float* sums, const Params& p) {
  constexpr int PITCH = RED_PITCH / 4, FOURS = BLOCK_ROWS / 4;
  float4* red = (float4*)sums;
  const int first_row = blockIdx.x * BLOCK_ROWS, splits = gridDim.y, count = p.m * FOURS;
  if (splits == 1) {
    if (p.y_vector)
      store_sums(red, p, first_row);
    else
#pragma unroll 1
      for (int e = threadIdx.x; e < count; e += THREADS)
        store_four(p, e / FOURS, first_row + e % FOURS * 4, add_warps(red, p, e / FOURS * PITCH + e % FOURS));
    return;
  }
#if WARPS_K > 1
  for (int e = threadIdx.x; e < count; e += THREADS) {
    const int at = e / FOURS * PITCH + e % FOURS;
    red[at] = add_warps(red, p, at);
  }
  __syncwarp();
#endif
  cluster_sync();
  if (!p.y_vector)
    store_splits<8, 1, false>(red, p, first_row);
  else if (splits <= 4)
    store_splits<4, AT_ONCE, true>(red, p, first_row);
  else
    store_splits<8, AT_ONCE / 2, true>(red, p, first_row);
}
