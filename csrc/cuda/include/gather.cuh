// Blocks of a cluster hand small results to its block 0, each result with its arrival at a barrier there (sm_90 and newer; elsewhere no
// launch has clusters).
#pragma once
#include "element.cuh"
#include "bulk.cuh"

// Every thread calls it at the kernel's start. `bytes` will be handed over to `barrier` of block 0.
__device__ __forceinline__ void gather_open(u64* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  if (blockIdx.y == 0 && threadIdx.x == 0) {
    const u32 address = (u32)__cvta_generic_to_shared(barrier);
    barrier_init(address, 1);
    barrier_init_fence();
    barrier_expect(address, bytes);
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

// Every thread calls it before the first gather_store: block 0 runs and its barrier is there.
__device__ __forceinline__ void gather_ready() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Puts v in block 0 where this block has `target`.
__device__ __forceinline__ void gather_store(u64* barrier, void* target, u32 v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n"
               ".reg .b32 remote_target, remote_barrier;\n"
               "mapa.shared::cluster.u32 remote_target, %0, 0;\n"
               "mapa.shared::cluster.u32 remote_barrier, %1, 0;\n"
               "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [remote_target], %2, [remote_barrier];\n"
               "}" ::"r"((u32)__cvta_generic_to_shared(target)),
               "r"((u32)__cvta_generic_to_shared(barrier)), "r"(v)
               : "memory");
#endif
}

// In block 0: all bytes have come.
__device__ __forceinline__ void gather_wait(u64* barrier) {
#if __CUDA_ARCH__ >= 900
  barrier_wait((u32)__cvta_generic_to_shared(barrier), 0);
#endif
}
