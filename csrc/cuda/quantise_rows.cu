// int8 levels of activation rows for prefill_nm.cu: level = x / scale, rounded to the nearest, with scale = the row's largest magnitude /
// 127.
//
//   levels  (m, cols) int8, row stride `pitch` bytes, a multiple of 16; columns behind `cols` are left as they are
//   scales  (m,)
//
// One block takes one row: it looks for the largest magnitude, and reads the row again, which is in L1 or L2 then.
#include "element.cuh"

#define THREADS 256

struct Params {
  const void* x; // (m, cols), row stride `stride` elements, columns contiguous
  signed char* levels;
  float* scales;
  long long stride;
  int cols, pitch;
  int vector; // rows of x are 16-byte aligned and cols is a multiple of 8
};

__device__ __forceinline__ u32 level_of(float v) { return (u32)__float2int_rn(v) & 255; }

extern "C" __global__ void __launch_bounds__(THREADS) quantise_rows(const __grid_constant__ Params p) {
  __shared__ float largest[THREADS / 32];
  release_successor();
  wait_predecessor();
  const long long row = blockIdx.x, first = row * p.stride;
  const uint4* source = (const uint4*)((const u16*)p.x + first);
  const int vectors = p.vector ? p.cols / 8 : 0;
  float most = 0;
  for (int i = threadIdx.x; i < vectors; i += THREADS) {
    float f[8];
    unpack<ELEMENT>(source[i], f);
#pragma unroll
    for (int j = 0; j < 8; ++j)
      most = fmaxf(most, fabsf(f[j]));
  }
  for (int i = vectors * 8 + threadIdx.x; i < p.cols; i += THREADS)
    most = fmaxf(most, fabsf(load_element<ELEMENT>(p.x, first + i)));
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
  if ((threadIdx.x & 31) == 0) largest[threadIdx.x / 32] = most;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < THREADS / 32; ++i)
    most = fmaxf(most, largest[i]);
  const float times = most > 0 ? 127.0f / most : 0.0f;
  if (threadIdx.x == 0) p.scales[row] = most / 127.0f;
  signed char* target = p.levels + row * p.pitch;
  for (int i = threadIdx.x; i < vectors; i += THREADS) {
    float f[8];
    unpack<ELEMENT>(source[i], f);
    u32 word[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 8; ++j)
      word[j / 4] |= level_of(f[j] * times) << (8 * (j % 4));
    ((uint2*)target)[i] = make_uint2(word[0], word[1]);
  }
  for (int i = vectors * 8 + threadIdx.x; i < p.cols; i += THREADS)
    target[i] = (signed char)level_of(load_element<ELEMENT>(p.x, first + i) * times);
}
