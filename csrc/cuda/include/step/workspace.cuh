// The shared memory in which a block's workers hold a phase's input and meet.
#pragma once
#include "step/model.cuh"

// Lanes that waited for words of their own meet first: the barrier is the warp's.
__device__ __forceinline__ void workers_sync() {
  __syncwarp();
  asm volatile("bar.sync 1, %0;" ::"n"(WORKERS) : "memory");
}

// Shared memory of the workers.
struct Workspace {
  u32 x;       // shared address of the activations that a phase multiplies; ZERO bytes of zeros before them
  u16* values; // the same
  float* sums; // 16 of each job
  float2* moments;
  long long* clocks; // null, or when thread 0 had what a phase waits for, and when it was done with it
  int phase;
};

#define ZERO 16

__device__ __forceinline__ void note(const Workspace& w, int which) {
  if (w.clocks && threadIdx.x == 0) w.clocks[w.phase * 2 + which] = clock64();
}
