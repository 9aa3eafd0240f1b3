// Activations of any of three types, 16 bytes at a time, and what every kernel of a decode step does at its start.
#pragma once

#include "dependent.cuh"

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

// Values of the macros ELEMENT and LOGITS.
#define F16 0
#define BF16 1
#define F32 2

// Elements of 16 bytes.
template <int KIND>
constexpr int VECTOR_OF = KIND == F32 ? 4 : 8;
template <int KIND>
constexpr int BYTES_OF = 16 / VECTOR_OF<KIND>;

template <int KIND>
__device__ __forceinline__ void unpack(const uint4& v, float (&f)[VECTOR_OF<KIND>]) {
  const u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (KIND == F32) {
      f[i] = __uint_as_float(word[i]);
    } else if constexpr (KIND == BF16) {
      f[2 * i] = __uint_as_float(word[i] << 16);
      f[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    } else {
      asm("{.reg .f16 low, high;\n mov.b32 {low, high}, %2;\n cvt.f32.f16 %0, low;\n cvt.f32.f16 %1, high;}"
          : "=f"(f[2 * i]), "=f"(f[2 * i + 1])
          : "r"(word[i]));
    }
  }
}

template <int KIND>
__device__ __forceinline__ uint4 pack(const float (&f)[VECTOR_OF<KIND>]) {
  u32 word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (KIND == F32)
      word[i] = __float_as_uint(f[i]);
    else if constexpr (KIND == BF16)
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word[i]) : "f"(f[2 * i + 1]), "f"(f[2 * i]));
    else
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word[i]) : "f"(f[2 * i + 1]), "f"(f[2 * i]));
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

template <int KIND>
__device__ __forceinline__ float load_element(const void* base, long long index) {
  if constexpr (KIND == F32) {
    return ((const float*)base)[index];
  } else if constexpr (KIND == BF16) {
    return __uint_as_float((u32)((const u16*)base)[index] << 16);
  } else {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(((const u16*)base)[index]));
    return f;
  }
}

template <int KIND>
__device__ __forceinline__ void store_element(void* base, long long index, float f) {
  if constexpr (KIND == F32) {
    ((float*)base)[index] = f;
  } else {
    u16 v;
    if constexpr (KIND == BF16)
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
    else
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
    ((u16*)base)[index] = v;
  }
}
