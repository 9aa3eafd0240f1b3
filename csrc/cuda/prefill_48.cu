// y = x · Wᵀ for 4:8 weights and many activation rows on Hopper (sm_90a): W is expanded in registers into operand A of dense wgmma, over
// the frame of prefill_common.cuh.
//
// `weight` is the layout of decode_nm.cu: lane (g, t) has columns 8t .. 8t + 7 of a step of 32, one group of eight, of rows g and g + 8.
// Operand A takes a pair of columns from each group instead, so the four lanes of a quad exchange pairs after expanding. A step costs a
// warp about 80 instructions, 8 of them shuffles, while the tensor cores take 256 clocks for its products with 256 activation rows.
//   BATCH   steps whose products go to the tensor cores together, 1 or 2
//   SLOTS   units of its row tile that a warp has in shared memory, behind the frame's, or on their way
#include "prefill_common.cuh"
#include "expand.cuh"
#include "prefill_units.cuh"

#if M_BLOCKS != 1
#error "a warp of prefill_48 expands one row tile"
#endif
#define UNIT_BYTES (9 * 512)
#define SLOT_BARRIERS_AT ((BARRIERS_AT + 16 * STAGES + 127) / 128 * 128)
#define SLOTS_AT (SLOT_BARRIERS_AT + (8 * 4 * CONSUMERS * SLOTS + 127) / 128 * 128)

struct Weights {
  u32 slots, barriers;
  Ring ring;
  u64 policy;
  Sequence sequence;

  static __device__ __forceinline__ void produce(const Params&, u32, u32, int, int) {}

  // Units come from tile to tile by themselves.
  __device__ __forceinline__ void start(const Params&, int, int) {}

  // By one lane.
  __device__ __forceinline__ void fetch(const Params& p, u32 into) const {
    barrier_expect(barriers + 8 * into, UNIT_BYTES);
    bulk_copy(slots + into * UNIT_BYTES, p.weight + sequence.unit * (UNIT_BYTES / 16), UNIT_BYTES, barriers + 8 * into, policy);
  }

  __device__ __forceinline__ Weights(const Params& p, u32 smem, int fragment, int begin, int rounds)
      : ring{0, 0}, policy(shared_weight_policy()), sequence(p, fragment, begin, rounds) {
    const int warp = threadIdx.x >> 5;
    const bool first = (threadIdx.x & 31) == 0;
    slots = smem + SLOTS_AT + warp * SLOTS * UNIT_BYTES;
    barriers = smem + SLOT_BARRIERS_AT + warp * SLOTS * 8;
    init_own_barriers(barriers, SLOTS, 1);
    for (int s = 0; s < SLOTS && sequence.any; ++s) {
      if (first) fetch(p, s);
      sequence.advance(p);
    }
  }

  __device__ __forceinline__ void multiply_all(float (&d)[M_BLOCKS][N_TILES][4], const Params& p, Buffers& x, int rounds) {
    u32 a[2][BATCH][8], codes[4], buffer = 0;
    int left = rounds;
    do {
      const u32 unit = slots + ring.slot * UNIT_BYTES + (threadIdx.x & 31) * 16;
      barrier_wait(barriers + 8 * ring.slot, ring.parity);
      u32 positions[4], values[2][4];
      load_shared_x4(unit, positions);
      load_shared_x4(unit + 512, values[0]);
#pragma unroll
      for (int batch = 0; batch < 8 / BATCH; ++batch) {
        u32(&now)[BATCH][8] = a[batch % 2];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
          const int s = batch * BATCH + i;
          if (s + 1 < 8) load_shared_x4(unit + (s + 2) * 512, values[(s + 1) % 2]);
          const u32(&v)[4] = values[s % 2];
#pragma unroll
          for (int j = 0; j < 4; ++j)
            codes[j] = s % 2 == 0 ? code_selectors(positions[s / 2], j) : codes[j] >> 16;
          expand_step(make_uint4(v[0], v[1], v[2], v[3]), codes, now[i]);
          exchange_pairs(now[i]);
        }
        const bool first = batch * BATCH % 2 == 0, last = (batch + 1) * BATCH % 2 == 0;
        if (first) buffer = x.open();
        fence_registers();
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
          const u32 b = buffer + (batch * BATCH + i) % 2 * 64;
          wgmma_dense(d[0], now[i][0], now[i][1], now[i][2], now[i][3], describe(b));
          wgmma_dense(d[0], now[i][4], now[i][5], now[i][6], now[i][7], describe(b + 32));
        }
        commit_products();
        x.close(first, last);
      }
      __syncwarp();
      if (sequence.any) {
        if ((threadIdx.x & 31) == 0) fetch(p, ring.slot);
        sequence.advance(p);
      }
      ring.advance(SLOTS);
    } while (--left != 0);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) prefill_48(const __grid_constant__ Params p) { prefill<Weights>(p); }
