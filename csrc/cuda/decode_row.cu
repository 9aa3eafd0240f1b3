// y = x · Wᵀ for 2:4 and 4:8 weights and a single activation row x, or the LayerNorm of x: what decode_nm.cu computes, but warps meet only
// to add their sums, and no kernel before it need normalise the row while memory has nothing to do.
//
//   block of WARPS_K warps:  row tiles of 16 weight rows b, b + B, b + 2B ... of all B blocks
//   warp:  units of a tile in turn, as in decode_nm.cu; weights of the next unit, or of the next tile, are on their way meanwhile
//   x:     the whole row in shared memory, each warp's part of it copied by itself; or, NORMED, each block takes the LayerNorm of the
//          row for itself, once
//
// Sums of a tile are added as decode_nm.cu adds them, and LayerNorms are layernorm.cu's (row_input.cuh): results are those of these
// kernels. Weights, scales and shifts, which no kernel writes, are fetched before predecessors have ended.
//
// Macros: those of decode_common.cuh, with one n-tile, row tile and warp along the rows; PATTERN 24 or 48; COLS, a multiple of 256; NORMED.
#define X_PAD 0
#include "decode_common.cuh"
#include "expand.cuh"
#if PATTERN == 24
#include "mma_sparse.cuh"
#endif

#if N_TILES != 1 || ROW_TILES != 1 || WARPS_ROW != 1 || COLS % 256 != 0
#error "decode_row takes one activation row of whole units, and a row tile for each block at a time"
#endif

#define UNITS (COLS / UNIT)
#define CHAINS 2
#define UNIT_VECTORS (9 * 32)
#define PLANE (WARPS_K * RED_PITCH)
// Shared memory: zeros, then the row, which takes the place of the scales, the shifts, the moments, and the sums of two tiles in turn.
#define AT_ROW ZERO_BYTES
#define AT_SHIFT (AT_ROW + 2 * COLS)
#define AT_MOMENTS (AT_SHIFT + SHIFT_BYTES)
#define AT_SUMS (AT_MOMENTS + MOMENTS_BYTES)
#define AT_BIAS (AT_SUMS + 8 * PLANE)
#define ROW_WARPS WARPS_K
#include "row_input.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) decode_row(const __grid_constant__ RowParams given) {
  extern __shared__ __align__(128) unsigned char smem[];
  release_successor();
  const Params& p = given.product;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, part = warp % PARTS, first = warp / PARTS;
  const int tiles = (p.rows + 15) / 16;
  const u64 policy = weight_policy();

  // Of the unit that is fetched next; a warp without any unit of a tile has none at all.
  int coming_tile = first < UNITS ? (int)blockIdx.x : tiles, coming_unit = first;
  const uint4* next;
  auto place = [&] { next = p.weight + ((size_t)coming_tile * UNITS + coming_unit) * UNIT_VECTORS + part * 32 * STEPS; };
  auto advance = [&] {
    coming_unit += ROUND_UNITS;
    next += ROUND_UNITS * UNIT_VECTORS;
    if (coming_unit < UNITS) return;
    coming_unit = first;
    coming_tile += gridDim.x;
    place();
  };
  const int at_positions = lane - part * 32 * STEPS; // in uint4, from next; the lane's part of its 16 bytes is added below
  auto fetch_positions = [&](u32(&positions)[4 / PARTS]) {
    load_positions((const uint4*)((const u32*)(next + at_positions) + part * (4 / PARTS)), positions, policy);
  };
  u32 positions[4 / PARTS];
  uint4 values[STEPS];
  place();
  if (coming_tile < tiles) {
    fetch_positions(positions);
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
      values[s] = load_weight(next + (s + 1) * 32 + lane, policy);
  }
#if NORMED
  fetch_affine(given, smem);
#endif
  if (lane == 0) fetch_for_next(given.ahead, (int)blockIdx.x * WARPS_K + warp, (int)gridDim.x * WARPS_K);
  if (threadIdx.x < ZERO_BYTES / 16) ((uint4*)smem)[threadIdx.x] = make_uint4(0, 0, 0, 0);
#if !NORMED
  __syncthreads();
#endif
  wait_predecessor();
#if NORMED
  normalise(given, smem);
#else
  // A warp's part of a unit of x.
  const int x_at = part * STEPS * 64 + lane * 16;
  if (lane < 4 * STEPS)
    for (int unit = first; unit < UNITS; unit += ROUND_UNITS)
      copy_vector(shared_address(smem) + AT_ROW + unit * (UNIT * 2) + x_at,
                  (const uint4*)((const unsigned char*)p.x + unit * (UNIT * 2) + x_at));
  wait_copies();
  __syncwarp();
#endif

#if PATTERN == 24
  const int x_row = lane & 7, x_chunk = lane >> 3;
#else
  const int x_row = lane >> 2, x_chunk = lane & 3;
#endif
  const bool live = x_row == 0;
  const u32 x_lane = shared_address(smem) + (live ? AT_ROW + part * STEPS * 64 + x_chunk * 16 : 0), x_step = live ? 64 : 0;
  Addends& add = *(Addends*)(smem + AT_BIAS);

  float* sums = (float*)(smem + AT_SUMS);
  for (int tile = blockIdx.x, turn = 0; tile < tiles; tile += gridDim.x, turn ^= 1) {
    ushort4 bias = make_ushort4(0, 0, 0, 0), residual = bias;
    const int row = tile * 16 + threadIdx.x * 4;
    const bool finishes = threadIdx.x < BLOCK_ROWS / 4;
    if (finishes && p.y_vector && row < p.rows) {
      if (p.bias) bias = *(const ushort4*)(p.bias + row);
      if (p.residual) residual = *(const ushort4*)(p.residual + row);
    }
    // Two sets of sums, so that successive products do not wait for each other.
    float acc[CHAINS][1][1][4] = {};
    for (int unit = first; unit < UNITS; unit += ROUND_UNITS) {
      advance();
      const bool more = coming_tile < tiles;
      u32 coming[4 / PARTS];
      if (more) fetch_positions(coming);
      u32 x_address = x_lane + unit * (live ? UNIT * 2 : 0);
#if PATTERN == 48
      u32 codes[4];
#endif
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        u32 b[4];
#if PATTERN == 24
        ldmatrix_x4(x_address, b);
        if (s % 2 == 0)
          mma_sparse<0>(acc[s % CHAINS][0][0], values[s], b, positions[s / 2]);
        else
          mma_sparse<1>(acc[s % CHAINS][0][0], values[s], b, positions[s / 2]);
#else
        u32 a[8];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          codes[i] = s % 2 == 0 ? code_selectors(positions[s / 2], i) : codes[i] >> 16;
        expand_step(values[s], codes, a);
        load_shared_x4(x_address, b);
        mma_dense(acc[s % CHAINS][0][0], a[0], a[1], a[2], a[3], b[0], b[1]);
        mma_dense(acc[s % CHAINS][0][0], a[4], a[5], a[6], a[7], b[2], b[3]);
#endif
        if (more) values[s] = load_weight(next + (s + 1) * 32 + lane, policy);
        x_address += x_step;
      }
#pragma unroll
      for (int i = 0; i < 4 / PARTS; ++i)
        positions[i] = coming[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      acc[0][0][0][i] += acc[1][0][0][i];
    float* red = sums + turn * PLANE;
    collect(red, p, acc[0]);
    __syncthreads();
    // The other half of the sums is free: who reads it comes to the barrier afterwards.
    if (finishes) {
      float4 sum = ((const float4*)red)[threadIdx.x];
#pragma unroll
      for (int k = 1; k < WARPS_K; ++k)
        add_four(sum, ((const float4*)(red + k * RED_PITCH))[threadIdx.x]);
      add.bias[threadIdx.x] = bias;
      add.residual[threadIdx.x] = residual;
      store_four(p, 0, row, sum, &add);
    }
  }
}
