// y = x · Wᵀ for 2:4, 4:8 and unstructured weights and up to 128 activation rows on Hopper (sm_90a); PATTERN is 24, 48 or 0.
//
// `weight` is the layout of decode_nm.cu (a lane's 16 bytes are its part of operand A of a wgmma just as of an mma) or of paired.cuh.
// x is operand B, and the image that arrange.cu makes of it. A block has WARPS_ROW / 4 warpgroups of 64 weight rows each, and one warp
// more that fetches x; WARPS_K, PARTS and ROW_TILES are 1, except that unstructured units may be half as long.
//
//   global W --copies of a unit of columns by each warp for itself--> STAGES slots per warp --> registers, expanded
//   image of x --bulk copies--> X_STAGES buffers of 64 * X_SUBTILES columns --> wgmma, all warpgroups alike
#define X_PAD 0
#define PRODUCERS 1
#define UNSTRUCTURED (PATTERN == 0)
#include "decode_common.cuh"
#include "expand.cuh"
#include "bulk.cuh"
#include "wgmma.cuh"
#include "unit_products.cuh"
#if UNSTRUCTURED
#include "paired.cuh"
#endif

#if WARPS_K != 1 || (!UNSTRUCTURED && PARTS != 1) || ROW_TILES != 1 || WARPS_ROW % 4 != 0
#error "decode_wgmma takes whole warpgroups along the rows"
#endif

// Two subtiles at most for unstructured weights: a unit may be no longer, and the slots need the memory.
#define X_SUBTILES (N_TILES == 16 || (UNSTRUCTURED && N_TILES == 8) ? 1 : N_TILES == 8 || UNSTRUCTURED ? 2 : 4)
#define X_STAGES (N_TILES == 4 && !UNSTRUCTURED ? 3 : 4)
#define SUBTILE_BYTES (8 * N_TILES * 128)
#define X_STAGE_BYTES (X_SUBTILES * SUBTILE_BYTES)
#define BARRIERS_AT (X_STAGES * X_STAGE_BYTES)
#define SLOTS_AT ((BARRIERS_AT + 8 * (2 * X_STAGES + WARPS_ROW * STAGES) + 127) / 128 * 128)

// The buffers of x as a consumer warp goes through them, step by step.
struct Reader {
  u32 smem, before;
  Ring ring;
  bool any;

  // Shared address of step s of the unit, once it is there.
  __device__ __forceinline__ u32 open(int s) {
    if (s % (2 * X_SUBTILES) == 0) barrier_wait(smem + BARRIERS_AT + 8 * ring.slot, ring.parity);
    return smem + ring.slot * X_STAGE_BYTES + (s / 2 % X_SUBTILES) * SUBTILE_BYTES + s % 2 * 64;
  }

  // After the products of step s have been committed: waits for those before it, and gives back the buffer that they were the last to read.
  __device__ __forceinline__ void close(int s) {
    wait_products<1>();
    if (s % (2 * X_SUBTILES) == 0) {
      if (any && (threadIdx.x & 31) == 0) barrier_arrive(smem + BARRIERS_AT + 8 * (X_STAGES + before));
      before = ring.slot;
      any = true;
    }
    if (s % (2 * X_SUBTILES) == 2 * X_SUBTILES - 1) ring.advance(X_STAGES);
  }
};

#if UNSTRUCTURED

// The units of one warp, side by side.
struct Sequence {
  size_t unit;
  int left;
  bool any;

  __device__ __forceinline__ void advance(const Params&) {
    ++unit;
    any = --left > 0;
  }
};

struct Weights {
  u32 table;
  Slots slots;
  Sequence sequence;

  __device__ __forceinline__ void start(const Params& p, u32 smem, int warp, int tile, int begin, int rounds, u64 policy) {
    table = smem + SLOTS_AT + (threadIdx.x & 31) % TABLE_COPIES * 8;
    sequence = {(size_t)tile * p.units + begin, rounds, rounds > 0};
    slots.init(p, smem + SLOTS_AT + TABLE_BYTES, smem + BARRIERS_AT + 16 * X_STAGES, warp);
    slots.start(p, sequence, policy);
  }

  __device__ __forceinline__ void multiply_all(float (&d)[N_TILES][4], const Params& p, Reader& x, int rounds, u64 policy) {
    for (int round = 0; round < rounds; ++round) {
      Unit unit;
      slots.open(unit);
      for_each_step(unit, table, [&](int s, const u32(&a)[8]) {
        multiply(d, a, x.open(s));
        x.close(s);
      });
      slots.close(p, sequence, policy);
    }
  }
};

#else

#define SLOT_BYTES (9 * 512)

struct Weights {
  u32 slots, barriers;
  const uint4* source;

  __device__ __forceinline__ void fetch(int slot, int round, u64 policy) const {
    barrier_expect(barriers + 8 * slot, SLOT_BYTES);
    bulk_copy(slots + slot * SLOT_BYTES, source + (size_t)round * (SLOT_BYTES / 16), SLOT_BYTES, barriers + 8 * slot, policy);
  }

  __device__ __forceinline__ void start(const Params& p, u32 smem, int warp, int tile, int begin, int rounds, u64 policy) {
    slots = smem + SLOTS_AT + warp * STAGES * SLOT_BYTES;
    barriers = smem + BARRIERS_AT + 8 * (2 * X_STAGES + warp * STAGES);
    source = p.weight + ((size_t)tile * p.units + begin) * (SLOT_BYTES / 16);
    if ((threadIdx.x & 31) != 0) return;
    for (int s = 0; s < STAGES; ++s)
      barrier_init(barriers + 8 * s, 1);
    barrier_init_fence();
    for (int s = 0; s < STAGES && s < rounds; ++s)
      fetch(s, s, policy);
  }

  __device__ __forceinline__ void multiply_all(float (&d)[N_TILES][4], const Params& p, Reader& x, int rounds, u64 policy) {
    const int lane = threadIdx.x & 31;
    Ring ring = {0, 0};
    Operands operands;
    for (int round = 0; round < rounds; ++round) {
      const u32 slot = slots + ring.slot * SLOT_BYTES + lane * 16;
      barrier_wait(barriers + 8 * ring.slot, ring.parity);
      multiply_unit(d, slot, x, operands);
      if (round + STAGES < rounds) {
        __syncwarp();
        if (lane == 0) fetch(ring.slot, round + STAGES, policy);
      }
      ring.advance(STAGES);
    }
  }
};

#endif

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) decode_wgmma(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char dynamic[];
  const u32 smem = shared_address(dynamic), full = smem + BARRIERS_AT, empty = full + 8 * X_STAGES;
  const int warp = threadIdx.x >> 5;
  const int begin = (int)((long long)p.units * blockIdx.y / gridDim.y), end = (int)((long long)p.units * (blockIdx.y + 1) / gridDim.y);
  const int rounds = end - begin;
  const u64 policy = weight_policy();
  Weights weights;
  if (warp < WARPS_ROW) {
    // Tiles behind the last row read the last tile again; their sums are not stored.
    const int tile = min((int)blockIdx.x * WARPS_ROW + warp, (p.rows + 15) / 16 - 1);
    weights.start(p, smem, warp, tile, begin, rounds, policy);
  } else if ((threadIdx.x & 31) == 0) {
    for (int s = 0; s < X_STAGES; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, WARPS_ROW);
    }
    barrier_init_fence();
  }
#if UNSTRUCTURED
  fill_table(smem + SLOTS_AT);
#endif
  release_successor();
  __syncthreads();

  if (warp >= WARPS_ROW) {
    if ((threadIdx.x & 31) == 0) {
      wait_predecessor();
      const unsigned char* image = (const unsigned char*)p.x + (size_t)begin * (UNIT / 64 * SUBTILE_BYTES);
      const u64 keep = activation_policy();
      Ring ring = {0, 1};
      for (int stage = 0; stage < rounds * (UNIT / 64 / X_SUBTILES); ++stage) {
        barrier_wait(empty + 8 * ring.slot, ring.parity);
        barrier_expect(full + 8 * ring.slot, X_STAGE_BYTES);
        bulk_copy(smem + ring.slot * X_STAGE_BYTES, image + (size_t)stage * X_STAGE_BYTES, X_STAGE_BYTES, full + 8 * ring.slot, keep);
        ring.advance(X_STAGES);
      }
    }
    __syncwarp();
    __syncthreads();
  } else {
    float acc[1][N_TILES][4] = {};
    Reader x = {smem, 0, {0, 0}, false};
    weights.multiply_all(acc[0], p, x, rounds, policy);
    wait_products<0>();
    wait_predecessor();
    // The buffers become the place of the sums.
    __syncthreads();
    collect((float*)dynamic, p, acc);
  }
  __syncthreads();
  finish_and_store((float*)dynamic, p, blockIdx.x);
}
