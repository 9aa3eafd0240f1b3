// A dense copy of an unstructured weight in paired streams (paired.cuh describes it), for products of many rows.
//   PARTS   units are 256 / PARTS columns
//   dense   (rows, cols) 16-bit elements, row-major; every element is written
//
// A warp takes one unit, 16 rows by its columns; lane (g, t) columns 8t .. 8t + 7 of each 32, of rows g and g + 8.
#define UNSTRUCTURED 1
#define ELEM_BF16 1
#define N_TILES 1
#define ROW_TILES 1
#define WARPS_ROW 8
#define WARPS_K 1
#define STAGES 1
#define X_PAD 0
#define TABLE_COPIES 4
#include "decode_common.cuh"
#include "expand.cuh"
#include "bulk.cuh"
#include "paired.cuh"

struct ExpandParams {
  const uint4* weight;
  const u32* offsets;
  u16* dense;
  int rows, cols, units, tiles;
  int depth; // words of the deepest unit
};

__device__ __forceinline__ void store_octet(const ExpandParams& p, int row, int column, u32 a, u32 b, u32 c, u32 d) {
  if (row >= p.rows || column >= p.cols) return;
  u16* at = p.dense + (size_t)row * p.cols + column;
  if (p.cols % 8 == 0) {
    *(uint4*)at = make_uint4(a, b, c, d);
    return;
  }
  const u32 words[4] = {a, b, c, d};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (column + i < p.cols) at[i] = (u16)(words[i / 2] >> 16 * (i % 2));
}

extern "C" __global__ void __launch_bounds__(THREADS) expand_unstructured(const __grid_constant__ ExpandParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  const u32 base = shared_address(smem);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, unit = blockIdx.x * WARPS_ROW + warp;
  const bool any = unit < p.tiles * p.units;
  const u32 slot_bytes = SLOT_LEAD + HEADER_BYTES + (p.depth + 1) * 128;
  const u32 barrier = base + TABLE_BYTES + 8 * warp, header = base + TABLE_BYTES + 128 + warp * slot_bytes + SLOT_LEAD;
  if (lane == 0) {
    barrier_init(barrier, COPY_ARRIVALS);
    barrier_init_fence();
  }
  __syncwarp();
  u32 words = 0;
  if (any) {
    const u32 from = p.offsets[unit], size = p.offsets[unit + 1] - from;
    words = (size - HEADER_BYTES / 16) / 8;
    copy_block(header, p.weight + from, size, barrier, weight_policy());
  }
  fill_table(base);
  release_successor();
  __syncthreads();
  if (!any) return;
  barrier_wait(barrier, 0);
  Unit u;
#pragma unroll
  for (int i = 0; i < WORDS; ++i)
    u.masks[i] = load_word(header + lane * (4 * WORDS) + 4 * i);
  u32 column;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(column) : "r"(header + MASK_BYTES + lane) : "memory");
  u.columns[0] = lane * 4;
  u.columns[1] = column * 4;
  u.first = header + HEADER_BYTES;
  u.second = u.first + words * 128 - 64;
  const int row = unit / p.units * 16 + lane / 4, first = unit % p.units * UNIT + lane % 4 * 8;
  // The copy before this one may still be read.
  wait_predecessor();
  for_each_step(u, base + lane % TABLE_COPIES * 8, [&](int s, const u32(&a)[8]) {
    store_octet(p, row, first + s * 32, a[0], a[2], a[4], a[6]);
    store_octet(p, row + 8, first + s * 32, a[1], a[3], a[5], a[7]);
  });
}
