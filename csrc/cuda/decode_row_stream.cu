// y = x · Wᵀ for sparse weights and up to sixteen activation rows x, or the LayerNorm of a single one: what decode_unstructured.cu and
// decode_nm.cu compute, but no warp waits for another, and no kernel before it need normalise the row while memory has nothing to do.
//
//   block of WARPS_K warps and ROW_WARPS more:  row tiles of 16 weight rows b, b + B, b + 2B ... of all B blocks
//   warp:       every WARPS_K-th unit of these tiles, one tile behind the other, so that all have equally many however many a tile has
//               (CLUSTER blocks with the same b take every CLUSTER * WARPS_K-th each: few tiles are shared out more evenly, and of
//               several activation rows a block holds the columns of its own units only);
//               the next STAGES units of a warp are on their way (paired.cuh, nm_slots.cuh). The first one is expanded in registers
//               before there is an x
//   ROW_WARPS:  bring the rows, or, NORMED, the LayerNorm, which each block takes for itself, to shared memory, once; then one of
//               them adds up the sums of each tile when they are all there, while the others go on with the tiles behind
//
// Units k, k + CLUSTER * WARPS_K ... of a tile are added by one warp, in this order, whichever it is, and then those sums in the order of
// k, as those kernels do, and LayerNorms are layernorm.cu's (row_input.cuh): results are those of these kernels. Units, scales and shifts,
// which no kernel writes, are fetched before predecessors have ended.
//
// Macros: those of decode_common.cuh, with one n-tile, row tile and warp along the rows; PATTERN 24, 48 or 0, unstructured, with
// TABLE_COPIES then, see octets.cuh; X_ROWS, which holds the activation rows; COLS, a multiple of 256; NORMED, of one row; ROW_WARPS;
// CLUSTER, the blocks of a cluster.
#define UNSTRUCTURED (PATTERN == 0)
#define SMALL_UNITS 1
#define PRODUCERS ROW_WARPS
#define X_PAD 0
#include "decode_common.cuh"
#include "addend.cuh"
#include "expand.cuh"
#include "gather.cuh"
#if UNSTRUCTURED
// Instructions are what a unit waits for between its arrival and its last sum: 13 % fewer. Units of fewer columns gained nothing.
#define WIDE_ENTRIES (PARTS == 1)
#include "paired.cuh"
#define OPERAND_WORDS 8
#else
#if PATTERN == 24
#include "mma_sparse.cuh"
#endif
#include "nm_slots.cuh"
#define TABLE_BYTES 0
__device__ __forceinline__ u32 own_table(u32) { return 0; }
#endif

#if N_TILES != 1 || ROW_TILES != 1 || WARPS_ROW != 1
#error "decode_row_stream takes few activation rows, and a row tile at a time"
#endif
#if X_ROWS > 16 || (NORMED && X_ROWS > 1)
#error "decode_row_stream takes sixteen activation rows at most, and the LayerNorm of one"
#endif
// Fragments of eight activation rows.
#define X_TILES ((X_ROWS + 7) / 8)

#define UNITS (COLS / UNIT)
#define CHAINS 2
#define ALL_WARPS (CLUSTER * WARPS_K)
// Warps that have a share of a tile.
#define SHARES (ALL_WARPS < UNITS ? ALL_WARPS : UNITS)
#define SHARE_PITCH (X_ROWS * RED_PITCH)
// Tiles that the fastest warp may be ahead of the slowest: no fewer than a warp goes ahead from one of its tiles to the next, since a
// barrier tells no more of its past than the last phase.
#define STRIDE ((ALL_WARPS + UNITS - 1) / UNITS)
#define LEAST_RING (X_ROWS > 2 ? 2 : 4)
#define RING (STRIDE > LEAST_RING ? STRIDE : LEAST_RING)
#define SUMS_BYTES (RING * SHARES * SHARE_PITCH * 4)
// Columns that a block has of several activation rows: those of its own units, which are the same in all tiles.
#define OWN_COLUMNS (X_ROWS > 1 && CLUSTER > 1)
#define X_COLS (OWN_COLUMNS ? COLS / CLUSTER : COLS)
#if OWN_COLUMNS && UNITS % ALL_WARPS != 0
#error "warps of a cluster have equal shares of each tile"
#endif
// Between activation rows in shared memory, so that what lanes read at a time lies in different banks.
#define ROW_PITCH (2 * X_COLS + (X_ROWS == 1 ? 0 : PATTERN == 24 ? 16 : 64))
// Shared memory: the rows, where a LayerNorm's takes the place of the scales; the shifts; the moments; sums of RING tiles, their barriers;
// the table; barriers of the slots; slots.
#define AT_ROW 0
#define AT_SHIFT (AT_ROW + X_ROWS * ROW_PITCH)
#define AT_MOMENTS (AT_SHIFT + SHIFT_BYTES)
#define AT_SUMS (AT_MOMENTS + MOMENTS_BYTES)
#define AT_BARRIERS (AT_SUMS + SUMS_BYTES)
#define AT_TABLE ((AT_BARRIERS + 16 * RING + 127) / 128 * 128)
#define AT_SLOT_BARRIERS (AT_TABLE + TABLE_BYTES)
#define AT_SLOTS (AT_SLOT_BARRIERS + (8 * WARPS_K * SLOTS + 127) / 128 * 128)
#include "row_input.cuh"

// Where a warp stands in the units of its cluster.
struct Place {
  int tile, column; // the tile, the unit in it
  u32 turn;         // how many the cluster had before it

  // Enters the tile that has the unit.
  __device__ __forceinline__ void settle() {
#pragma unroll
    for (int i = 0; i < STRIDE; ++i)
      if (column >= UNITS) {
        column -= UNITS;
        tile += gridDim.x;
        ++turn;
      }
  }
};

// The units of a warp, for Slots.
struct Sequence {
  Place place;
  int tiles;
  u32 unit;
  bool any;

  __device__ __forceinline__ void find() {
    any = place.tile < tiles;
    unit = place.tile * UNITS + place.column;
  }

  __device__ __forceinline__ void advance(const Params&) {
    place.column += ALL_WARPS;
    place.settle();
    find();
  }
};

// What a warp needs for any of its units.
struct Work {
  const Params& p;
  u64 policy;
  u32 own; // its copy of the table, where there is one

  // Calls take(s, a) for each step of the warp's oldest unit, at `place`, and asks for another one.
  template <typename Take>
  __device__ __forceinline__ void take_unit(Slots& slots, Sequence& sequence, const Place& place, Take take) const {
    Unit unit;
#if UNSTRUCTURED
    slots.open(unit);
    for_each_step(unit, own, take);
#else
    slots.open(unit, place.column % PARTS);
    for_each_step(unit, take);
#endif
    slots.close(p, sequence, policy);
  }
};

// Barriers of the sums of the cluster's tile `turn`: all shares are there, in its first block, and they have been read.
__device__ __forceinline__ u32 full_barrier(u32 base, u32 turn) { return base + AT_BARRIERS + turn % RING * 16; }
__device__ __forceinline__ u32 empty_barrier(u32 base, u32 turn) { return full_barrier(base, turn) + 8; }
__device__ __forceinline__ u32 ring_parity(u32 turn) { return turn / RING & 1; }

__device__ __forceinline__ int activation_rows(const Params& p) { return X_ROWS == 1 ? 1 : p.m; }

__device__ __forceinline__ float* sums_of(unsigned char* smem, u32 turn) {
  return (float*)(smem + AT_SUMS) + turn % RING * (SHARES * SHARE_PITCH);
}

// One warp of the cluster's first block: y from the sums of all its tiles.
__device__ __forceinline__ void add_up(const Params& p, unsigned char* smem, int tiles) {
  const int lane = threadIdx.x & 31, m = activation_rows(p);
  const u32 base = shared_address(smem);
  u32 turn = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, ++turn) {
    const int row = tile * 16 + lane % 4 * 4;
    Addend add[X_TILES] = {};
#pragma unroll
    for (int t = 0; t < X_TILES; ++t)
      if (t * 8 + lane / 4 < m && p.y_vector) add[t] = load_addend(p, t * 8 + lane / 4, row);
#if CLUSTER > 1
    if (lane == 0) barrier_expect(full_barrier(base, turn), SHARES * 64 * m);
#endif
    barrier_wait(full_barrier(base, turn), ring_parity(turn));
    float4 sums[X_TILES] = {};
#pragma unroll
    for (int t = 0; t < X_TILES; ++t) {
      const int n = t * 8 + lane / 4;
      if (n >= m) continue;
      const float4* red = (const float4*)(sums_of(smem, turn) + n * RED_PITCH) + lane % 4;
      sums[t] = red[0];
#pragma unroll
      for (int k = 1; k < SHARES; ++k)
        add_four(sums[t], red[k * (SHARE_PITCH / 4)]);
    }
    __syncwarp();
    if (EVERY_LANE_ARRIVES || lane == 0) {
      barrier_arrive(empty_barrier(base, turn));
#if CLUSTER > 1
#pragma unroll
      for (int rank = 1; rank < CLUSTER; ++rank)
        barrier_arrive_in(empty_barrier(base, turn), rank);
#endif
    }
#pragma unroll
    for (int t = 0; t < X_TILES; ++t) {
      const int n = t * 8 + lane / 4;
      if (n >= m) continue;
      if (p.y_vector)
        store_vector(p, n, row, sums[t], add[t]);
      else
        store_four(p, n, row, sums[t]);
    }
  }
}

// The threads of ROW_WARPS: the activation rows, of the columns that the block needs.
__device__ __forceinline__ void copy_rows(const Params& p, u32 base) {
  constexpr int VECTORS = UNIT / 8; // of a unit
  for (int n = 0; n < activation_rows(p); ++n) {
    const uint4* source = (const uint4*)(p.x + (size_t)n * p.ldx);
    for (int i = row_thread(); i < X_COLS / 8; i += ROW_THREADS) {
      int from = i;
      if (OWN_COLUMNS) {
        const int unit = i / VECTORS;
        from += (unit / WARPS_K * (ALL_WARPS - WARPS_K) + (int)blockIdx.y * WARPS_K) * VECTORS;
      }
      copy_vector(base + AT_ROW + n * ROW_PITCH + i * 16, source + from);
    }
  }
  wait_copies();
}

// Blocks of a cluster may not end while others still reach into their shared memory.
__device__ __forceinline__ void leave() {
#if CLUSTER > 1
  __syncwarp();
  cluster_sync();
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) decode_row_stream(const __grid_constant__ RowParams given) {
  extern __shared__ __align__(128) unsigned char smem[];
  release_successor();
  const Params& p = given.product;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int tiles = (p.rows + 15) / 16;
  const u32 base = shared_address(smem);
  const u64 policy = weight_policy();

#if UNSTRUCTURED
  TableLoad load;
  load.start();
#endif
  Place place = {(int)blockIdx.x, (int)blockIdx.y * WARPS_K + warp, 0};
  place.settle();
  Sequence sequence = {place, tiles, 0, false};
  sequence.find();
  Slots slots;
  First begun;
  if (warp < WARPS_K) {
    slots.init(p, base + AT_SLOTS, base + AT_SLOT_BARRIERS, warp);
    slots.look_up(p, sequence, begun);
    slots.fetch_first<0, 1>(p, begun, policy);
  } else {
    if (row_thread() == 0) {
      for (u32 turn = 0; turn < RING; ++turn) {
        barrier_init(full_barrier(base, turn), CLUSTER > 1 ? 1 : SHARES * WARP_ARRIVALS);
        barrier_init(empty_barrier(base, turn), WARP_ARRIVALS);
      }
      barrier_init_fence();
      fetch_for_next(given.ahead, blockIdx.x * CLUSTER + blockIdx.y, gridDim.x * CLUSTER);
    }
#if NORMED
    fetch_affine(given, smem);
#endif
  }
#if UNSTRUCTURED
  load.finish(base + AT_TABLE);
#endif
  __syncthreads();
#if CLUSTER > 1
  cluster_arrive();
#endif

  if (warp >= WARPS_K) {
    wait_predecessor();
#if NORMED
    normalise(given, smem);
#else
    copy_rows(p, base);
#endif
    __syncthreads();
#if CLUSTER > 1
    cluster_wait();
#endif
    if (warp == WARPS_K && blockIdx.y == 0) add_up(p, smem, tiles);
    leave();
    return;
  }

  const Work work = {p, policy, own_table(base + AT_TABLE)};
  const int m = activation_rows(p);
  // What a fragment holds of activation rows that there are not reaches no sum that is stored: the last one again, or nothing.
#if PATTERN == 24
  const u32 x_lane = base + AT_ROW + lane / 8 * 16;
#else
  const u32 x_lane = base + AT_ROW + lane / 4 * ROW_PITCH + lane % 4 * 16;
#endif
  float acc[CHAINS][X_TILES][4] = {};
  int first = place.column; // unit of the tile that the warp began with
  const auto multiply = [&](int s, const u32(&a)[OPERAND_WORDS]) {
    const int column = OWN_COLUMNS ? place.column / ALL_WARPS * WARPS_K + warp : place.column;
    const u32 at = x_lane + column * (UNIT * 2) + s * 64;
#pragma unroll
    for (int t = 0; t < X_TILES; ++t) {
      float (&d)[4] = acc[s % CHAINS][t];
      u32 b[4] = {};
#if PATTERN == 24
      ldmatrix_x4(at + min(t * 8 + lane % 8, m - 1) * ROW_PITCH, b);
      const uint4 kept = make_uint4(a[0], a[1], a[2], a[3]);
      if (s % 2 == 0)
        mma_sparse<0>(d, kept, b, a[4]);
      else
        mma_sparse<1>(d, kept, b, a[4]);
#else
      load_shared_x4_if(at + t * 8 * ROW_PITCH, t * 8 + lane / 4 < m, b);
      mma_dense(d, a[0], a[1], a[2], a[3], b[0], b[1]);
      mma_dense(d, a[4], a[5], a[6], a[7], b[2], b[3]);
#endif
    }
  };
  const auto pass = [&] {
    const u32 turn = place.turn;
    place.column += ALL_WARPS;
    if (place.column < UNITS) return;
    // The share is complete. Lane (g, t) has rows g and g + 8 of the fragment, for activation rows 2t and 2t + 1.
    if (turn >= RING) barrier_wait(empty_barrier(base, turn), ring_parity(turn - RING));
    float* share = sums_of(smem, turn) + first * SHARE_PITCH + lane / 4;
#pragma unroll
    for (int t = 0; t < X_TILES; ++t)
#pragma unroll
      for (int i = 0; i < (X_ROWS > 1 ? 2 : 1); ++i) {
        const int n = t * 8 + lane % 4 * 2 + i;
        float upper = acc[0][t][i], lower = acc[0][t][2 + i];
#pragma unroll
        for (int chain = 1; chain < CHAINS; ++chain) {
          upper += acc[chain][t][i];
          lower += acc[chain][t][2 + i];
        }
        if (n >= m) continue;
#if CLUSTER > 1
        u64* full = (u64*)(smem + AT_BARRIERS) + turn % RING * 2;
        gather_store(full, share + n * RED_PITCH, __float_as_uint(upper));
        gather_store(full, share + n * RED_PITCH + 8, __float_as_uint(lower));
#else
        share[n * RED_PITCH] = upper;
        share[n * RED_PITCH + 8] = lower;
#endif
      }
#if CLUSTER == 1
    __syncwarp();
    warp_arrive(full_barrier(base, turn));
#endif
#pragma unroll
    for (int chain = 0; chain < CHAINS; ++chain)
#pragma unroll
      for (int i = 0; i < 4 * X_TILES; ++i)
        acc[chain][i / 4][i % 4] = 0;
    place.settle();
    first = place.column;
  };

  // Second units are asked for when all first ones have been, which so arrive before them: a warp begins to expand the earlier.
  slots.fetch_first<1, SLOTS>(p, begun, policy);
  slots.announce(p, sequence);
  u32 expanded[STEPS][OPERAND_WORDS];
  if (place.tile < tiles)
    work.take_unit(slots, sequence, place, [&](int s, const u32(&a)[OPERAND_WORDS]) {
#pragma unroll
      for (int i = 0; i < OPERAND_WORDS; ++i)
        expanded[s][i] = a[i];
    });
  __syncthreads();
#if CLUSTER > 1
  cluster_wait();
#endif
  if (place.tile < tiles) {
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
      multiply(s, expanded[s]);
    pass();
  }
  while (place.tile < tiles) {
    work.take_unit(slots, sequence, place, multiply);
    pass();
  }
  leave();
}
