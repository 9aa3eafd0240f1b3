// What the kernel behind this one will read, asked for as far as L2: memory would have nothing to do while one kernel ends and the next
// waits for it (sm_90 and newer; elsewhere nothing).
#pragma once

// Bytes of one request.
#define AHEAD_PIECE 4096

// `rows` stretches of memory of `bytes` each, `stride` bytes apart; where `length` is given, of so many times `bytes`. All are multiples
// of 16.
struct Ahead {
  const unsigned char* first;  // null: nothing
  const unsigned char* second; // of the same shape, or null
  const int* length;           // what the last step left serves: a hint may be short
  long long stride;
  int rows, bytes;
  int early; // as soon as the kernel's own first loads are on their way, else behind the last of them
};

// One thread of each of `count` calls it, `index` being which.
__device__ __forceinline__ void fetch_for_next(const Ahead& a, int index, int count) {
#if __CUDA_ARCH__ >= 900
  int bytes = a.bytes;
  if (a.length) {
    int length;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(length) : "l"(a.length) : "memory");
    bytes *= length;
  }
  const int pieces = (bytes + AHEAD_PIECE - 1) / AHEAD_PIECE, all = pieces * a.rows;
#pragma unroll 1
  for (int i = index; i < all; i += count) {
    const int at = i % pieces * AHEAD_PIECE, some = min(AHEAD_PIECE, bytes - at);
    const long long place = i / pieces * a.stride + at;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(a.first + place), "r"(some) : "memory");
    if (a.second) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(a.second + place), "r"(some) : "memory");
  }
#endif
}
