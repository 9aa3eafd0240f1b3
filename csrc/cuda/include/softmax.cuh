// Attention in pieces: weighted values whose weights' sum and maximum are carried along (online softmax, Milakov and Gimelshein 2018).
// Weights are powers of two: scores hold the factor LOG2E.
//
// Macro: HEAD_SIZE.
#pragma once
#include "warp.cuh"

// Below every score; finite, so that the difference of two is a number.
#define LOWEST -3.0e38f
#define LOG2E 1.44269504f

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Weighted values, the weights' sum and the maximum that both are relative to, of some positions.
struct Partial {
  float values[HEAD_SIZE], sum, maximum;
};

// Adds a position of `weight` with values `f` to what a lane carries along.
__device__ __forceinline__ void add_weighted(float weight, const float (&f)[8], float (&values)[8], float& sum) {
  sum += weight;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    values[i] += weight * f[i];
}
