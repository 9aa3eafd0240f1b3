// 8-bit levels of activation rows for the products of quantised weights, see levels.cuh; ELEMENT is the type of the rows.
//
//   levels  (m, cols), row stride `pitch` bytes, a multiple of 16; columns behind `cols` are left as they are
//   scales  (m,)
//
// One block takes one row: its first THREADS * HELD vectors stay in registers between the search for the largest magnitude and the
// rounding; what is behind them is read again, from L1 or L2.
#include "element.cuh"
#include "levels.cuh"

#define THREADS 256
#define HELD 4

struct Params {
  const void* x; // (m, cols), row stride `stride` elements, columns contiguous
  unsigned char* levels;
  float* scales;
  long long stride;
  int cols, pitch;
  int vector; // rows of x are 16-byte aligned and cols is a multiple of 8
};

__device__ __forceinline__ float larger(float most, const float (&f)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j)
    most = fmaxf(most, fabsf(f[j]));
  return most;
}

extern "C" __global__ void __launch_bounds__(THREADS) quantise_rows(const __grid_constant__ Params p) {
  __shared__ float room[THREADS / 32];
  release_successor();
  wait_predecessor();
  const long long row = blockIdx.x, first = row * p.stride;
  const uint4* source = (const uint4*)((const u16*)p.x + first);
  const int vectors = p.vector ? p.cols / 8 : 0;
  uint4 held[HELD];
#pragma unroll
  for (int k = 0; k < HELD; ++k) {
    const int i = threadIdx.x + k * THREADS;
    held[k] = i < vectors ? source[i] : make_uint4(0, 0, 0, 0);
  }
  float most = 0, f[8];
#pragma unroll
  for (int k = 0; k < HELD; ++k) {
    unpack<ELEMENT>(held[k], f);
    most = larger(most, f);
  }
  for (int i = threadIdx.x + HELD * THREADS; i < vectors; i += THREADS) {
    unpack<ELEMENT>(source[i], f);
    most = larger(most, f);
  }
  for (int i = vectors * 8 + threadIdx.x; i < p.cols; i += THREADS)
    most = fmaxf(most, fabsf(load_element<ELEMENT>(p.x, first + i)));
  most = largest_of_block<THREADS / 32>(most, room);
  const float times = times_of(most);
  if (threadIdx.x == 0) p.scales[row] = scale_of(most);
  unsigned char* target = p.levels + row * p.pitch;
#pragma unroll
  for (int k = 0; k < HELD; ++k) {
    const int i = threadIdx.x + k * THREADS;
    unpack<ELEMENT>(held[k], f);
    if (i < vectors) ((uint2*)target)[i] = levels_of(f, times);
  }
  for (int i = threadIdx.x + HELD * THREADS; i < vectors; i += THREADS) {
    unpack<ELEMENT>(source[i], f);
    ((uint2*)target)[i] = levels_of(f, times);
  }
  for (int i = vectors * 8 + threadIdx.x; i < p.cols; i += THREADS) {
    const float one[8] = {load_element<ELEMENT>(p.x, first + i)};
    target[i] = (unsigned char)levels_of(one, times).x;
  }
}
