// LayerNorm of rows, one block each, left as 8-bit levels of its rounded values, which products of quantised weights multiply: what
// layernorm.cu and then quantise_rows.cu give. See row_norm.cuh and levels.cuh for the macros.
#include "row_norm.cuh"
#include "levels.cuh"

// No scale is less, so that each has an inverse.
#define LEAST_SCALE 1e-20f

static_assert(VECTOR == 8, "levels are of 16-bit rows");

struct Params {
  const uint4* x; // (rows, width)
  const uint4* weight;
  const uint4* bias;     // (width,)
  unsigned char* levels; // (rows, width), row stride `pitch` bytes, a multiple of 8
  float* scales;         // (rows,)
  const float2* bound;   // what the next product's sums are at most, over the largest level: .x times a row's norm, plus .y; or null
  float* ahead;          // (2, ahead_pitch), that bound of each row and its inverse, where there is one
  int width;             // a multiple of 8, at most THREADS * PER_THREAD vectors
  int pitch;
  int ahead_pitch;
  float eps;
};

extern "C" __global__ void __launch_bounds__(THREADS) layer_norm_levels(const __grid_constant__ Params p) {
  __shared__ float room[ROW_WARPS], squares_of[ROW_WARPS];
  release_successor();
  const int vectors = p.width / VECTOR;
  const Affine affine = load_affine(p.weight, p.bias, vectors);
  wait_predecessor();
  const uint4* source = p.x + (long long)blockIdx.x * vectors;
  float x[PER_THREAD][VECTOR];
#pragma unroll
  for (int j = 0; j < PER_THREAD; ++j) {
    const int v = threadIdx.x + j * THREADS;
    unpack<ELEMENT>(v < vectors ? source[v] : make_uint4(0, 0, 0, 0), x[j]);
  }
  uint4 y[PER_THREAD];
  float most = 0, squares = 0;
  normalise(x, affine, vectors, p.eps, [&](int j, const uint4& row) {
    float f[VECTOR];
    unpack<ELEMENT>(row, f);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      most = fmaxf(most, fabsf(f[i]));
      squares += f[i] * f[i];
    }
    y[j] = row;
  });
  squares = warp_sum(squares);
  if ((threadIdx.x & 31) == 0) squares_of[threadIdx.x / 32] = squares;
  most = largest_of_block<ROW_WARPS>(most, room); // all warps meet
  const float times = times_of(most);
  if (threadIdx.x == 0) {
    p.scales[blockIdx.x] = scale_of(most);
    if (p.bound) {
      float total = 0;
      for (int w = 0; w < ROW_WARPS; ++w)
        total += squares_of[w];
      const float ahead = fmaxf(p.bound->x * sqrtf(total) + p.bound->y, LEAST_SCALE);
      p.ahead[blockIdx.x] = ahead;
      p.ahead[p.ahead_pitch + blockIdx.x] = __frcp_rn(ahead);
    }
  }
  uint2* target = (uint2*)(p.levels + (long long)blockIdx.x * p.pitch);
#pragma unroll
  for (int j = 0; j < PER_THREAD; ++j) {
    const int v = threadIdx.x + j * THREADS;
    if (v >= vectors) continue;
    float f[VECTOR];
    unpack<ELEMENT>(y[j], f);
    target[v] = levels_of(f, times);
  }
}
