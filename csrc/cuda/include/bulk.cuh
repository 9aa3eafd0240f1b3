// Barriers in shared memory and the copies that they wait for: bulk copies on sm_90 and newer, a warp's own copies of 16 bytes before.
#pragma once

__device__ __forceinline__ void barrier_init(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_init_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// A warp, whose lanes have met, arrives: one lane for all. EVERY_LANE_ARRIVES is 1 for tools that look for races, which see that an arrival
// orders what its own lane did, but not what lanes did that met it before.
#ifndef EVERY_LANE_ARRIVES
#define EVERY_LANE_ARRIVES 0
#endif
#define WARP_ARRIVALS (EVERY_LANE_ARRIVES ? 32 : 1)

__device__ __forceinline__ void warp_arrive(u32 barrier) {
  if (EVERY_LANE_ARRIVES || (threadIdx.x & 31) == 0) barrier_arrive(barrier);
}

#if __CUDA_ARCH__ >= 900
#define BARRIER_TRY "mbarrier.try_wait.parity.shared::cta.b64"
#else
#define BARRIER_TRY "mbarrier.test_wait.parity.shared::cta.b64"
#endif

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile("{\n"
               ".reg .pred done;\n"
               "again:\n" BARRIER_TRY " done, [%0], %1;\n"
               "@!done bra again;\n"
               "}" ::"r"(barrier),
               "r"(parity)
               : "memory");
}

#if __CUDA_ARCH__ >= 900
// Arrives, and announces `bytes` more to come before the barrier opens.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Starts copying `bytes` from `source` to shared address `target`, both 16-byte aligned; `barrier` counts them.
__device__ __forceinline__ void bulk_copy(u32 target, const void* source, u32 bytes, u32 barrier, u64 policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(target),
               "l"(source), "r"(bytes), "r"(barrier), "l"(policy)
               : "memory");
}

// The same in every block of the cluster that `blocks` has a bit for, at the same addresses in each.
__device__ __forceinline__ void bulk_copy_to_all(u32 target, const void* source, u32 bytes, u32 barrier, u16 blocks, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], [%1], %2, [%3], %4, %5;" ::
          "r"(target),
      "l"(source), "r"(bytes), "r"(barrier), "h"(blocks), "l"(policy)
      : "memory");
}

// What the driver makes of a tensor's description (CUtensorMap).
struct alignas(64) TensorMap {
  u64 words[16];
};

// Starts copying the box at column `column` and row `row` of the tensor that `map` describes to shared address `target`; `barrier` counts
// it whole, what lies behind the tensor's end (zeros) included.
__device__ __forceinline__ void tensor_copy(u32 target, const u64* map, int column, int row, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(
          target),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy)
      : "memory");
}

// The same in every block of the cluster that `blocks` has a bit for, at the same addresses in each.
__device__ __forceinline__ void tensor_copy_to_all(u32 target, const u64* map, int column, int row, u32 barrier, u16 blocks, u64 policy) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
               " [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(target),
               "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks), "l"(policy)
               : "memory");
}

// Has the description at hand before the first copy needs it.
__device__ __forceinline__ void prefetch_map(const u64* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// Arrives at the barrier that block `rank` of the cluster has where this one has `barrier`; says nothing of ordinary accesses to memory.
__device__ __forceinline__ void barrier_arrive_in(u32 barrier, u32 rank) {
  asm volatile("{\n"
               ".reg .b32 remote;\n"
               "mapa.shared::cluster.u32 remote, %0, %1;\n"
               "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
               "}" ::"r"(barrier),
               "r"(rank)
               : "memory");
}

// warp_arrive at those of blocks `first` to first + BLOCKS - 1 of the cluster.
template <int BLOCKS>
__device__ __forceinline__ void warp_arrive_in(u32 barrier, u32 first) {
  const u32 lane = threadIdx.x & 31;
  if constexpr (BLOCKS == 1) {
    warp_arrive(barrier);
  } else if constexpr (EVERY_LANE_ARRIVES) {
    for (u32 rank = 0; rank < BLOCKS; ++rank)
      barrier_arrive_in(barrier, first + rank);
  } else {
    if (lane < BLOCKS) barrier_arrive_in(barrier, first + lane);
  }
}
#endif

// A thread's own copy of 16 bytes, on sm_80 and newer.
__device__ __forceinline__ void copy_vector(u32 target, const uint4* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

// A warp copies `count` uint4 from `source` to shared address `target`; `barrier`, made for COPY_ARRIVALS, opens when they have arrived.
#if __CUDA_ARCH__ >= 900
#define COPY_ARRIVALS 1
__device__ __forceinline__ void copy_block(u32 target, const uint4* source, u32 count, u32 barrier, u64 policy) {
  if ((threadIdx.x & 31) != 0) return;
  barrier_expect(barrier, count * 16);
  bulk_copy(target, source, count * 16, barrier, policy);
}
#else
#define COPY_ARRIVALS 32
__device__ __forceinline__ void copy_block(u32 target, const uint4* source, u32 count, u32 barrier, u64) {
  for (u32 i = threadIdx.x & 31; i < count; i += 32)
    copy_vector(target + i * 16, source + i);
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
#endif
