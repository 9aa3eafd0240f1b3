// y = x · Wᵀ for 2:4 weights of 16-bit values and many activation rows on Hopper (sm_90a): sparse wgmma over the frame of
// prefill_common.cuh, weights from registers.
//
// `weight`, in uint4, for T = ceil(rows / 16) row tiles and U = ceil(cols / 256) units: [T][U][1 + STEPS][32 lanes], chunk 0 the lane's
// positions for the whole unit, chunk 1 + s its part of operand A in step s of 32 columns: the layout of decode_nm.cu. A word of positions
// serves two steps.
//   BATCH       products of a warpgroup that go to the tensor cores together, a divisor of 2 * M_BLOCKS
// Operands go from memory straight into registers, half a unit or a batch ahead: through shared memory, whose bandwidth binds, they were
// slower.
#include "prefill_common.cuh"

#define STEPS 8
// Uint4 of one row tile's unit.
#define UNIT_QUADS ((1 + STEPS) * 32)
// Steps that a word of positions serves.
#define WORD_STEPS 2
// Sets of registers for positions: those of the next unit come in one load where there is room for two, else word by word.
#if M_BLOCKS * N_TILES > 40 || CONSUMERS > 2 || (SPLITS > 1 && M_BLOCKS > 1)
#define PARITIES 1
#else
#define PARITIES 2
#endif
// Products of a warpgroup in a unit, of which BATCH at a time go to the tensor cores.
#define PRODUCTS (STEPS * M_BLOCKS)
// Operands that are loaded together, while those loaded before are multiplied: a scoreboard counts all loads under way, and so who waits
// for one waits for those behind it as well.
#define GROUP (BATCH > 1 ? BATCH : PRODUCTS / 2)
#define SETS (2 * GROUP)
static_assert(PRODUCTS % SETS == 0 && GROUP % BATCH == 0, "an operand's registers are known at compile time");

__device__ __forceinline__ const uint4* unit_of(const Params& p, int tile, int unit) {
  // Tiles behind the last row read the last tile again; their sums are not stored.
  return p.weight + ((size_t)min(tile, (p.rows + 15) / 16 - 1) * p.units + unit) * UNIT_QUADS;
}

struct Weights {
  const uint4* source[M_BLOCKS]; // of the unit at hand, this lane's
  uint4 values[SETS];
  u32 positions[PARITIES][M_BLOCKS][4];
  __device__ __forceinline__ Weights(const Params&, u32, int, int, int) {}

  static __device__ __forceinline__ void produce(const Params&, u32, u32, int, int) {}

#if PARITIES == 2
  // Positions of the unit at hand, or of the one `ahead`, which has the other set of registers.
  __device__ __forceinline__ void load_positions(int parity, int ahead) {
#pragma unroll
    for (int mb = 0; mb < M_BLOCKS; ++mb) {
      u32(&v)[4] = positions[parity][mb];
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                   : "l"(source[mb] + ahead));
    }
  }
#else
  // Word w of the positions of the unit at hand, or of the one `ahead`. Its line is kept in L1 for the other words.
  __device__ __forceinline__ void load_word(int w, int ahead) {
#pragma unroll
    for (int mb = 0; mb < M_BLOCKS; ++mb)
      asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(positions[0][mb][w]) : "l"((const u32*)(source[mb] + ahead) + w));
  }
#endif

  // Operand A of product i of the unit at hand, or of the one `ahead` from its last on.
  __device__ __forceinline__ void load_values(int i, int ahead) {
    const int s = i / M_BLOCKS;
    values[i % SETS] = load_in_order(source[i % M_BLOCKS] + (s < STEPS ? 0 : ahead) + (1 + s % STEPS) * 32);
  }

  __device__ __forceinline__ void start(const Params& p, int tile, int unit) {
#pragma unroll
    for (int mb = 0; mb < M_BLOCKS; ++mb) {
      source[mb] = unit_of(p, tile + 4 * mb, unit) + (threadIdx.x & 31);
    }
#if PARITIES == 2
    load_positions(0, 0);
#else
#pragma unroll
    for (int w = 0; w < 4; ++w)
      load_word(w, 0);
#endif
#pragma unroll
    for (int i = 0; i < GROUP; ++i)
      load_values(i, 0);
  }

  // The products of one unit; `ahead` lies the next, or 0 behind the last unit, which is read again then to no purpose: loads under a
  // condition would make the compiler wait for each product.
  template <int PARITY>
  __device__ __forceinline__ void multiply(Sum (&d)[M_BLOCKS][N_TILES][4], Buffers& x, u32& buffer, int ahead) {
#pragma unroll
    for (int first = 0; first < PRODUCTS; first += BATCH) {
      fence_registers();
#pragma unroll
      for (int i = first; i < first + BATCH; ++i) {
        const int s = i / M_BLOCKS, mb = i % M_BLOCKS;
        const u64 b = describe(buffer + s % 2 * 64);
        const u32 word = positions[PARITY][mb][s / WORD_STEPS];
        if (s % WORD_STEPS == 0)
          wgmma_sparse<0>(d[mb], values[i % SETS], b, word);
        else
          wgmma_sparse<1>(d[mb], values[i % SETS], b, word);
      }
      commit_products();
      const bool last = (first + BATCH) % (2 * M_BLOCKS) == 0;
      x.close(first % (2 * M_BLOCKS) == 0, last);
      if (last && (first + BATCH < PRODUCTS || ahead)) buffer = x.open();
      if (first % GROUP == 0) {
#pragma unroll
        for (int i = first + GROUP; i < first + 2 * GROUP; ++i)
          load_values(i, ahead);
      }
      // Products under way still read positions, those of the batch before until now.
#if PARITIES == 2
      if (first == 0) load_positions(PARITY ^ 1, ahead);
#else
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int over = (w + 1) * WORD_STEPS * M_BLOCKS;
        if (over > first - BATCH && over <= first) load_word(w, ahead);
        if (first == 0 && over > PRODUCTS - BATCH) load_word(w, 0);
      }
#endif
    }
#pragma unroll
    for (int mb = 0; mb < M_BLOCKS; ++mb)
      source[mb] += UNIT_QUADS;
  }

  __device__ __forceinline__ void multiply_all(Sum (&d)[M_BLOCKS][N_TILES][4], const Params& p, Buffers& x, int rounds) {
    u32 buffer = x.open();
    for (int round = 0; round < rounds; round += PARITIES) {
      multiply<0>(d, x, buffer, round + 1 < rounds ? UNIT_QUADS : 0);
#if PARITIES == 2
      if (round + 1 >= rounds) break;
      multiply<1>(d, x, buffer, round + 2 < rounds ? UNIT_QUADS : 0);
#endif
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) prefill_nm(const __grid_constant__ Params p) { prefill<Weights>(p); }
