// y = x · Wᵀ for unstructured weights and few activation rows.
//
// W is cut into T = ceil(rows / 16) row tiles by U = ceil(cols / UNIT) units, stored as paired.cuh describes. A warp copies a unit's words
// to shared memory as [word][lane], so that every lane reads its own stream without bank conflicts whatever its position.
//   TABLE_COPIES   copies of the expansion table in shared memory, 1 to 16
#define UNSTRUCTURED 1
#define X_PAD 64
#include "decode_common.cuh"
#include "expand.cuh"
#include "paired.cuh"

#if ROW_TILES != 1
#error "decode_unstructured has one row tile a warp"
#endif
#define CHAINS (N_TILES <= 2 ? 2 : 1)

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) decode_unstructured(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char smem[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warp_row = warp % WARPS_ROW, warp_k = warp / WARPS_ROW;
  const int begin = (int)((long long)p.units * blockIdx.y / gridDim.y), end = (int)((long long)p.units * (blockIdx.y + 1) / gridDim.y);
  const int rounds = (end - begin + ROUND_UNITS - 1) / ROUND_UNITS;
  const int tile = min((int)blockIdx.x * WARPS_ROW + warp_row, (p.rows + 15) / 16 - 1);
  const u64 policy = weight_policy();
  // A pair that keeps nothing reads the step's first or last word, which may lie one before or behind the stream.
  const u32 slot_bytes = (p.depth + 2) * 128;
  const u32 x_bytes = (ZERO_BYTES + STAGES * staged_rows(p.m) * X_PITCH + 127) & ~127;
  const u32 table = shared_address(smem) + x_bytes, slots = table + TABLE_BYTES + warp * STAGES * slot_bytes + 128;

  Unit units[STAGES];
  const size_t first_unit = (size_t)tile * p.units + begin + warp_k;
  const int mine = (end - begin - warp_k + WARPS_K - 1) / WARPS_K; // units of this warp, may be <= 0
#pragma unroll
  for (int s = 0; s < STAGES; ++s)
    if (s < mine) load_unit(p, first_unit + (size_t)s * WARPS_K, units[s], policy);
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s)
    if (s < mine) stage_words(p, slots + s * slot_bytes, units[s].words, units[s].offset);
  release_successor();
  fill_table(table);
  clear_padding(smem, p);
  wait_predecessor();
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < rounds) stage_x(smem, p, s, (begin + s * ROUND_UNITS) * UNIT);
    // The first group holds the values of every buffer started above.
    commit_stage();
  }

  const int x_row = lane >> 2, x_chunk = lane & 3;
  const bool live = N_TILES > 1 || x_row < p.m;
  const u32 x_lane = shared_address(smem) + (live ? ZERO_BYTES + x_row * X_PITCH + warp_k * (UNIT * 2) + x_chunk * 16 : 0);
  const u32 x_step = live ? 64 : 0, stage_bytes = live ? staged_rows(p.m) * X_PITCH : 0;
  const u32 my_table = table + lane % TABLE_COPIES * 8;
  float acc[CHAINS][1][N_TILES][4] = {};

  for (int first_round = 0; first_round < rounds; first_round += STAGES) {
#pragma unroll
    for (int slot = 0; slot < STAGES; ++slot) {
      const int round = first_round + slot;
      if (round >= rounds) break;
      wait_stage();
      __syncthreads();
      const int ahead = round + STAGES - 1;
      constexpr int LAST = STAGES - 1;
      const int free_slot = (slot + LAST) % STAGES;
      if (ahead < rounds) stage_x(smem, p, free_slot, (begin + ahead * ROUND_UNITS) * UNIT);
      if (ahead < mine) stage_words(p, slots + free_slot * slot_bytes, units[free_slot].words, units[free_slot].offset);
      commit_stage();
      if (round >= mine) continue;
      u32 masks[WORDS];
#pragma unroll
      for (int i = 0; i < WORDS; ++i)
        masks[i] = units[slot].masks[i];
      if (round + STAGES < mine) load_unit(p, first_unit + (size_t)(round + STAGES) * WARPS_K, units[slot], policy);
      const u32 base = slots + slot * slot_bytes + lane * 4;
      u32 x_address = x_lane + slot * stage_bytes;
      for_each_step(masks, base, my_table, [&](int s, const u32(&a)[8]) {
#pragma unroll
        for (int nt = 0; nt < N_TILES; ++nt) {
          u32 b[4];
          load_shared_x4(x_address + nt * 8 * X_PITCH, b);
          mma_dense(acc[s % CHAINS][0][nt], a[0], a[1], a[2], a[3], b[0], b[1]);
          mma_dense(acc[s % CHAINS][0][nt], a[4], a[5], a[6], a[7], b[2], b[3]);
        }
        x_address += x_step;
      });
    }
  }
#pragma unroll
  for (int nt = 0; nt < N_TILES; ++nt)
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int chain = 1; chain < CHAINS; ++chain)
        acc[0][0][nt][i] += acc[chain][0][nt][i];
  reduce_and_store(smem, p, acc[0]);
}
