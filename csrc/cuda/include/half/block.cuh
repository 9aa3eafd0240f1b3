// What the kernels of half a layer have in common: how many warps and blocks share it, and shared memory by addresses.
//
// Macros: PATTERN 24 or 48; ELEM_BF16; HIDDEN, a multiple of 256; CLUSTER, blocks of a cluster, along y; MIN_BLOCKS that must fit one
// multiprocessor (bounds the registers); SHARED_BYTES of dynamic shared memory.
#pragma once
#include "values.cuh"
#include "bulk.cuh"
#include "cluster.cuh"
#include "dependent.cuh"
#include "warp.cuh"

#define WARPS 12
#define THREADS (32 * WARPS)
#define UNITS (HIDDEN / 256)
#define SLOT_BYTES 4608

__device__ __forceinline__ u32 cluster_rank() { return blockIdx.y; }

// Lanes that went ways of their own meet first: the cluster's barrier is the warp's.
__device__ __forceinline__ void arrive_together() {
  __syncwarp();
  cluster_arrive();
}

__device__ __forceinline__ void wait_together() {
  __syncwarp();
  cluster_wait();
}

__device__ __forceinline__ u32 load_word(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ float load_float(u32 address) { return __uint_as_float(load_word(address)); }

__device__ __forceinline__ void store_word(u32 address, u32 v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

__device__ __forceinline__ void store_half_word(u32 address, u16 v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(v) : "memory");
}

// Where word `k` (two columns) of the activations lies, in words: a lane's part of operand B of a step of 32 columns is 16 bytes.
__device__ __forceinline__ u32 place_of_word(u32 k) {
#if PATTERN == 24
  return (k & ~15u) | (k & 3) << 2 | (k >> 2 & 3);
#else
  return k;
#endif
}
