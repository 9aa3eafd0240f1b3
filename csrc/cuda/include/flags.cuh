// Flags in global memory, by which blocks tell each other that sums are there: what was written before a flag is seen behind it, also by
// threads that meet whoever reads it. Needs the type u32 before it.
#pragma once

__device__ __forceinline__ u32 load_acquire(const u32* flag) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(flag) : "memory");
  return v;
}

__device__ __forceinline__ void store_release(u32* flag, u32 v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(v) : "memory");
}
