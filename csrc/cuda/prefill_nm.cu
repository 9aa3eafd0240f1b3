// y = x · Wᵀ for 2:4 weights of 16-bit values and many activation rows on Hopper (sm_90a): sparse wgmma over the frame of
// prefill_common.cuh.
//
// `weight`, in uint4, for T = ceil(rows / 16) row tiles and U = ceil(cols / 256) units: [T][U][1 + STEPS][32 lanes], chunk 0 the lane's
// positions for the whole unit, chunk 1 + s its part of operand A in step s of 32 columns: the layout of decode_nm.cu. A word of positions
// serves two steps. Consumers load the positions into registers.
//   BATCH       products of a warpgroup that go to the tensor cores together, a divisor of 2 * M_BLOCKS
//   A_SHARED 0: values go from memory straight into registers of the consumers, half a unit or a batch ahead
//   A_SHARED 1: producer warps load them AHEAD buffers ahead and store them into the buffers of x, [64 rows][32 kept values] of each m64
//               block, for wgmma to read there. A chunk's word w of all lanes together is an 8 x 16-byte matrix (w % 2: its rows, w / 2:
//               its columns), so that one stmatrix takes a chunk from the lanes' order to that of rows
#if A_SHARED
#define WEIGHT_STAGE_BYTES (M_BLOCKS * CONSUMERS * 4096)
#define STORING_WARPS 4
// Values in registers.
#ifndef AHEAD
#define AHEAD (M_BLOCKS * CONSUMERS == 2 ? 2 : 1)
#endif
#ifndef PRODUCER_REGISTERS
#define PRODUCER_REGISTERS (CONSUMERS > 2 ? 56 : M_BLOCKS * N_TILES > 40 ? 72 : 88)
#endif
#endif
#include "prefill_common.cuh"

#define STEPS 8
// Uint4 of one row tile's unit.
#define UNIT_QUADS ((1 + STEPS) * 32)
// Steps that a word of positions serves.
#define WORD_STEPS 2
// Sets of registers for positions: those of the next unit come in one load where there is room for two, else word by word.
#if M_BLOCKS * N_TILES > 40 || (CONSUMERS > 2 && !A_SHARED) || (SPLITS > 1 && M_BLOCKS > 1)
#define PARITIES 1
#else
#define PARITIES 2
#endif
// Products of a warpgroup in a unit, of which BATCH at a time go to the tensor cores.
#define PRODUCTS (STEPS * M_BLOCKS)
#if !A_SHARED
// Operands that are loaded together, while those loaded before are multiplied: a scoreboard counts all loads under way, and so who waits
// for one waits for those behind it as well.
#define GROUP (BATCH > 1 ? BATCH : PRODUCTS / 2)
#define SETS (2 * GROUP)
static_assert(PRODUCTS % SETS == 0 && GROUP % BATCH == 0, "an operand's registers are known at compile time");
#endif

// Tiles behind the last row read the last tile again; their sums are not stored.
__device__ __forceinline__ u32 quads_before(const Params& p, int tile, int unit) {
  return ((u32)min(tile, (p.rows + 15) / 16 - 1) * p.units + unit) * UNIT_QUADS;
}

#if A_SHARED
// The values of the row tiles 4 b + w of each tile of the block, for warp w of the producers.
struct StoredSupply {
  static constexpr int TILES = M_BLOCKS * CONSUMERS;
  static_assert(UNIT_STAGES % AHEAD == 0, "registers are known at compile time");
  Schedule tiles; // of the values that are loaded next, as is unit
  int begin, end, unit;
  u32 source[TILES], next[TILES]; // uint4 before the lane's part of the unit at hand, and of the one after it
  uint4 values[AHEAD][TILES][2];
  u32 at; // of the lane's row of the matrix that it gives the address for, from the first tile's values on

  __device__ __forceinline__ StoredSupply(const Params& p, int begin, int rounds) : begin(begin), end(begin + rounds), unit(begin) {
    const u32 lane = threadIdx.x & 31, row = (lane >> 3 & 1) * 8 + (lane & 7), warp = threadIdx.x >> 5 & 3;
    at = warp * 1024 + row * 64 + (lane >> 4 ^ (row >> 1 & 3)) * 16;
    if (!tiles.any(p)) return;
    enter(p, source);
#pragma unroll
    for (int s = 0; s < AHEAD; ++s)
      load(p, s, source, s);
  }

  // Finds the tile's first unit.
  __device__ __forceinline__ void enter(const Params& p, u32 (&found)[TILES]) const {
    int row, token;
    tiles.place(p, row, token);
#pragma unroll
    for (int b = 0; b < TILES; ++b)
      found[b] = quads_before(p, row / 16 + 4 * b + (threadIdx.x >> 5 & 3), begin) + (threadIdx.x & 31);
  }

  __device__ __forceinline__ void load(const Params& p, int set, const u32 (&from)[TILES], int stage) {
#pragma unroll
    for (int b = 0; b < TILES; ++b)
#pragma unroll
      for (int step = 0; step < 2; ++step)
        values[set][b][step] = load_in_order(p.weight + from[b] + (1 + stage * 2 + step) * 32);
  }

  __device__ __forceinline__ void fill(const Params& p, u32 target, u32 barrier, int, int, int s) {
#pragma unroll
    for (int b = 0; b < TILES; ++b)
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const uint4& v = values[s % AHEAD][b][step];
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"((target + b * 4096 + at) ^ step * 32),
                     "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                     : "memory");
      }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(barrier);
    if (s == UNIT_STAGES - AHEAD) advance(p);
    load(p, s % AHEAD, s + AHEAD < UNIT_STAGES ? source : next, (s + AHEAD) % UNIT_STAGES);
    if (s == UNIT_STAGES - 1) {
#pragma unroll
      for (int b = 0; b < TILES; ++b)
        source[b] = next[b];
    }
  }

  // Finds the next unit. Behind the last, that one is read again, to no purpose.
  __device__ __forceinline__ void advance(const Params& p) {
    const bool within = ++unit < end;
#pragma unroll
    for (int b = 0; b < TILES; ++b)
      next[b] = source[b] + (within ? UNIT_QUADS : 0);
    if (within) return;
    unit = begin;
    tiles.advance();
    if (tiles.any(p)) enter(p, next);
  }
};
#endif

struct Weights {
#if A_SHARED
  using Supply = StoredSupply;
#else
  using Supply = NoSupply;
  uint4 values[SETS];
#endif
  const uint4* source[M_BLOCKS]; // of the unit at hand, this lane's
  u32 positions[PARITIES][M_BLOCKS][4];

  __device__ __forceinline__ Weights(const Params&, u32, int, int, int) {}

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

#if !A_SHARED
  // Operand A of product i of the unit at hand, or of the one `ahead` from its last on.
  __device__ __forceinline__ void load_values(int i, int ahead) {
    const int s = i / M_BLOCKS;
    values[i % SETS] = load_in_order(source[i % M_BLOCKS] + (s < STEPS ? 0 : ahead) + (1 + s % STEPS) * 32);
  }
#endif

  __device__ __forceinline__ void start(const Params& p, int tile, int unit) {
#pragma unroll
    for (int mb = 0; mb < M_BLOCKS; ++mb)
      source[mb] = p.weight + quads_before(p, tile + 4 * mb, unit) + (threadIdx.x & 31);
#if PARITIES == 2
    load_positions(0, 0);
#else
#pragma unroll
    for (int w = 0; w < 4; ++w)
      load_word(w, 0);
#endif
#if !A_SHARED
#pragma unroll
    for (int i = 0; i < GROUP; ++i)
      load_values(i, 0);
#endif
  }

  // d += product i of the unit at hand, step i / M_BLOCKS, whose columns are in `buffer`.
  template <int SELECTOR>
  __device__ __forceinline__ void multiply_step(Sum (&d)[N_TILES][4], u32 buffer, int i, u32 word) const {
    const int s = i / M_BLOCKS;
    const u64 b = describe(buffer + s % 2 * 64);
#if A_SHARED
    const u32 block = (threadIdx.x >> 7) * M_BLOCKS + i % M_BLOCKS;
    wgmma_sparse_shared<SELECTOR>(d, describe_rows64(buffer + X_STAGE_BYTES + block * 4096 + s % 2 * 32), b, word);
#else
    wgmma_sparse<SELECTOR>(d, values[i % SETS], b, word);
#endif
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
        const u32 word = positions[PARITY][mb][s / WORD_STEPS];
        if (s % WORD_STEPS == 0)
          multiply_step<0>(d[mb], buffer, i, word);
        else
          multiply_step<1>(d[mb], buffer, i, word);
      }
      commit_products();
      const bool last = (first + BATCH) % (2 * M_BLOCKS) == 0;
      x.close(first % (2 * M_BLOCKS) == 0, last);
      if (last && (first + BATCH < PRODUCTS || ahead)) buffer = x.open();
#if !A_SHARED
      if (first % GROUP == 0) {
#pragma unroll
        for (int i = first + GROUP; i < first + 2 * GROUP; ++i)
          load_values(i, ahead);
      }
#endif
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

  __device__ __forceinline__ void multiply_all(Sum (&d)[M_BLOCKS][N_TILES][4], const Params&, Buffers& x, int rounds) {
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
