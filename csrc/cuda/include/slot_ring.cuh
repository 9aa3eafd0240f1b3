// Slots that are filled and emptied in turn, each with a barrier. Needs the type u32 before it.
#pragma once
#include "bulk.cuh"

// Which is next, and the parity that its barrier has then.
struct Ring {
  u32 slot, parity;
  __device__ __forceinline__ void advance(u32 size) {
    if (++slot == size) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// The barriers of a warp's own slots; every lane calls it.
__device__ __forceinline__ void init_own_barriers(u32 barriers, int slots, int arrivals) {
  if ((threadIdx.x & 31) == 0) {
    for (int s = 0; s < slots; ++s)
      barrier_init(barriers + 8 * s, arrivals);
    barrier_init_fence();
  }
  __syncwarp();
}
