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

extern "C" __global__ void __launch_bounds__(THREADS) expand_nm(const __grid_constant__ Params p) {
  release_successor();
  // The copy before this one may still be read.
  wait_predecessor();
  const int unit = (blockIdx.x * THREADS + threadIdx.x) / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if (unit >= p.tiles * p.units) return;
  const int row = unit / p.units * 16 + g, first = unit % p.units * 256;
  const uint4* source = p.weight + (size_t)unit * (9 * 32);
  const unsigned char* positions = (const unsigned char*)source;
  uint4 values[8];
#pragma unroll
  for (int s = 0; s < 8; ++s)
    values[s] = source[(1 + s) * 32 + lane];
#pragma unroll
  for (int s = 0; s < 8; ++s) {
    const u32 words[4] = {values[s].x, values[s].y, values[s].z, values[s].w};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#if GROUP == 4
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const u32 byte = positions[(g * 4 + (s & 1) * 2 + k) * 16 + (s >> 1) * 4 + half * 2 + (t >> 1)],
                  nibble = byte >> (4 * (t & 1)) & 15;
        const u32 pair = words[2 * k + half];
        const u64 four = (u64)(pair & 0xffff) << (16 * (nibble & 3)) | (u64)(pair >> 16) << (16 * (nibble >> 2));
        store_four(p, row + 8 * half, first + s * 32 + k * 16 + t * 4, four);
      }
#else
      const u32 mask = positions[lane * 16 + 2 * s + half];
      const u64 stored = words[2 * half] | (u64)words[2 * half + 1] << 32;
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        u64 four = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int bit = 4 * part + j;
          // Of a kept column, the values before it are as many as the bits below its own.
          const u64 value = stored >> (16 * __popc(mask & ((1u << bit) - 1))) & 0xffff;
          four |= (mask >> bit & 1 ? value : 0) << (16 * j);
        }
        store_four(p, row + 8 * half, first + s * 32 + t * 8 + part * 4, four);
      }
#endif
    }
  }
}
