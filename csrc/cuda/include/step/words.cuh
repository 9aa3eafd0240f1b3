// Words that blocks of a running kernel hand each other: whoever needs one reads it until it is there. A word that nobody has published
// yet is EMPTY, which no result is.
#pragma once
#include "fragments.cuh"

#define EMPTY 0xffffffffu

__device__ __forceinline__ void publish(u32* at, u32 v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory");
}

__device__ __forceinline__ uint4 look(const u32* at) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
  return v;
}

__device__ __forceinline__ uint2 look_two(const u32* at) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at) : "memory");
  return v;
}

__device__ __forceinline__ u32 look_one(const u32* at) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
  return v;
}

__device__ __forceinline__ bool lacks(const uint4& v) { return max(max(v.x, v.y), max(v.z, v.w)) == EMPTY; }

// Words that a block of an earlier phase publishes, when they are there.
__device__ __forceinline__ uint4 await(const u32* at) {
  uint4 v = look(at);
  while (lacks(v))
    v = look(at);
  return v;
}

__device__ __forceinline__ u32 await_one(const u32* at) {
  u32 v = look_one(at);
  while (v == EMPTY)
    v = look_one(at);
  return v;
}
