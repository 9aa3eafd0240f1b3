// y = x · Wᵀ for 2:4 weights and many activation rows on Hopper (sm_90a): sparse wgmma over the frame of prefill_common.cuh.
//
// `weight`, in uint4, for T = ceil(rows / 16) row tiles and U = ceil(cols / 256) units: [T][U][1 + STEPS][32 lanes], chunk 0 the lane's
// positions for the whole unit, chunk 1 + s its part of operand A in step s.
//   16-bit values: 8 steps of 32 columns, the layout of decode_nm.cu; a word of positions serves two steps
//   8-bit values: 4 steps of 64 columns; word s holds, of step s and for lane (g, q), row g + 8 (q & 1) and columns 32 (q / 2) on
//   BATCH       products of a warpgroup that go to the tensor cores together, a divisor of 2 * M_BLOCKS
//   A_SHARED 0: they go from memory straight into registers, three products or a batch ahead
//   A_SHARED 1: bulk copies bring them into the buffers of x, 1 KB for each row tile of 16, and they are read a batch ahead
#if A_SHARED
#define WEIGHT_STAGE_BYTES (4 * M_BLOCKS * CONSUMERS * 1024)
#endif
#include "prefill_common.cuh"

#define STEPS (VALUES ? 4 : 8)
// Uint4 of one row tile's unit.
#define UNIT_QUADS ((1 + STEPS) * 32)
// Steps that a word of positions serves.
#define WORD_STEPS (VALUES ? 1 : 2)
// Products of a warpgroup in a unit, of which BATCH at a time go to the tensor cores.
#define PRODUCTS (STEPS * M_BLOCKS)

__device__ __forceinline__ const uint4* unit_of(const Params& p, int tile, int unit) {
  // Tiles behind the last row read the last tile again; their sums are not stored.
  return p.weight + ((size_t)min(tile, (p.rows + 15) / 16 - 1) * p.units + unit) * UNIT_QUADS;
}

struct Weights {
  // Operands in registers: of products under way, and loaded ahead.
  static constexpr int SETS = A_SHARED || BATCH > 1 ? 2 * BATCH : 4;
  const uint4* source[M_BLOCKS]; // of the unit at hand, this lane's
  uint4 values[SETS];
  u32 positions[M_BLOCKS][4];

  __device__ __forceinline__ Weights(const Params&, u32, int, int, int) {}

  static __device__ __forceinline__ void produce(const Params& p, u32 target, u32 barrier, int tile, int stage) {
#if A_SHARED
    const int i = threadIdx.x & 31;
    if (i < TILE_FRAGMENTS) {
      u64 policy;
      asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
      bulk_copy(target + i * 1024, unit_of(p, tile + i, stage / (STEPS / 2)) + (1 + stage % (STEPS / 2) * 2) * 32, 1024, barrier, policy);
    }
#endif
  }

  // Word w of the positions of the unit at hand, or of the one `ahead`. Its line is kept in L1 for the other words.
  __device__ __forceinline__ void load_positions(int w, int ahead) {
#pragma unroll
    for (int mb = 0; mb < M_BLOCKS; ++mb)
      asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(positions[mb][w]) : "l"((const u32*)(source[mb] + ahead) + w));
  }

  // Operand A of product i of the unit at hand, or of the one `ahead` from its last on.
  __device__ __forceinline__ void load_values(int i, int ahead) {
    const int s = i / M_BLOCKS;
    values[i % SETS] = load_weight(source[i % M_BLOCKS] + (s < STEPS ? 0 : ahead) + (1 + s % STEPS) * 32);
  }

  __device__ __forceinline__ void start(const Params& p, int tile, int unit) {
#pragma unroll
    for (int mb = 0; mb < M_BLOCKS; ++mb) {
      source[mb] = unit_of(p, tile + 4 * mb, unit) + (threadIdx.x & 31);
    }
#pragma unroll
    for (int w = 0; w < 4; ++w)
      load_positions(w, 0);
#if !A_SHARED
#pragma unroll
    for (int i = 0; i < SETS - BATCH; ++i)
      load_values(i, 0);
#endif
  }

  __device__ __forceinline__ void read_values(u32 buffer, int i) {
    const int s = i / M_BLOCKS, fragment = ((threadIdx.x >> 7) * M_BLOCKS + i % M_BLOCKS) * 4 + (threadIdx.x >> 5 & 3);
    u32 v[4];
    load_shared_x4(buffer + X_STAGE_BYTES + fragment * 1024 + s % 2 * 512 + (threadIdx.x & 31) * 16, v);
    values[i % SETS] = make_uint4(v[0], v[1], v[2], v[3]);
  }

  __device__ __forceinline__ void multiply_all(Sum (&d)[M_BLOCKS][N_TILES][4], const Params& p, Buffers& x, int rounds) {
    u32 buffer = x.open();
#if A_SHARED
#pragma unroll
    for (int i = 0; i < BATCH; ++i)
      read_values(buffer, i);
#endif
    for (int round = 0; round < rounds; ++round) {
      // Behind the last unit it is read again, to no purpose: loads under a condition would make the compiler wait for each product.
      const int ahead = round + 1 < rounds ? UNIT_QUADS : 0;
#pragma unroll
      for (int first = 0; first < PRODUCTS; first += BATCH) {
        fence_registers();
#pragma unroll
        for (int i = first; i < first + BATCH; ++i) {
          const int s = i / M_BLOCKS, mb = i % M_BLOCKS;
          const u64 b = describe(buffer + s % 2 * 64);
          const u32 word = positions[mb][s / WORD_STEPS];
          if (s % WORD_STEPS == 0)
            wgmma_sparse<0>(d[mb], values[i % SETS], b, word);
          else
            wgmma_sparse<1>(d[mb], values[i % SETS], b, word);
        }
        commit_products();
        const bool last = (first + BATCH) % (2 * M_BLOCKS) == 0;
        x.close(first % (2 * M_BLOCKS) == 0, last);
        if (last && (first + BATCH < PRODUCTS || ahead)) buffer = x.open();
#pragma unroll
        for (int i = first; i < first + BATCH; ++i)
#if A_SHARED
          read_values(buffer, (i + BATCH) % PRODUCTS);
#else
          load_values(i + SETS - BATCH, ahead);
#endif
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          // Once no product under way reads it: those of the last batch are one batch behind.
          const int over = (w + 1) * WORD_STEPS * M_BLOCKS;
          if (over > first - BATCH && over <= first) load_positions(w, ahead);
          if (first == 0 && over > PRODUCTS - BATCH) load_positions(w, 0);
        }
      }
#pragma unroll
      for (int mb = 0; mb < M_BLOCKS; ++mb)
        source[mb] += UNIT_QUADS;
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) prefill_nm(const __grid_constant__ Params p) { prefill<Weights>(p); }
