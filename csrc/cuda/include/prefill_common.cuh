// The frame of the prefill kernels (sm_90a): y (m, rows) = x (m, cols) · Wᵀ for many activation rows m, W packed (rows, cols).
//
// W is operand A of wgmma and comes from registers or, of 8-bit values, from shared memory; x is operand B, so a block computes yᵀ: a tile
// of TILE_ROWS weight rows by TILE_TOKENS activation rows. Compile-time macros, set by the host:
//   ELEM_BF16    1 for bfloat16, 0 for float16 (weights, x, bias, residual and y alike; sums are float32)
//   VALUES       1: weights and x are e4m3; 2: int8, and sums int32; then each row of W and of x has a scale. 0: as above
//   N_TILES      n-tiles of 8 activation rows of a block's tile
//   M_BLOCKS     m64 blocks of weight rows held by a consumer warpgroup
//   CONSUMERS    consumer warpgroups
//   STAGES       buffers of 128 bytes of columns, STAGE_COLUMNS
//   CLUSTER      blocks side by side along the rows that share their activations: each fetches a part of a buffer for all
//   SPLITS       blocks of a cluster that share the columns of one tile; their sums meet in distributed shared memory. 0: clusters share
//                the tiles that are left behind whole rounds, as prefill_ranges.cuh says
//   MIN_BLOCKS   blocks that must fit one multiprocessor (bounds the registers)
//   STORES, LEAVING   see below
//   OUT_LEVELS   1: y is e4m3, behind a ReLU, with a scale for each activation row: prefill_levels.cuh
//
//              TILE_TOKENS                      x --tensor copies, multicast--> STAGES buffers [TILE_TOKENS][128 bytes], 16-byte chunks
//        +-----------+-----------+                       exchanged by the row modulo 8, as wgmma reads them
//        | block     | block     |              W --the kernel's own way--> registers of the consumers
//   rows | of tile 0 | of tile 2 |              sums --transposed through shared memory, bias, ReLU, residual--> y, row-major
//        +-----------+-----------+
//        | tile 1    | tile 3    |              blocks stay, and take tiles cluster by cluster: along the rows of a band of BAND_TOKENS
//        +-----------+-----------+              activation rows, so that those and some of W stay in L2
//
// A kernel is a struct of what its consumers do with W:
//   Weights(p, smem, fragment, unit, rounds)   by a consumer warp, which has row tile `fragment` of 16 of every tile of the block, and of
//                                              it `rounds` units of UNIT columns from `unit` on
//   static void produce(p, stage, full, tile, step)   by the producer warp: copies of its own into the buffer behind x (WEIGHT_STAGE_BYTES)
//   void start(p, tile, unit)                  row tile `tile` (of m64 block 0; 4 per further block), from `unit` on, is next; may load
//                                              ahead
//   void multiply_all(d, p, buffers, rounds)   adds the products of `rounds` units
#pragma once

#ifndef VALUES
#define VALUES 0
#endif
#include "element.cuh"
#include "bulk.cuh"
#include "cluster.cuh"
#include "slot_ring.cuh"
#include "wgmma.cuh"

#ifndef WEIGHT_STAGE_BYTES
#define WEIGHT_STAGE_BYTES 0
#endif
#if SPLITS == 0
#undef SPLITS
#define SPLITS 1
#define RANGES 1
#else
#define RANGES 0
#endif
#define ELEMENT_KIND (ELEM_BF16 ? BF16 : F16)
#ifndef UNIT
#define UNIT 256
#endif
#define STAGE_COLUMNS (VALUES ? 128 : 64)
#define TILE_TOKENS (8 * N_TILES)
#define TILE_ROWS (64 * M_BLOCKS * CONSUMERS)
#define TILE_FRAGMENTS (TILE_ROWS / 16)
#define BAND_TOKENS 2048
#define THREADS (128 * (CONSUMERS + 1))
#define X_STAGE_BYTES (TILE_TOKENS * 128)
#define STAGE_BYTES (X_STAGE_BYTES + WEIGHT_STAGE_BYTES)
#define STAGING_AT (STAGES * STAGE_BYTES)
#define CHUNK_TOKENS 32
// Chunks of sums on their way to y, per consumer warpgroup: 2, and threads write them, or more, and tensor stores do while the next tile
// runs. LEAVING of them leave together, a divisor of those of an m64 block.
#ifndef STORES
#define STORES 2
#endif
#ifndef LEAVING
#define LEAVING 1
#endif
#ifndef TENSOR_STORES
#define TENSOR_STORES (STORES > 2)
#endif
#ifndef OUT_LEVELS
#define OUT_LEVELS 0
#endif
#define BLOCK_CHUNKS (TILE_TOKENS / CHUNK_TOKENS)
// Where neither scales nor other blocks have a part in them, sums begin with the bias.
#define BIAS_FIRST (SPLITS == 1 && VALUES == 0 && !RANGES)
#define STAGING_BYTES (STORES * CHUNK_TOKENS * 128)
#define BARRIERS_AT (STAGING_AT + CONSUMERS * STAGING_BYTES)
#define SUMS_PITCH (TILE_ROWS + 4)
// Registers go from the producers to the consumers, in multiples of eight, within what the block has at its start; the
// largest sums leave the producer a few too little.
#ifndef PRODUCER_REGISTERS
#define PRODUCER_REGISTERS (M_BLOCKS * N_TILES > 40 ? 24 : 32)
#endif
#define LAUNCH_REGISTERS (65536 / MIN_BLOCKS / THREADS / 8 * 8)
#define SHARE_REGISTERS ((LAUNCH_REGISTERS * (CONSUMERS + 1) - PRODUCER_REGISTERS) / CONSUMERS / 8 * 8)
#define CONSUMER_REGISTERS (SHARE_REGISTERS > 240 ? 240 : SHARE_REGISTERS)

static_assert(BLOCK_CHUNKS % LEAVING == 0 && STORES >= LEAVING, "chunks leave in whole turns");
static_assert(TILE_TOKENS % CHUNK_TOKENS == 0 && TILE_TOKENS % (8 * CLUSTER) == 0, "a tile has whole chunks of activation rows");

struct alignas(64) Params {
  u64 x[16];                  // tensor map of x (m, cols): boxes of STAGE_COLUMNS by TILE_TOKENS / CLUSTER rows, 128-byte exchange pattern
  u64 y_map[16];              // tensor map of y (m, rows): boxes of 64 columns by LEAVING chunks' rows, likewise, or of levels with the
                              // pattern of 64 bytes; unless y_vector is 0
  const uint4* weight;        // the kernel's own layout
  const u32* offsets;         // unstructured only, as is depth: see paired.cuh
  const u16* bias;            // (rows,) or null
  const u16* residual;        // (m, rows) contiguous or null; added last
  u16* y;                     // (m, rows) contiguous
  const float* weight_scales; // (rows,), where VALUES is not 0
  const float* x_scales;      // (m,), readable up to a multiple of TILE_TOKENS
  int m, rows;
  int units;    // ceil(cols / UNIT)
  int relu;     // clamp at 0 after the bias, before the residual
  int depth;    // words of the deepest unit
  int y_vector; // y and residual are 16-byte aligned and rows is a multiple of 8

  const float* y_times; // (m,), readable as x_scales are, the inverses of y's scales where y is levels; then it is reached by its map alone
  // Of RANGES, see there.
  void* workspace;
  u32* flags;
  int sharers; // clusters that share a tile, at most on average
};

// All of a block's shared memory.
extern __shared__ __align__(1024) unsigned char dynamic[];

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ float to_float(u16 v) { return load_element<ELEMENT_KIND>(&v, 0); }

__device__ __forceinline__ void load_shared_x4(u32 address, u32 (&v)[4]) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address) : "memory");
}

// Weights are read again by the blocks of other activation rows: kept out of L1 only.
__device__ __forceinline__ uint4 load_weight(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// The same, ordered among memory accesses: the compiler moves other loads to just before their use, however early they are written.
__device__ __forceinline__ uint4 load_in_order(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ u64 activation_policy() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// The thread's number, read anew: what follows from it is not held in registers while products are multiplied.
__device__ __forceinline__ u32 read_thread() {
  u32 thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// A barrier of the 128 threads of one consumer warpgroup.
__device__ __forceinline__ void warpgroup_sync(u32 thread) { asm volatile("bar.sync %0, 128;" ::"r"(1 + (thread >> 7)) : "memory"); }

// The buffers as a consumer warp goes through them, each once.
struct Buffers {
  Ring ring;
  bool any; // a buffer of the tile has been opened

  // Shared address of the next buffer, once it is there.
  __device__ __forceinline__ u32 open() const {
    const u32 smem = shared_address(dynamic);
    barrier_wait(smem + BARRIERS_AT + 8 * ring.slot, ring.parity);
    return smem + ring.slot * STAGE_BYTES;
  }

  // Gives back the buffer before that of the ring.
  __device__ __forceinline__ void release() const {
    const u32 slot = (ring.slot == 0 ? STAGES : ring.slot) - 1;
    warp_arrive_in<CLUSTER>(shared_address(dynamic) + BARRIERS_AT + 8 * (STAGES + slot), blockIdx.y * CLUSTER);
  }

  // After products have been committed: waits for those before them. With the `first` of a buffer the one before it is given back, after
  // the `last` the next one is due.
  __device__ __forceinline__ void close(bool first, bool last) {
    wait_products<1>();
    if (first) {
      if (any) release();
      any = true;
    }
    if (last) ring.advance(STAGES);
  }

  __device__ __forceinline__ void finish() {
    wait_products<0>();
    if (any) release();
    any = false;
  }
};

// Tiles in the order in which the clusters take them, and which of their units are the block's.
struct Schedule {
  int at, begin, rounds;

  __device__ __forceinline__ Schedule(const Params&, int begin, int rounds) : at(blockIdx.x / CLUSTER), begin(begin), rounds(rounds) {}

  static __device__ __forceinline__ int row_groups_of(const Params& p) {
    return (p.rows + TILE_ROWS * CLUSTER - 1) / (TILE_ROWS * CLUSTER);
  }
  static __device__ __forceinline__ int token_tiles_of(const Params& p) { return (p.m + TILE_TOKENS - 1) / TILE_TOKENS; }

  static __device__ __forceinline__ int tiles_of(const Params& p) { return row_groups_of(p) * token_tiles_of(p); }

  __device__ __forceinline__ bool any(const Params& p) const { return at < tiles_of(p); }
  __device__ __forceinline__ void advance(const Params&) { at += gridDim.x / CLUSTER; }

  __device__ __forceinline__ void place(const Params& p, int& row, int& token) const {
    constexpr int BAND = (BAND_TOKENS + TILE_TOKENS - 1) / TILE_TOKENS;
    const int row_groups = row_groups_of(p), token_tiles = token_tiles_of(p);
    const int first = at / (BAND * row_groups) * BAND, width = min(BAND, token_tiles - first), within = at - first * row_groups;
    token = (first + within % width) * TILE_TOKENS;
    row = (within / width * CLUSTER + blockIdx.x % CLUSTER) * TILE_ROWS;
  }
};

#include "prefill_store.cuh"
#if RANGES
#include "prefill_ranges.cuh"
using Tiles = Ranges;
#else
using Tiles = Schedule;
#endif
#if OUT_LEVELS
#include "prefill_levels.cuh"
#endif

template <class Weights>
__device__ __forceinline__ void produce(const Params& p, u32 smem, int begin, int rounds) {
  const u32 full = smem + BARRIERS_AT, empty = full + 8 * STAGES, lane = threadIdx.x & 31;
  const u32 part = blockIdx.x % CLUSTER;
#if CLUSTER > 1
  const u16 mask = (u16)(((1u << CLUSTER) - 1) << (blockIdx.y * CLUSTER));
#endif
  const u64 policy = activation_policy();
  Ring ring = {0, 1};
  wait_predecessor();
  for (Tiles tiles(p, begin, rounds); tiles.any(p); tiles.advance(p)) {
    int row, token;
    tiles.place(p, row, token);
    const int behind = (tiles.begin + tiles.rounds) * (UNIT / STAGE_COLUMNS);
    for (int stage = tiles.begin * (UNIT / STAGE_COLUMNS); stage < behind; ++stage) {
      const u32 buffer = smem + ring.slot * STAGE_BYTES, barrier = full + 8 * ring.slot;
      barrier_wait(empty + 8 * ring.slot, ring.parity);
      if (lane == 0) {
        barrier_expect(barrier, STAGE_BYTES);
        const u32 target = buffer + part * (X_STAGE_BYTES / CLUSTER);
        const int column = stage * STAGE_COLUMNS, first = token + part * (TILE_TOKENS / CLUSTER);
#if CLUSTER == 1
        tensor_copy(target, p.x, column, first, barrier, policy);
#else
        tensor_copy_to_all(target, p.x, column, first, barrier, mask, policy);
#endif
      }
      __syncwarp();
      Weights::produce(p, buffer + X_STAGE_BYTES, barrier, row / 16, stage);
      ring.advance(STAGES);
    }
  }
}

template <class Weights>
__device__ __forceinline__ void consume(const Params& p, int begin, int rounds) {
  const u32 smem = shared_address(dynamic);
  // Of the warpgroup: rows of the tile before its own; of the warp: its row tile of 16.
  const auto above = [](u32 thread) { return (int)(thread >> 7) * (64 * M_BLOCKS); };
  const auto fragment = [&](u32 thread) { return above(thread) / 16 + (int)(thread >> 5 & 3); };
  Buffers buffers = {{0, 0}, false};
  Weights weights(p, smem, fragment(threadIdx.x), begin, rounds);
  Tiles tiles(p, begin, rounds);
  if (!tiles.any(p)) return;
  int row, token;
  tiles.place(p, row, token);
  weights.start(p, row / 16 + fragment(threadIdx.x), tiles.begin);
  Bias bias;
  if (BIAS_FIRST) bias.load(p, threadIdx.x, row + above(threadIdx.x));
  bool first = true;
  while (true) {
    Sum d[M_BLOCKS][N_TILES][4];
#pragma unroll
    for (int i = 0; i < M_BLOCKS * N_TILES * 4; ++i)
      d[i / 4 / N_TILES][i / 4 % N_TILES][i % 4] = BIAS_FIRST ? (Sum)bias.values[i / 4 / N_TILES][i % 4 / 2] : (Sum)0;
    weights.multiply_all(d, p, buffers, tiles.rounds);
    // From here on the place of the tile is found anew.
    const u32 thread = read_thread();
    asm volatile("" : "+r"(tiles.at));
    tiles.place(p, row, token);
#if SPLITS == 1
    const int done_row = row + above(thread), done_token = token;
    if (!BIAS_FIRST) bias.load(p, thread, done_row);
#if RANGES
    const Share share = tiles.share(p);
#endif
    tiles.advance(p);
    const bool more = tiles.any(p);
    if (more) tiles.place(p, row, token);
#endif
    buffers.finish();
    // Nothing that reads the sums may move up before the wait.
#pragma unroll
    for (int mb = 0; mb < M_BLOCKS; ++mb)
#pragma unroll
      for (int nt = 0; nt < N_TILES; ++nt)
        asm volatile(""
                     : SUM_REGISTER(d[mb][nt][0]), SUM_REGISTER(d[mb][nt][1]), SUM_REGISTER(d[mb][nt][2]),
                       SUM_REGISTER(d[mb][nt][3])::"memory");
    if (first) wait_predecessor();
    first = false;
#if SPLITS > 1
    cluster_sync();
    collect(p, (float*)dynamic, d, above(thread), row, token);
    cluster_sync();
    reduce_and_store(p, (const float*)dynamic, row, token);
    return;
#else
    if (more) weights.start(p, row / 16 + fragment(thread), tiles.begin);
    const Bias own = bias;
    if (BIAS_FIRST && more) bias.load(p, thread, row + above(thread));
    const u32 staging = smem + STAGING_AT + (thread >> 7) * STAGING_BYTES;
#if RANGES
    if (share.left) {
      leave_sums(p, thread, d);
      if (more) continue;
      return;
    }
    if (share.joined) add_sums(p, thread, staging, d, share.tile);
#endif
#if OUT_LEVELS
    store_levels(p, thread, staging, d, own, done_row, done_token);
#else
    if (p.residual)
      store_tile<true, false>(p, thread, staging, d, own, done_row, done_token);
    else if (p.relu)
      store_tile<false, true>(p, thread, staging, d, own, done_row, done_token);
    else
      store_tile<false, false>(p, thread, staging, d, own, done_row, done_token);
#endif
    if (more) continue;
#if TENSOR_STORES
    if ((thread & 127) == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
    return;
#endif
  }
}

template <class Weights>
__device__ __forceinline__ void prefill(const Params& p) {
  const u32 smem = shared_address(dynamic);
  const int split = SPLITS > 1 ? blockIdx.y : 0;
  const int begin = (int)((long long)p.units * split / SPLITS), rounds = (int)((long long)p.units * (split + 1) / SPLITS) - begin;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(smem + BARRIERS_AT + 8 * s, 1);
      barrier_init(smem + BARRIERS_AT + 8 * (STAGES + s), 4 * CONSUMERS * CLUSTER * WARP_ARRIVALS);
    }
    barrier_init_fence();
  }
  release_successor();
#if CLUSTER * SPLITS > 1
  cluster_sync();
#endif
  __syncthreads();
  if (threadIdx.x >= 128 * CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
    if (threadIdx.x < 128 * CONSUMERS + 32) produce<Weights>(p, smem, begin, rounds);
#if SPLITS > 1
    __syncwarp();
    cluster_sync();
    cluster_sync();
#endif
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
    consume<Weights>(p, begin, rounds);
  }
  // A block may not leave while others still copy into it, arrive at its barriers or read its sums.
#if CLUSTER * SPLITS > 1
  __syncwarp();
  cluster_sync();
#endif
}
