// y = x · Wᵀ for unstructured weights and a single activation row x, or the LayerNorm of x: what decode_unstructured.cu computes, but no
// warp waits for another, and no kernel before it need normalise the row while memory has nothing to do.
//
//   block of WARPS_K warps and ROW_WARPS more:  row tiles of 16 weight rows b, b + B, b + 2B ... of all B blocks
//   warp:       every WARPS_K-th unit of these tiles, one tile behind the other, so that all have equally many however many a tile has
//               (CLUSTER blocks with the same b take every CLUSTER * WARPS_K-th each: few tiles are shared out more evenly);
//               units are stored as paired.cuh describes, and the next STAGES of a warp are on their way. The first one is expanded in
//               registers before there is an x
//   ROW_WARPS:  bring the whole row, or, NORMED, its LayerNorm, which each block takes for itself, to shared memory, once; then one of
//               them adds up the sums of each tile when they are all there, while the others go on with the tiles behind
//
// Units k, k + CLUSTER * WARPS_K ... of a tile are added by one warp, in this order, whichever it is, and then those sums in the order of
// k, as decode_unstructured.cu does, and LayerNorms are layernorm.cu's (row_input.cuh): results are those of these kernels. Units, scales
// and shifts, which no kernel writes, are fetched before predecessors have ended.
//
// Macros: those of decode_common.cuh, with one n-tile, row tile and warp along the rows; TABLE_COPIES, see octets.cuh; COLS, a multiple of
// 256; NORMED; ROW_WARPS; CLUSTER, 1 or 2, the blocks of a cluster.
#define UNSTRUCTURED 1
#define PRODUCERS ROW_WARPS
#define X_PAD 0
#include "decode_common.cuh"
#include "addend.cuh"
#include "expand.cuh"
#include "gather.cuh"
// Instructions are what a unit waits for between its arrival and its last sum: 13 % fewer. Units of fewer columns gained nothing.
#define WIDE_ENTRIES (PARTS == 1)
#include "paired.cuh"

#if N_TILES != 1 || ROW_TILES != 1 || WARPS_ROW != 1
#error "decode_row_unstructured takes one activation row, and a row tile at a time"
#endif

#define UNITS (COLS / UNIT)
#define CHAINS 2
#define ALL_WARPS (CLUSTER * WARPS_K)
// Warps that have a share of a tile.
#define SHARES (ALL_WARPS < UNITS ? ALL_WARPS : UNITS)
// Of sums.
#define SHARE_BYTES 64
// Tiles that the fastest warp may be ahead of the slowest: no fewer than a warp goes ahead from one of its tiles to the next, since a
// barrier tells no more of its past than the last phase.
#define STRIDE ((ALL_WARPS + UNITS - 1) / UNITS)
#define RING (STRIDE > 4 ? STRIDE : 4)
#define SUMS_BYTES (RING * SHARES * RED_PITCH * 4)
// Shared memory: the row, which takes the place of the scales; the shifts; the moments; sums of RING tiles, their barriers; the table;
// barriers of the slots; slots.
#define AT_ROW 0
#define AT_SHIFT (AT_ROW + 2 * COLS)
#define AT_MOMENTS (AT_SHIFT + SHIFT_BYTES)
#define AT_SUMS (AT_MOMENTS + MOMENTS_BYTES)
#define AT_BARRIERS (AT_SUMS + SUMS_BYTES)
#define AT_TABLE ((AT_BARRIERS + 16 * RING + 127) / 128 * 128)
#define AT_SLOT_BARRIERS (AT_TABLE + TABLE_BYTES)
#define AT_SLOTS (AT_SLOT_BARRIERS + (8 * WARPS * SLOTS + 127) / 128 * 128)
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

// Barriers of the sums of the cluster's tile `turn`: all shares are there, in its first block, and they have been read.
__device__ __forceinline__ u32 full_barrier(u32 base, u32 turn) { return base + AT_BARRIERS + turn % RING * 16; }
__device__ __forceinline__ u32 empty_barrier(u32 base, u32 turn) { return full_barrier(base, turn) + 8; }
__device__ __forceinline__ u32 ring_parity(u32 turn) { return turn / RING & 1; }

__device__ __forceinline__ float* sums_of(unsigned char* smem, u32 turn) {
  return (float*)(smem + AT_SUMS) + turn % RING * (SHARES * RED_PITCH);
}

// One warp of the cluster's first block: y from the sums of all its tiles.
__device__ __forceinline__ void add_up(const Params& p, unsigned char* smem, int tiles) {
  const int lane = threadIdx.x & 31;
  const u32 base = shared_address(smem);
  u32 turn = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, ++turn) {
    const int row = tile * 16 + lane * 4;
    const bool adds = lane < 4;
    Addend add = {};
    if (adds && p.y_vector) add = load_addend(p, 0, row);
#if CLUSTER > 1
    if (lane == 0) barrier_expect(full_barrier(base, turn), SHARES * SHARE_BYTES);
#endif
    barrier_wait(full_barrier(base, turn), ring_parity(turn));
    float4 sum = make_float4(0, 0, 0, 0);
    if (adds) {
      const float4* red = (const float4*)sums_of(smem, turn) + lane;
      sum = red[0];
#pragma unroll
      for (int k = 1; k < SHARES; ++k)
        add_four(sum, red[k * (RED_PITCH / 4)]);
    }
    __syncwarp();
    if (lane == 0) {
      barrier_arrive(empty_barrier(base, turn));
#if CLUSTER > 1
      barrier_arrive_in(empty_barrier(base, turn), 1);
#endif
    }
    if (!adds) continue;
    if (p.y_vector)
      store_vector(p, 0, row, sum, add);
    else
      store_four(p, 0, row, sum);
  }
}

// Blocks of a cluster may not end while others still reach into their shared memory.
__device__ __forceinline__ void leave() {
#if CLUSTER > 1
  __syncwarp();
  cluster_sync();
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) decode_row_unstructured(const __grid_constant__ RowParams given) {
  extern __shared__ __align__(128) unsigned char smem[];
  release_successor();
  const Params& p = given.product;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int tiles = (p.rows + 15) / 16;
  const u32 base = shared_address(smem);
  const u64 policy = weight_policy();

  TableLoad load;
  load.start();
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
        barrier_init(full_barrier(base, turn), CLUSTER > 1 ? 1 : SHARES);
        barrier_init(empty_barrier(base, turn), 1);
      }
      barrier_init_fence();
      fetch_for_next(given.ahead, blockIdx.x * CLUSTER + blockIdx.y, gridDim.x * CLUSTER);
    }
#if NORMED
    fetch_affine(given, smem);
#endif
  }
  load.finish(base + AT_TABLE);
  __syncthreads();
#if CLUSTER > 1
  cluster_arrive();
#endif

  if (warp >= WARPS_K) {
    wait_predecessor();
#if NORMED
    normalise(given, smem);
#else
    for (u32 i = row_thread(); i < COLS / 8; i += ROW_THREADS)
      copy_vector(base + AT_ROW + i * 16, (const uint4*)p.x + i);
    wait_copies();
#endif
    __syncthreads();
#if CLUSTER > 1
    cluster_wait();
#endif
    if (warp == WARPS_K && blockIdx.y == 0) add_up(p, smem, tiles);
    leave();
    return;
  }

  // Only the lanes that have the activation row read it; what the others hold reaches no sum that is stored.
  const bool live = lane < 4;
  const u32 own = own_table(base + AT_TABLE), x_lane = base + AT_ROW + lane % 4 * 16;
  float acc[CHAINS][4] = {};
  int first = place.column; // unit of the tile that the warp began with
  const auto multiply = [&](int s, const u32(&a)[8]) {
    u32 b[4] = {};
    load_shared_x4_if(x_lane + place.column * (UNIT * 2) + s * 64, live, b);
    mma_dense(acc[s % CHAINS], a[0], a[1], a[2], a[3], b[0], b[1]);
    mma_dense(acc[s % CHAINS], a[4], a[5], a[6], a[7], b[2], b[3]);
  };
  const auto pass = [&] {
    const u32 turn = place.turn;
    place.column += ALL_WARPS;
    if (place.column < UNITS) return;
    // The share is complete. Of the fragment's columns, which are activation rows, lanes 0, 4 ... have the first.
    if (turn >= RING) barrier_wait(empty_barrier(base, turn), ring_parity(turn - RING));
    float* share = sums_of(smem, turn) + first * RED_PITCH + lane / 4;
    const float upper = acc[0][0] + acc[1][0], lower = acc[0][2] + acc[1][2];
#if CLUSTER > 1
    if (lane % 4 == 0) {
      u64* full = (u64*)(smem + AT_BARRIERS) + turn % RING * 2;
      gather_store(full, share, __float_as_uint(upper));
      gather_store(full, share + 8, __float_as_uint(lower));
    }
#else
    if (lane % 4 == 0) {
      share[0] = upper;
      share[8] = lower;
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(full_barrier(base, turn));
#endif
#pragma unroll
    for (int chain = 0; chain < CHAINS; ++chain)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        acc[chain][i] = 0;
    place.settle();
    first = place.column;
  };

  // Second units are asked for when all first ones have been, which so arrive before them: a warp begins to expand the earlier.
  slots.fetch_first<1, SLOTS>(p, begun, policy);
  slots.announce(p, sequence);
  u32 expanded[STEPS][8];
  if (place.tile < tiles) {
    Unit unit;
    slots.open(unit);
    for_each_step(unit, own, [&](int s, const u32(&a)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        expanded[s][i] = a[i];
    });
    slots.close(p, sequence, policy);
  }
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
    Unit unit;
    slots.open(unit);
    for_each_step(unit, own, multiply);
    slots.close(p, sequence, policy);
    pass();
  }
  leave();
}
