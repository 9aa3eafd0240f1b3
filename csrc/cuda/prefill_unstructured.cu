// y = x · Wᵀ for unstructured weights and many activation rows on Hopper (sm_90a): W is expanded in registers into operand A of dense
// wgmma, over the frame of prefill_common.cuh.
//
// `weight` is the layout of paired.cuh. Every consumer warp fetches the units of its row tile for itself, from tile to tile without a
// stop, and looks their values up in shared memory behind the frame's. The four lanes of a quad exchange pairs after expanding, since
// operand A takes a pair of columns from each of a step's groups of eight.
//   PARTS        units are 256 / PARTS columns
//   BATCH        steps whose products go to the tensor cores together, 1 or 2
//   SLOTS        units that a warp has in shared memory or on their way
#define UNIT (256 / PARTS)
#define WARPS_ROW (4 * CONSUMERS)
#define WARPS_K 1
#define STEPS (8 / PARTS)
#include "prefill_common.cuh"
#include "expand.cuh"
#include "paired.cuh"
#include "prefill_units.cuh"

#if M_BLOCKS != 1
#error "a warp of prefill_unstructured expands one row tile"
#endif
#define TABLE_AT ((BARRIERS_AT + 16 * STAGES + 127) / 128 * 128)
#define SLOT_BARRIERS_AT (TABLE_AT + TABLE_BYTES)
#define SLOTS_AT (SLOT_BARRIERS_AT + (8 * WARPS_ROW * SLOTS + 127) / 128 * 128)

struct Weights {
  u32 table;
  u64 policy;
  Slots slots;
  Sequence sequence;

  static __device__ __forceinline__ void produce(const Params&, u32, u32, int, int) {}

  // Units come from tile to tile by themselves.
  __device__ __forceinline__ void start(const Params&, int, int) {}

  __device__ __forceinline__ Weights(const Params& p, u32 smem, int fragment, int begin, int rounds)
      : policy(shared_weight_policy()), sequence(p, fragment, begin, rounds) {
    const int warp = threadIdx.x >> 5;
    table = smem + TABLE_AT + (threadIdx.x & 31) % TABLE_COPIES * 8;
    slots.init(p, smem + SLOTS_AT, smem + SLOT_BARRIERS_AT, warp);
    slots.start(p, sequence, policy);
  }

  __device__ __forceinline__ void multiply_all(float (&d)[M_BLOCKS][N_TILES][4], const Params& p, Buffers& x, int rounds) {
    int left = rounds;
    do {
      Unit unit;
      slots.open(unit);
      u32 buffer = 0, held[2][BATCH][8];
      for_each_step(unit, table, [&](int s, u32(&a)[8]) {
        u32(&batch)[BATCH][8] = held[s / BATCH % 2];
#pragma unroll
        for (int i = 0; i < 8; ++i)
          batch[s % BATCH][i] = a[i];
        exchange_pairs(batch[s % BATCH]);
        if (s % BATCH != BATCH - 1) return;
        const bool first = s / BATCH * BATCH % 2 == 0, last = s % 2 == 1;
        if (first) buffer = x.open();
        fence_registers();
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
          const u32 b = buffer + (s - BATCH + 1 + i) % 2 * 64;
          const u32(&now)[8] = batch[i];
          wgmma_dense(d[0], now[0], now[1], now[2], now[3], describe(b));
          wgmma_dense(d[0], now[4], now[5], now[6], now[7], describe(b + 32));
        }
        commit_products();
        x.close(first, last);
      });
      slots.close(p, sequence, policy);
    } while (--left != 0);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) prefill_unstructured(const __grid_constant__ Params p) {
  fill_table(shared_address(dynamic) + TABLE_AT);
  prefill<Weights>(p);
}
