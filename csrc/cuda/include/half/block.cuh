// What the kernels of half a layer have in common: how many warps and blocks share it, and shared memory by addresses.
//
// Macros: PATTERN 24 or 48; ELEM_BF16; HIDDEN, a multiple of 256; CLUSTER, blocks of a cluster, along y; MIN_BLOCKS that must fit one
// multiprocessor (bounds the registers); SHARED_BYTES of dynamic shared memory.
#pragma once
#include "fragments.cuh"
#include "bulk.cuh"
#include "cluster.cuh"
#include "dependent.cuh"
#include "warp.cuh"

#define WARPS 12
#define THREADS (32 * WARPS)
#define UNITS (HIDDEN / 256)
#define SLOT_BYTES 4608

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

__device__ __forceinline__ void unpack(const uint4& v, float (&f)[8]) {
  const u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    f[2 * i] = to_float((u16)(word[i] & 0xffffu));
    f[2 * i + 1] = to_float((u16)(word[i] >> 16));
  }
}

__device__ __forceinline__ u32 pack_two(float low, float high) { return (u32)from_float(low) | (u32)from_float(high) << 16; }

// Where word `k` (two columns) of the activations lies, in words: a lane's part of operand B of a step of 32 columns is 16 bytes.
__device__ __forceinline__ u32 place_of_word(u32 k) {
#if PATTERN == 24
  return (k & ~15u) | (k & 3) << 2 | (k >> 2 & 3);
#else
  return k;
#endif
}
