// The one activation row of a product, whole in shared memory, or its LayerNorm, which each block takes for itself, once. Needs
// decode_common.cuh before it.
//
// Moments of 256 columns each are taken as layernorm.cu takes a warp's (row_norm.cuh) and joined alike: results are its.
//
// Macros: COLS, a multiple of 256; NORMED; AT_ROW, AT_SHIFT, AT_MOMENTS, where the row, which takes the place of the scales, the shifts
// and the moments lie in shared memory; ROW_WARPS that normalise, the last ones of a block.
#pragma once
#include "ahead.cuh"
#include "bulk.cuh"
#include "values.cuh"
#include "warp.cuh"

#if COLS % 256 != 0
#error "a row has whole pieces of 256 columns"
#endif
#define PIECES (COLS / 256)
#define WARP_PIECES ((PIECES + ROW_WARPS - 1) / ROW_WARPS)
#define ROW_THREADS (32 * ROW_WARPS)
#define SHIFT_BYTES (NORMED * 2 * COLS)
#define MOMENTS_BYTES (NORMED * ((8 * PIECES + 15) / 16 * 16))

struct RowParams {
  Params product;     // m is 1; x is 16-byte aligned
  const uint4* scale; // (COLS,) of the LayerNorm
  const uint4* shift; // (COLS,)
  float eps;
  Ahead ahead; // of the kernel behind this one
};

__device__ __forceinline__ void write_shared(u32 address, const uint4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Of the threads that normalise.
__device__ __forceinline__ u32 row_thread() { return threadIdx.x - (THREADS - ROW_THREADS); }

__device__ __forceinline__ void row_sync() {
  if (ROW_THREADS == THREADS)
    __syncthreads();
  else
    asm volatile("bar.sync 1, %0;" ::"n"(ROW_THREADS) : "memory");
}

#if NORMED

// Vector j of a thread is the row's vector row_thread() + j * ROW_THREADS, so that a warp has whole pieces.
__device__ __forceinline__ bool has_piece(int j) { return PIECES % ROW_WARPS == 0 || (int)(row_thread() >> 5) + j * ROW_WARPS < PIECES; }

// Starts copying scales and shifts, which no kernel writes.
__device__ __forceinline__ void fetch_affine(const RowParams& p, unsigned char* smem) {
  const u32 scale = shared_address(smem) + AT_ROW + row_thread() * 16, shift = scale + AT_SHIFT - AT_ROW;
#pragma unroll
  for (int j = 0; j < WARP_PIECES; ++j)
    if (has_piece(j)) {
      copy_vector(scale + j * ROW_THREADS * 16, p.scale + row_thread() + j * ROW_THREADS);
      copy_vector(shift + j * ROW_THREADS * 16, p.shift + row_thread() + j * ROW_THREADS);
    }
}

// All those threads call it, once predecessors have ended.
__device__ __forceinline__ void normalise(const RowParams& p, unsigned char* smem) {
  const u32 row = shared_address(smem) + AT_ROW + row_thread() * 16;
  float2* moments = (float2*)(smem + AT_MOMENTS);
  uint4 v[WARP_PIECES];
#pragma unroll
  for (int j = 0; j < WARP_PIECES; ++j)
    if (has_piece(j)) v[j] = __ldcg((const uint4*)p.product.x + row_thread() + j * ROW_THREADS);
#pragma unroll
  for (int j = 0; j < WARP_PIECES; ++j) {
    if (!has_piece(j)) continue;
    float x[8], sum = 0, squares = 0;
    unpack(v[j], x);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      sum += x[i];
    const float own = warp_sum(sum) * (1.0f / 256);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      squares += (x[i] - own) * (x[i] - own);
    squares = warp_sum(squares);
    if ((threadIdx.x & 31) == 0) moments[(row_thread() >> 5) + j * ROW_WARPS] = make_float2(own, squares);
  }
  wait_copies();
  row_sync();
  const float inverse = __frcp_rn((float)COLS);
  float mean = 0, total = 0;
#pragma unroll 8
  for (int u = 0; u < PIECES; ++u)
    mean += 256.0f * inverse * moments[u].x;
#pragma unroll 8
  for (int u = 0; u < PIECES; ++u) {
    const float distance = moments[u].x - mean;
    total += moments[u].y + 256.0f * distance * distance;
  }
  const float factor = rsqrtf(total * inverse + p.eps);
#pragma unroll
  for (int j = 0; j < WARP_PIECES; ++j) {
    if (!has_piece(j)) continue;
    float x[8], scale[8], shift[8];
    unpack(v[j], x);
    unpack(read_shared(row + j * ROW_THREADS * 16), scale);
    unpack(read_shared(row + j * ROW_THREADS * 16 + AT_SHIFT - AT_ROW), shift);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      x[i] = (x[i] - mean) * factor * scale[i] + shift[i];
    write_shared(row + j * ROW_THREADS * 16,
                 make_uint4(pack_two(x[0], x[1]), pack_two(x[2], x[3]), pack_two(x[4], x[5]), pack_two(x[6], x[7])));
  }
  row_sync();
}

#endif
