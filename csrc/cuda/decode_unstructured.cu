// y = x · Wᵀ for unstructured weights and few activation rows.
//
// W is cut into T = ceil(rows / 16) row tiles by U = ceil(cols / UNIT) units, stored as paired.cuh describes; every warp fetches its units
// for itself, one after the other. A block goes through row groups, gridDim.x from one to the next, so that weights are on their way all
// the time and the table is filled once; for many activation rows, whose sums take the place of x, it has one group.
//   STAGES         slots of units per warp
//   TABLE_COPIES   copies of the expansion table in shared memory, 1 to 8, see octets.cuh
#define UNSTRUCTURED 1
#define X_PAD 64
#include "decode_common.cuh"
#include "expand.cuh"
#include "bulk.cuh"
#define WIDE_ENTRIES (N_TILES > 2)
#include "paired.cuh"

#if ROW_TILES != 1
#error "decode_unstructured has one row tile a warp"
#endif
#define CHAINS (N_TILES <= 2 ? 2 : 1)
#define PERSISTENT (N_TILES <= 2)

// Only lanes that have an activation row read; what the others hold reaches no sum that is stored.
__device__ __forceinline__ void load_activations(u32 address, bool live, u32 (&b)[4]) {
#if N_TILES > 1
  load_shared_x4(address, b);
#else
  load_shared_x4_if(address, live, b);
#endif
}

__device__ __forceinline__ u32 whole_lines(u32 bytes) { return (bytes + 127) & ~127u; }

// The units of one warp, row group after row group.
struct Sequence {
  size_t unit;
  int index, mine, group, begin;
  bool any;

  __device__ __forceinline__ void enter(const Params& p) {
    const int warp = threadIdx.x >> 5;
    // Tiles behind the last row read the last tile again; their sums are not stored.
    const int tile = min(group * WARPS_ROW + warp % WARPS_ROW, (p.rows + 15) / 16 - 1);
    unit = (size_t)tile * p.units + begin + warp / WARPS_ROW;
    index = 0;
    any = mine > 0 && group * BLOCK_ROWS < p.rows;
  }

  __device__ __forceinline__ void advance(const Params& p) {
    unit += WARPS_K;
    if (++index < mine) return;
    group += gridDim.x;
    enter(p);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) decode_unstructured(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char smem[];
  Addends& add = addends(smem);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warp_k = warp / WARPS_ROW;
  const int begin = (int)((long long)p.units * blockIdx.y / gridDim.y), end = (int)((long long)p.units * (blockIdx.y + 1) / gridDim.y);
  const int rounds = (end - begin + ROUND_UNITS - 1) / ROUND_UNITS;
  const int mine = max((end - begin - warp_k + WARPS_K - 1) / WARPS_K, 0); // units of this warp in a row group
  const bool resident = p.x_buffers >= rounds;
  const u64 policy = weight_policy();
  const u32 stage_bytes = staged_rows(p.m) * X_PITCH;
  const u32 sums_at = PERSISTENT ? whole_lines(ZERO_BYTES + p.x_buffers * stage_bytes) : 0;
  const u32 sums_bytes = whole_lines(sums_floats(p) * 4);
  const u32 table_at = PERSISTENT ? sums_at + 2 * sums_bytes : whole_lines(ZERO_BYTES + p.x_buffers * stage_bytes);
  const u32 table = shared_address(smem) + table_at, barriers = table + TABLE_BYTES;

  TableLoad load;
  load.start();
  Sequence sequence = {0, 0, mine, (int)blockIdx.x, begin, false};
  sequence.enter(p);
  Slots slots;
  slots.init(p, barriers + whole_lines(WARPS * STAGES * 8), barriers, warp);
  slots.start(p, sequence, policy);
  copy_bias(p, blockIdx.x, add);
  release_successor();
  load.finish(table);
  clear_padding(smem, p, p.x_buffers);
  wait_predecessor();
  copy_residual(p, blockIdx.x, add);
  for (int round = 0; round < (resident ? rounds : 1); ++round)
    stage_x(smem, p, round, (begin + round * ROUND_UNITS) * UNIT);
  if (resident) {
    wait_copies();
    __syncthreads();
  }

  const int x_row = lane >> 2, x_chunk = lane & 3;
  const bool live = N_TILES > 1 || x_row < p.m;
  const u32 x_lane = shared_address(smem) + ZERO_BYTES + x_row * X_PITCH + warp_k * (UNIT * 2) + x_chunk * 16;

  u32 turn = 0, buffer = 0;
  for (int group = blockIdx.x; group * BLOCK_ROWS < p.rows; group += gridDim.x, turn ^= 1) {
    float acc[CHAINS][1][N_TILES][4] = {};
    if (group != (int)blockIdx.x) {
      copy_bias(p, group, add);
      copy_residual(p, group, add);
    }
    for (int round = 0; round < rounds; ++round) {
      if (resident) {
        buffer = round;
      } else {
        buffer = round == 0 && group == (int)blockIdx.x ? 0 : buffer ^ 1;
        wait_copies();
        __syncthreads();
        const bool wrap = round + 1 == rounds;
        if (!wrap || (group + (int)gridDim.x) * BLOCK_ROWS < p.rows)
          stage_x(smem, p, buffer ^ 1, (begin + (wrap ? 0 : round + 1) * ROUND_UNITS) * UNIT);
      }
      if (round >= mine) continue;
      Unit unit;
      slots.open(unit);
      const u32 x_address = x_lane + buffer * stage_bytes;
      const auto multiply = [&](int s, const u32(&a)[8]) {
#pragma unroll
        for (int nt = 0; nt < N_TILES; ++nt) {
          u32 b[4] = {};
          load_activations(x_address + nt * 8 * X_PITCH + s * 64, live, b);
          mma_dense(acc[s % CHAINS][0][nt], a[0], a[1], a[2], a[3], b[0], b[1]);
          mma_dense(acc[s % CHAINS][0][nt], a[4], a[5], a[6], a[7], b[2], b[3]);
        }
      };
      for_each_step(unit, own_table(table), multiply);
      slots.close(p, sequence, policy);
    }
#pragma unroll
    for (int nt = 0; nt < N_TILES; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int chain = 1; chain < CHAINS; ++chain)
          acc[0][0][nt][i] += acc[chain][0][nt][i];
    // Of two successive groups each has its own place, so that one barrier serves.
    float* sums = (float*)(smem + sums_at + turn * sums_bytes);
    if (!PERSISTENT) __syncthreads();
    wait_copies();
    collect(sums, p, acc[0]);
    __syncthreads();
    finish_and_store(sums, p, group, &add);
  }
}
