// What every kernel on mma.sync does with 16-bit weights and activations: conversions, loads, products.
//
// Macro: ELEM_BF16, 1 for bfloat16, 0 for float16.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ float to_float(u16 v) {
#if ELEM_BF16
  return __uint_as_float((u32)v << 16);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
#endif
}

__device__ __forceinline__ u16 from_float(float f) {
  u16 v;
#if ELEM_BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
#endif
  return v;
}

// Weights are read once: kept out of L1, and first to leave L2 so that activations stay.
__device__ __forceinline__ u64 weight_policy() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Activations are read by many blocks: last to leave L2.
__device__ __forceinline__ u64 activation_policy() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ uint4 load_weight(const uint4* p, u64 policy) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "l"(policy));
  return v;
}

__device__ __forceinline__ void ldmatrix_x4(u32 address, u32 (&b)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_shared_x4(u32 address, u32 (&b)[4]) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(address) : "memory");
}

// Only where `condition` holds; elsewhere b stays.
__device__ __forceinline__ void load_shared_x4_if(u32 address, bool condition, u32 (&b)[4]) {
  asm volatile("{\n"
               ".reg .pred holds;\n"
               "setp.ne.u32 holds, %5, 0;\n"
               "@holds ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               "}"
               : "+r"(b[0]), "+r"(b[1]), "+r"(b[2]), "+r"(b[3])
               : "r"(address), "r"((u32)condition)
               : "memory");
}

#if ELEM_BF16
#define MMA_TYPES "f32.bf16.bf16.f32"
#else
#define MMA_TYPES "f32.f16.f16.f32"
#endif

__device__ __forceinline__ void mma_dense(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col." MMA_TYPES " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
