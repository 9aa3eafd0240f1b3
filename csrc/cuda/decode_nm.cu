// y = x · Wᵀ for 2:4 and 4:8 weights and few activation rows.
//
// Layout of `weight`, in uint4, for T = ceil(rows / 16) row tiles and U = ceil(cols / 256) units:
//   [T][U][9][32 lanes]: chunk 0 the lane's positions for the whole unit, chunk 1 + s its values for columns 32s .. 32s + 31.
// So a lane reads 9 x 16 bytes straight into registers, each warp 4,608 contiguous bytes, and W never meets shared memory.
// PATTERN 24: a values chunk is operand A of mma.sp.m16n8k32; word w of chunk 0 holds the metadata of step 2w in lanes 0, 1
//   of each quad and of step 2w + 1 in lanes 2, 3 (low half-word row lane / 4, high half-word 8 rows below).
// PATTERN 48: lane (g, t) owns columns 8t .. 8t + 7 of a step, which is one group of eight, for rows g and g + 8: 4 values each, in
//   that order; its mask bytes are byte (2s + 0) for row g and (2s + 1) for row g + 8 of chunk 0. The columns' order within
//   a step is free as long as x follows, so that a lane's 8 columns feed two m16n8k16 products.
#if PATTERN == 24
#define X_PAD 16 // rows 16 bytes apart modulo 128: ldmatrix without bank conflicts
#else
#define X_PAD 64 // rows 64 bytes apart modulo 128: two rows of 64 bytes per phase of a 16-byte load
#endif
#include "decode_common.cuh"
#include "expand.cuh"
#if PATTERN == 24
#include "mma_sparse.cuh"
#endif

#define CHAINS (ROW_TILES * N_TILES <= 2 ? 2 : 1)

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) decode_nm(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char smem[];
  Addends& add = addends(smem);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warp_row = warp % WARPS_ROW, warp_k = warp / WARPS_ROW;
  const int part = warp_k % PARTS;
  const int begin = (int)((long long)p.units * blockIdx.y / gridDim.y), end = (int)((long long)p.units * (blockIdx.y + 1) / gridDim.y);
  const int rounds = (end - begin + ROUND_UNITS - 1) / ROUND_UNITS;
  const int last_tile = (p.rows + 15) / 16 - 1;
  const u64 policy = weight_policy();

  // Tiles behind the last row read the last tile again; their sums are not stored.
  const uint4* next[ROW_TILES];
  u32 positions[ROW_TILES][4 / PARTS];
  uint4 values[ROW_TILES][STEPS];
  int unit = begin + warp_k / PARTS;
  const int at_positions = lane - part * 32 * STEPS; // in uint4, from next; the lane's part of its 16 bytes is added below
#pragma unroll
  for (int rt = 0; rt < ROW_TILES; ++rt) {
    int tile = min((int)(blockIdx.x * WARPS_ROW + warp_row) * ROW_TILES + rt, last_tile);
    next[rt] = p.weight + ((size_t)tile * p.units + unit) * (9 * 32) + part * 32 * STEPS;
    if (unit < end) {
      load_positions((const uint4*)((const u32*)(next[rt] + at_positions) + part * (4 / PARTS)), positions[rt], policy);
#pragma unroll
      for (int s = 0; s < STEPS; ++s)
        values[rt][s] = load_weight(next[rt] + (s + 1) * 32 + lane, policy);
    }
  }
  copy_bias(p, blockIdx.x, add);
  release_successor();
  clear_padding(smem, p);
  wait_predecessor();
  copy_residual(p, blockIdx.x, add);
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < rounds) stage_x(smem, p, s, (begin + s * ROUND_UNITS) * UNIT);
    commit_stage();
  }

#if PATTERN == 24
  const int x_row = lane & 7, x_chunk = lane >> 3;
#else
  const int x_row = lane >> 2, x_chunk = lane & 3;
#endif
  const bool live = N_TILES > 1 || x_row < p.m;
  const int x_column = warp_k / PARTS * (UNIT * 2) + part * STEPS * 64 + x_chunk * 16;
  const u32 x_lane = shared_address(smem) + (live ? ZERO_BYTES + x_row * X_PITCH + x_column : 0);
  const u32 x_step = live ? 64 : 0, stage_bytes = live ? staged_rows(p.m) * X_PITCH : 0;
  // Two sets of sums where registers allow, so that successive products do not wait for each other.
  float acc[CHAINS][ROW_TILES][N_TILES][4] = {};

  for (int round = 0, slot = 0; round < rounds; ++round, slot = slot + 1 == STAGES ? 0 : slot + 1) {
    wait_stage();
    __syncthreads();
    if (round + STAGES - 1 < rounds) {
      int free_slot = slot == 0 ? STAGES - 1 : slot - 1;
      stage_x(smem, p, free_slot, (begin + (round + STAGES - 1) * ROUND_UNITS) * UNIT);
    }
    commit_stage();
    if (unit < end) {
      unit += ROUND_UNITS;
      const bool more = unit < end;
      u32 coming[ROW_TILES][4 / PARTS];
#pragma unroll
      for (int rt = 0; rt < ROW_TILES; ++rt) {
        next[rt] += (size_t)ROUND_UNITS * (9 * 32);
        if (more) load_positions((const uint4*)((const u32*)(next[rt] + at_positions) + part * (4 / PARTS)), coming[rt], policy);
      }
      u32 x_address = x_lane + slot * stage_bytes;
#if PATTERN == 48
      u32 codes[ROW_TILES][4];
#endif
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        float (&sum)[ROW_TILES][N_TILES][4] = acc[s % CHAINS];
#if PATTERN == 24
#pragma unroll
        for (int nt = 0; nt < N_TILES; ++nt) {
          u32 b[4];
          ldmatrix_x4(x_address + nt * 8 * X_PITCH, b);
#pragma unroll
          for (int rt = 0; rt < ROW_TILES; ++rt) {
            if (s % 2 == 0)
              mma_sparse<0>(sum[rt][nt], values[rt][s], b, positions[rt][s / 2]);
            else
              mma_sparse<1>(sum[rt][nt], values[rt][s], b, positions[rt][s / 2]);
          }
        }
#else
        u32 a[ROW_TILES][8];
#pragma unroll
        for (int rt = 0; rt < ROW_TILES; ++rt) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            codes[rt][i] = s % 2 == 0 ? code_selectors(positions[rt][s / 2], i) : codes[rt][i] >> 16;
          expand_step(values[rt][s], codes[rt], a[rt]);
        }
#pragma unroll
        for (int nt = 0; nt < N_TILES; ++nt) {
          u32 b[4];
          load_shared_x4(x_address + nt * 8 * X_PITCH, b);
#pragma unroll
          for (int rt = 0; rt < ROW_TILES; ++rt) {
            mma_dense(sum[rt][nt], a[rt][0], a[rt][1], a[rt][2], a[rt][3], b[0], b[1]);
            mma_dense(sum[rt][nt], a[rt][4], a[rt][5], a[rt][6], a[rt][7], b[2], b[3]);
          }
        }
#endif
#pragma unroll
        for (int rt = 0; rt < ROW_TILES; ++rt)
          if (more) values[rt][s] = load_weight(next[rt] + (s + 1) * 32 + lane, policy);
        x_address += x_step;
      }
#pragma unroll
      for (int rt = 0; rt < ROW_TILES; ++rt)
#pragma unroll
        for (int i = 0; i < 4 / PARTS; ++i)
          positions[rt][i] = coming[rt][i];
    }
  }
#pragma unroll
  for (int rt = 0; rt < ROW_TILES; ++rt)
#pragma unroll
    for (int nt = 0; nt < N_TILES; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int chain = 1; chain < CHAINS; ++chain)
          acc[0][rt][nt][i] += acc[chain][rt][nt][i];
  reduce_and_store(smem, p, acc[0], add);
}
