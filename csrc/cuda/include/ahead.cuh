// What the kernel behind this one reads first, asked for as far as L2: memory would have nothing to do while one kernel ends and the next
// waits for it (sm_90 and newer; elsewhere nothing).
#pragma once

// Bytes of one request.
#define AHEAD_PIECE 4096

struct Ahead {
  const unsigned char* first; // 16-byte aligned
  int bytes;                  // a multiple of 16; 0: nothing
};

// One thread of each of `count` calls it, `index` being which.
__device__ __forceinline__ void fetch_for_next(const Ahead& a, int index, int count) {
#if __CUDA_ARCH__ >= 900
#pragma unroll 1
  for (int at = index * AHEAD_PIECE; at < a.bytes; at += count * AHEAD_PIECE)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(a.first + at), "r"(min(AHEAD_PIECE, a.bytes - at)) : "memory");
#endif
}
