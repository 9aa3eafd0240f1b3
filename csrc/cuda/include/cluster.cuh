// Blocks of a cluster along y that put values into each other's shared memory (sm_90).
#pragma once

typedef unsigned int u32;

__device__ __forceinline__ u32 cluster_rank() { return blockIdx.y; }

// All threads of all blocks meet: what each has stored in a block's shared memory before it arrives is seen there behind the wait.
__device__ __forceinline__ void cluster_arrive() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The address in block `rank` of what lies at shared address `address` here.
__device__ __forceinline__ u32 address_in(u32 address, u32 rank) {
  u32 remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

__device__ __forceinline__ void push(u32 remote, u32 v) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(remote), "r"(v) : "memory");
}

__device__ __forceinline__ void push(u32 remote, uint2 v) {
  asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(remote), "r"(v.x), "r"(v.y) : "memory");
}
