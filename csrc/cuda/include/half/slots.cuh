// A warp's slot in shared memory, which takes one piece of weight after another.
#pragma once
#include "half/block.cuh"

struct Slot {
  u32 data, barrier, parity;
  u64 policy;

  // Every warp calls it for its own.
  __device__ __forceinline__ void open(u32 slots, u32 barriers) {
    const int warp = threadIdx.x >> 5;
    data = slots + warp * SLOT_BYTES;
    barrier = barriers + warp * 8;
    parity = 0;
    policy = weight_policy();
    if ((threadIdx.x & 31) == 0) {
      barrier_init(barrier, 1);
      barrier_init_fence();
    }
    __syncwarp();
  }

  // A lane announces what it will copy; the lanes have read what the slot had before.
  __device__ __forceinline__ void expect(u32 bytes) const { barrier_expect(barrier, bytes); }
  __device__ __forceinline__ void copy(u32 at, const uint4* source, u32 bytes) const {
    bulk_copy(data + at, source, bytes, barrier, policy);
  }

  __device__ __forceinline__ void fetch(const uint4* source) const {
    if ((threadIdx.x & 31) == 0) {
      expect(SLOT_BYTES);
      copy(0, source, SLOT_BYTES);
    }
  }

  // All that was announced is there.
  __device__ __forceinline__ void wait() {
    barrier_wait(barrier, parity);
    parity ^= 1;
    __syncwarp();
  }
};

// What a slot will be needed for later comes as far as L2.
__device__ __forceinline__ void fetch_ahead(const uint4* source, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
}
