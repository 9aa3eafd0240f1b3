// y = x · Wᵀ for unstructured weights and few activation rows.
//
// W is cut into T = ceil(rows / 16) row tiles by U = ceil(cols / UNIT) units. Lane (g, t) of a warp owns, of every 32 columns
// (a step), columns 8t .. 8t + 7 of rows g and g + 8; its stream of kept values runs over the unit's steps, row g before g + 8.
//   masks    [T][U][32 lanes][16 / PARTS bytes]: byte 2s for row g, 2s + 1 for row g + 8 of step s
//   weight   the streams' values in words of two (the last one padded); of each unit first word 0 of every lane that has one, in
//            lane order, then word 1, ...: nothing is padded but each lane's last half-word and the unit's end, to 16 bytes
//   offsets  [T * U + 1] where each unit's values start, in 16 bytes
// A warp spreads a unit's words to shared memory as [word][lane], so that every lane reads its own stream without bank conflicts
// whatever its position: the words that all lanes have are copied 16 bytes at a time, the ragged rest by ballot.
#define UNSTRUCTURED 1
#define X_PAD 64
#include "decode_common.cuh"

#if ROW_TILES != 1
#error "decode_unstructured has one row tile a warp"
#endif
#define CHAINS (N_TILES <= 2 ? 2 : 1)
#define WORDS (4 / PARTS)

// Starts copying a unit's values to `slot` (shared address of word 0, lane 0).
__device__ __forceinline__ void stage_values(const Params& p, u32 slot, const u32 (&masks)[WORDS], u32 offset) {
  const int lane = threadIdx.x & 31;
  int kept = 0;
#pragma unroll
  for (int i = 0; i < WORDS; ++i)
    kept += __popc(masks[i]);
  const int words = (kept + 1) >> 1;
  const int full = (int)__reduce_min_sync(0xffffffffu, (unsigned)words) & ~3,
            longest = (int)__reduce_max_sync(0xffffffffu, (unsigned)words);
  const uint4* source = p.weight + offset;
  for (int i = lane; i < full * 8; i += 32)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(slot + i * 16), "l"(source + i) : "memory");
  const u32* rest = (const u32*)(source + full * 8);
  const u32 below = (1u << lane) - 1;
  u32 target = slot + full * 128 + lane * 4, before = 0;
  for (int j = full; j < longest; j += 4, target += 512) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 having = __ballot_sync(0xffffffffu, words > j + i);
      if (words > j + i)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target + i * 128), "l"(rest + before + __popc(having & below))
                     : "memory");
      before += __popc(having);
    }
  }
}

template <int OFFSET>
__device__ __forceinline__ u32 load_word(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(v) : "r"(address), "n"(OFFSET) : "memory");
  return v;
}

// Where a lane stands in its stream: 64 bytes a value from the slot's address, which is a multiple of 128 because a word of every lane
// is 128 bytes; and the bits of the values passed.
struct Cursor {
  u32 position, bits;
};

// The two column pairs of four columns whose mask bits start at bit `at`; the cursor moves behind their values.
__device__ __forceinline__ void expand_half(Cursor& cursor, u32 lane_bytes, u32 masks, int at, u32 table, u32& first, u32& second) {
  const u32 address = (cursor.position & ~127u) | lane_bytes;
  const u32 w0 = load_word<0>(address), w1 = load_word<128>(address), w2 = load_word<256>(address);
  const u32 front = __funnelshift_r(w0, w1, cursor.bits), after = __funnelshift_r(w1, w2, cursor.bits);
  const u32 selectors = look_up(table, masks >> at);
  first = permute(front, selectors);
  second = permute(__funnelshift_rc(front, after, 16 * __popc(masks & (3u << at))), selectors >> 16);
  const u32 kept = __popc(masks & (15u << at));
  cursor.position += 64 * kept;
  cursor.bits += 16 * kept;
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) decode_unstructured(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char smem[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warp_row = warp % WARPS_ROW, warp_k = warp / WARPS_ROW;
  const int begin = (int)((long long)p.units * blockIdx.y / gridDim.y), end = (int)((long long)p.units * (blockIdx.y + 1) / gridDim.y);
  const int rounds = (end - begin + ROUND_UNITS - 1) / ROUND_UNITS;
  const int tile = min((int)blockIdx.x * WARPS_ROW + warp_row, (p.rows + 15) / 16 - 1);
  const u64 policy = weight_policy();
  // A lane behind its last value still reads three words.
  const u32 slot_bytes = (p.depth + 3) * 128;
  const u32 x_bytes = (ZERO_BYTES + STAGES * staged_rows(p.m) * X_PITCH + 127) & ~127;
  const u32 slots = shared_address(smem) + x_bytes + warp * STAGES * slot_bytes;

  u32 masks[STAGES][WORDS], offsets[STAGES];
  const size_t first_unit = (size_t)tile * p.units + begin + warp_k;
  const int mine = (end - begin - warp_k + WARPS_K - 1) / WARPS_K; // units of this warp, may be <= 0
#pragma unroll
  for (int s = 0; s < STAGES; ++s) {
    if (s < mine) {
      const size_t u = first_unit + (size_t)s * WARPS_K;
      load_positions((const uint4*)((const u32*)p.masks + (u * 32 + lane) * WORDS), masks[s], policy);
      offsets[s] = p.offsets[u];
    }
  }
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s)
    if (s < mine) stage_values(p, slots + s * slot_bytes, masks[s], offsets[s]);
  release_successor();
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
  const u32 lane_bytes = lane * 4, table = front_selector(lane & 3) | front_selector(lane >> 2 & 3) << 16;
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
      if (ahead < mine) stage_values(p, slots + free_slot * slot_bytes, masks[free_slot], offsets[free_slot]);
      commit_stage();
      if (round >= mine) continue;
      u32 current[WORDS];
#pragma unroll
      for (int i = 0; i < WORDS; ++i)
        current[i] = masks[slot][i];
      if (round + STAGES < mine) {
        const size_t u = first_unit + (size_t)(round + STAGES) * WARPS_K;
        load_positions((const uint4*)((const u32*)p.masks + (u * 32 + lane) * WORDS), masks[slot], policy);
        offsets[slot] = p.offsets[u];
      }
      u32 x_address = x_lane + slot * stage_bytes;
      Cursor cursor = {slots + slot * slot_bytes, 0};
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
        const u32 word = current[s / 2];
        const int at = s % 2 * 16;
        u32 a[8];
        expand_half(cursor, lane_bytes, word, at, table, a[0], a[2]);
        expand_half(cursor, lane_bytes, word, at + 4, table, a[4], a[6]);
        expand_half(cursor, lane_bytes, word, at + 8, table, a[1], a[3]);
        expand_half(cursor, lane_bytes, word, at + 12, table, a[5], a[7]);
#pragma unroll
        for (int nt = 0; nt < N_TILES; ++nt) {
          u32 b[4];
          load_shared_x4(x_address + nt * 8 * X_PITCH, b);
          mma_dense(acc[s % CHAINS][0][nt], a[0], a[1], a[2], a[3], b[0], b[1]);
          mma_dense(acc[s % CHAINS][0][nt], a[4], a[5], a[6], a[7], b[2], b[3]);
        }
        x_address += x_step;
      }
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
