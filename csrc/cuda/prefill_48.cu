// y = x · Wᵀ for 4:8 weights and many activation rows on Hopper (sm_90a): W is expanded in registers into operand A of dense wgmma, over
// the frame of prefill_common.cuh.
//
// `weight` is the layout of decode_nm.cu: lane (g, t) has columns 8t .. 8t + 7 of a step of 32, one group of eight, of rows g and g + 8.
// Operand A takes a pair of columns from each group instead, so the four lanes of a quad exchange pairs after expanding. A step costs
// a warp about 60 integer operations and 8 shuffles while the tensor cores take 256 clocks for its products with 256 activation rows.
#include "prefill_common.cuh"
#include "expand.cuh"

#define UNIT_QUADS (9 * 32)

struct Weights {
  static constexpr int SETS = 4;
  const uint4* source[M_BLOCKS]; // of the unit at hand, this lane's
  uint4 values[SETS];
  u32 positions[M_BLOCKS][4]; // a word for two steps

  __device__ __forceinline__ Weights(const Params&, u32, int, int, int) {}

  static __device__ __forceinline__ void produce(const Params&, u32, u32, int, int) {}

  __device__ __forceinline__ void load_positions(int mb, int w, int ahead) {
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(positions[mb][w]) : "l"((const u32*)(source[mb] + ahead) + w));
  }

  // Values of step i / M_BLOCKS of the unit at hand, or of the one `ahead` from its last on.
  __device__ __forceinline__ void load_values(int i, int ahead) {
    const int s = i / M_BLOCKS;
    values[i % SETS] = load_weight(source[i % M_BLOCKS] + (s < 8 ? 0 : ahead) + (1 + s % 8) * 32);
  }

  __device__ __forceinline__ void start(const Params& p, int tile, int unit) {
#pragma unroll
    for (int mb = 0; mb < M_BLOCKS; ++mb) {
      // Tiles behind the last row read the last tile again; their sums are not stored.
      const int of = min(tile + 4 * mb, (p.rows + 15) / 16 - 1);
      source[mb] = p.weight + ((size_t)of * p.units + unit) * UNIT_QUADS + (threadIdx.x & 31);
#pragma unroll
      for (int w = 0; w < 4; ++w)
        load_positions(mb, w, 0);
    }
#pragma unroll
    for (int i = 0; i < SETS; ++i)
      load_values(i, 0);
  }

  __device__ __forceinline__ void multiply_all(float (&d)[M_BLOCKS][N_TILES][4], const Params& p, Buffers& x, int rounds) {
    u32 a[2][8], codes[M_BLOCKS][4];
    u32 buffer = x.open();
    for (int round = 0; round < rounds; ++round) {
      // Behind the last unit it is read again, to no purpose: loads under a condition would make the compiler wait for each product.
      const int ahead = round + 1 < rounds ? UNIT_QUADS : 0;
#pragma unroll
      for (int i = 0; i < 8 * M_BLOCKS; ++i) {
        const int s = i / M_BLOCKS, mb = i % M_BLOCKS;
        const bool last = s % 2 == 1 && mb == M_BLOCKS - 1;
#pragma unroll
        for (int j = 0; j < 4; ++j)
          codes[mb][j] = s % 2 == 0 ? code_selectors(positions[mb][s / 2], j) : codes[mb][j] >> 16;
        expand_step(values[i % SETS], codes[mb], a[i % 2]);
        exchange_pairs(a[i % 2]);
        load_values(i + SETS, ahead);
        if (s % 2 == 1) load_positions(mb, s / 2, ahead);
        const u32 b = buffer + s % 2 * 64;
        const u32(&now)[8] = a[i % 2];
        fence_registers();
        wgmma_dense(d[mb], now[0], now[1], now[2], now[3], describe(b));
        wgmma_dense(d[mb], now[4], now[5], now[6], now[7], describe(b + 32));
        commit_products();
        x.close(s % 2 == 0 && mb == 0, last);
        if (last && (s < 7 || ahead)) buffer = x.open();
      }
#pragma unroll
      for (int mb = 0; mb < M_BLOCKS; ++mb)
        source[mb] += UNIT_QUADS;
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) prefill_48(const __grid_constant__ Params p) { prefill<Weights>(p); }
