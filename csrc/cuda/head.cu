// logits = x · Wᵀ of an output head of 16-bit values for one activation row.
//
//   warp w of all W:   groups of ROWS rows w, w + W, w + 2W ..., each a block of memory that one copy brings
//   global W --copies by each warp for itself--> SLOTS slots per warp --> lane l: vectors l, l + 32, ... of 16 bytes of each row
//
// What fills the slots is on its way before predecessors have ended; AHEAD further groups come as far as L2 (sm_90).
//
// Macros: ELEM_BF16; WIDTH, a multiple of 256; ROWS; SLOTS; WARPS of a block; AHEAD.
#include "dependent.cuh"
#include "fragments.cuh"
#include "bulk.cuh"
#include "warp.cuh"

#define THREADS (32 * WARPS)
#define ROW_VECTORS (WIDTH / 8)
#define SLOT_BYTES (ROWS * WIDTH * 2)

struct Params {
  const uint4* weight; // (vocabulary, WIDTH)
  const uint4* x;      // (WIDTH,)
  u16* logits;         // (vocabulary,)
  int vocabulary;
};

__device__ __forceinline__ void unpack(const u32 (&word)[4], float (&f)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    f[2 * i] = to_float((u16)(word[i] & 0xffffu));
    f[2 * i + 1] = to_float((u16)(word[i] >> 16));
  }
}

__device__ __forceinline__ int rows_of(const Params& p, int group) { return min(ROWS, p.vocabulary - group * ROWS); }

__device__ __forceinline__ void fetch_ahead(const Params& p, int group) {
#if __CUDA_ARCH__ >= 900
  const int rows = rows_of(p, group);
  if (rows > 0)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p.weight + (size_t)group * ROWS * ROW_VECTORS), "r"(rows * WIDTH * 2)
                 : "memory");
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) head(const __grid_constant__ Params p) {
  // The warps' slots, then the activations.
  extern __shared__ __align__(128) unsigned char smem[];
  __shared__ u64 barriers[WARPS * SLOTS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int groups = (p.vocabulary + ROWS - 1) / ROWS, step = gridDim.x * WARPS, begin = blockIdx.x * WARPS + warp;
  const u32 slots = shared_address(smem) + warp * SLOTS * SLOT_BYTES, barrier = shared_address(barriers + warp * SLOTS);
  const u32 x = shared_address(smem) + WARPS * SLOTS * SLOT_BYTES;
  const u64 policy = weight_policy();
  if (lane == 0) {
    for (int s = 0; s < SLOTS; ++s)
      barrier_init(barrier + 8 * s, COPY_ARRIVALS);
    barrier_init_fence();
  }
  __syncwarp();
  auto fetch = [&](int slot, int group) {
    if (group < groups)
      copy_block(slots + slot * SLOT_BYTES, p.weight + (size_t)group * ROWS * ROW_VECTORS, rows_of(p, group) * ROW_VECTORS,
                 barrier + 8 * slot, policy);
  };
#pragma unroll 1
  for (int s = 0; s < SLOTS; ++s)
    fetch(s, begin + s * step);
  if (lane < AHEAD) fetch_ahead(p, begin + (SLOTS + lane) * step);
  release_successor();
  wait_predecessor();
  for (int i = threadIdx.x; i < ROW_VECTORS; i += THREADS)
    ((uint4*)(smem + WARPS * SLOTS * SLOT_BYTES))[i] = __ldcg(p.x + i);
  __syncthreads();

  u32 slot = 0, parity = 0;
#pragma unroll 1
  for (int group = begin; group < groups; group += step) {
    float sum[ROWS] = {};
    barrier_wait(barrier + 8 * slot, parity);
    const u32 at = slots + slot * SLOT_BYTES;
    // Rows behind the last one hold what was there before, and are not stored.
#pragma unroll 4
    for (int j = 0; j < ROW_VECTORS / 32; ++j) {
      const int v = j * 32 + lane;
      u32 word[4];
      float a[8], b[8];
      load_shared_x4(x + v * 16, word);
      unpack(word, a);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        load_shared_x4(at + (r * ROW_VECTORS + v) * 16, word);
        unpack(word, b);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          sum[r] += a[i] * b[i];
      }
    }
    __syncwarp();
    fetch(slot, group + SLOTS * step);
    if (++slot == SLOTS) {
      slot = 0;
      parity ^= 1;
    }
    float mine = 0;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float total = warp_sum(sum[r]);
      if (lane == r) mine = total;
    }
    if (lane < rows_of(p, group)) p.logits[group * ROWS + lane] = from_float(mine);
  }
}
