// A dense copy of a 2:4 or 4:8 weight in fragment order (decode_nm.cu describes it), for products of so many rows that expanding the weight
// once costs less than running them in slabs.
//   GROUP   4 or 8
//   dense   (rows, cols) 16-bit elements, row-major; every element is written
//
// A warp takes one tile of 16 rows by one unit of 256 columns; lane (g, t) the rows g and g + 8 of it.
#include "dependent.cuh"

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

struct Params {
  const uint4* weight; // [T][U][9][32]
  const u32* offsets;  // of expand_unstructured.cu alone, as is depth
  u16* dense;
  int rows, cols, units, tiles;
  int depth;
};

#define THREADS 256

#if GROUP == 8
#include "expand.cuh"

// Eight columns of a row, from `column` on.
__device__ __forceinline__ void store_eight(const Params& p, int row, int column, u32 a, u32 b, u32 c, u32 d) {
  if (row >= p.rows || column >= p.cols) return; // columns come in groups of eight
  *(uint4*)(p.dense + (size_t)row * p.cols + column) = make_uint4(a, b, c, d);
}
#else

// Four columns of a row, from `column` on.
__device__ __forceinline__ void store_four(const Params& p, int row, int column, u64 four) {
  if (row >= p.rows || column >= p.cols) return;
  u16* at = p.dense + (size_t)row * p.cols + column;
  if (p.cols % 4 == 0) {
    *(u64*)at = four;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (column + i < p.cols) at[i] = (u16)(four >> (16 * i));
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS) expand_nm(const __grid_constant__ Params p) {
  release_successor();
  const int unit = (blockIdx.x * THREADS + threadIdx.x) / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if (unit >= p.tiles * p.units) return;
  const int row = unit / p.units * 16 + g, first = unit % p.units * 256;
  const uint4* source = p.weight + (size_t)unit * (9 * 32);
  uint4 values[8];
#pragma unroll
  for (int s = 0; s < 8; ++s)
    values[s] = source[(1 + s) * 32 + lane];
  // The copy before this one may still be read.
  wait_predecessor();
#if GROUP == 8
  const uint4 lane_masks = source[lane];
  const u32 masks[4] = {lane_masks.x, lane_masks.y, lane_masks.z, lane_masks.w};
  u32 codes[4], a[8];
#pragma unroll
  for (int s = 0; s < 8; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      codes[i] = s % 2 == 0 ? code_selectors(masks[s / 2], i) : codes[i] >> 16;
    expand_step(values[s], codes, a);
    store_eight(p, row, first + s * 32 + t * 8, a[0], a[2], a[4], a[6]);
    store_eight(p, row + 8, first + s * 32 + t * 8, a[1], a[3], a[5], a[7]);
  }
#else
  const unsigned char* positions = (const unsigned char*)source;
#pragma unroll
  for (int s = 0; s < 8; ++s) {
    const u32 words[4] = {values[s].x, values[s].y, values[s].z, values[s].w};
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const u32 byte = positions[(g * 4 + (s & 1) * 2 + k) * 16 + (s >> 1) * 4 + half * 2 + (t >> 1)],
                  nibble = byte >> (4 * (t & 1)) & 15;
        const u32 pair = words[2 * k + half];
        const u64 four = (u64)(pair & 0xffff) << (16 * (nibble & 3)) | (u64)(pair >> 16) << (16 * (nibble >> 2));
        store_four(p, row + 8 * half, first + s * 32 + k * 16 + t * 4, four);
      }
  }
#endif
}
