// 16-bit values: two in a word, eight in a vector.
#pragma once
#include "fragments.cuh"

__device__ __forceinline__ uint4 read_shared(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
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

__device__ __forceinline__ u32 add_words(u32 a, u32 b) {
  return pack_two(to_float((u16)(a & 0xffffu)) + to_float((u16)(b & 0xffffu)), to_float((u16)(a >> 16)) + to_float((u16)(b >> 16)));
}
