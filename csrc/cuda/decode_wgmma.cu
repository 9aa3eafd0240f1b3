// y = x · Wᵀ for 2:4, 4:8 and unstructured weights and up to 128 activation rows on Hopper (sm_90a); PATTERN is 24, 48 or 0.
//
// `weight` is the layout of decode_nm.cu (a lane's 16 bytes are its part of operand A of a wgmma just as of an mma) or of paired.cuh.
// x is operand B, and the image that arrange.cu makes of it. A block has WARPS_ROW / 4 warpgroups of 64 weight rows each, WARPS_K times,
// which take the units in turn, and one warp more that fetches x; PARTS and ROW_TILES are 1, except that unstructured units may be half
// as long. Warpgroups along the columns keep a multiprocessor busy where the row groups are few. Macros of this kernel, X_STAGES and
// X_SUBTILES: the buffers of x that each k-warp has, of 64 * X_SUBTILES columns; the number divides a unit.
//
//   global W --copies of a unit of columns by each warp for itself--> STAGES slots per warp --> registers, expanded
//   image of x --bulk copies--> X_STAGES buffers of 64 * X_SUBTILES columns for each k-warp --> wgmma, warpgroups of a k-warp alike
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

#if (!UNSTRUCTURED && PARTS != 1) || ROW_TILES != 1 || WARPS_ROW % 4 != 0
#error "decode_wgmma takes whole warpgroups along the rows"
#endif

#define SUBTILE_BYTES (8 * N_TILES * 128)
#define X_STAGE_BYTES (X_SUBTILES * SUBTILE_BYTES)
#define BARRIERS_AT (WARPS_K * X_STAGES * X_STAGE_BYTES)
#define SLOT_BARRIERS_AT (BARRIERS_AT + 16 * WARPS_K * X_STAGES)
#define SLOTS_AT ((SLOT_BARRIERS_AT + 8 * WARPS_K * WARPS_ROW * STAGES + 127) / 128 * 128)

// Of k-warp k: shared addresses of its buffers of x, and of the barriers that say that they are full; behind those are the empty ones.
__device__ __forceinline__ u32 buffers_of(u32 smem, int k) { return smem + k * (X_STAGES * X_STAGE_BYTES); }
__device__ __forceinline__ u32 barriers_of(u32 smem, int k) { return smem + BARRIERS_AT + k * (16 * X_STAGES); }

// The buffers of x as a consumer warp goes through them, step by step.
struct Reader {
  u32 buffers, barriers, before;
  Ring ring;
  bool any;

  // Shared address of step s of the unit, once it is there.
  __device__ __forceinline__ u32 open(int s) {
    if (s % (2 * X_SUBTILES) == 0) barrier_wait(barriers + 8 * ring.slot, ring.parity);
    return buffers + ring.slot * X_STAGE_BYTES + (s / 2 % X_SUBTILES) * SUBTILE_BYTES + s % 2 * 64;
  }

  // After the products of step s have been committed: waits for those before it, and gives back the buffer that they were the last to read.
  __device__ __forceinline__ void close(int s) {
    wait_products<1>();
    if (s % (2 * X_SUBTILES) == 0) {
      if (any && (threadIdx.x & 31) == 0) barrier_arrive(barriers + 8 * (X_STAGES + before));
      before = ring.slot;
      any = true;
    }
    if (s % (2 * X_SUBTILES) == 2 * X_SUBTILES - 1) ring.advance(X_STAGES);
  }
};

#if UNSTRUCTURED

// The units of one warp.
struct Sequence {
  size_t unit;
  int left;
  bool any;

  __device__ __forceinline__ void advance(const Params&) {
    unit += WARPS_K;
    any = --left > 0;
  }
};

struct Weights {
  u32 own;
  Slots slots;
  Sequence sequence;

  __device__ __forceinline__ void start(const Params& p, u32 smem, int warp, int tile, int begin, int rounds, u64 policy) {
    own = own_table(smem + SLOTS_AT);
    sequence = {(size_t)tile * p.units + begin, rounds, rounds > 0};
    slots.init(p, smem + SLOTS_AT + TABLE_BYTES, smem + SLOT_BARRIERS_AT, warp);
    slots.start(p, sequence, policy);
  }

  __device__ __forceinline__ void multiply_all(float (&d)[N_TILES][4], const Params& p, Reader& x, int rounds, u64 policy) {
    for (int round = 0; round < rounds; ++round) {
      Unit unit;
      slots.open(unit);
      for_each_step(unit, own, [&](int s, const u32(&a)[8]) {
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
    bulk_copy(slots + slot * SLOT_BYTES, source + (size_t)round * (WARPS_K * SLOT_BYTES / 16), SLOT_BYTES, barriers + 8 * slot, policy);
  }

  __device__ __forceinline__ void start(const Params& p, u32 smem, int warp, int tile, int begin, int rounds, u64 policy) {
    slots = smem + SLOTS_AT + warp * STAGES * SLOT_BYTES;
    barriers = smem + SLOT_BARRIERS_AT + 8 * warp * STAGES;
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
  const u32 smem = shared_address(dynamic);
  const int warp = threadIdx.x >> 5, warp_k = warp / WARPS_ROW;
  const int begin = (int)((long long)p.units * blockIdx.y / gridDim.y), end = (int)((long long)p.units * (blockIdx.y + 1) / gridDim.y);
  const int rounds = max((end - begin - warp_k + WARPS_K - 1) / WARPS_K, 0); // of a multiplying warp
  const u64 policy = weight_policy();
#if UNSTRUCTURED
  TableLoad table;
  table.start();
#endif
  Weights weights;
  if (warp < WARPS_ROW * WARPS_K) {
    // Tiles behind the last row read the last tile again; their sums are not stored.
    const int tile = min((int)blockIdx.x * WARPS_ROW + warp % WARPS_ROW, (p.rows + 15) / 16 - 1);
    weights.start(p, smem, warp, tile, begin + warp_k, rounds, policy);
  } else if ((threadIdx.x & 31) == 0) {
    for (int k = 0; k < WARPS_K; ++k)
      for (int s = 0; s < X_STAGES; ++s) {
        barrier_init(barriers_of(smem, k) + 8 * s, 1);
        barrier_init(barriers_of(smem, k) + 8 * (X_STAGES + s), WARPS_ROW);
      }
    barrier_init_fence();
  }
#if UNSTRUCTURED
  table.finish(smem + SLOTS_AT);
#endif
  release_successor();
  __syncthreads();

  if (warp >= WARPS_ROW * WARPS_K) {
    if ((threadIdx.x & 31) == 0) {
      wait_predecessor();
      const unsigned char* image = (const unsigned char*)p.x + (size_t)begin * (UNIT / 64 * SUBTILE_BYTES);
      const u64 keep = activation_policy();
      constexpr int UNIT_STAGES = UNIT / 64 / X_SUBTILES;
      Ring rings[WARPS_K];
#pragma unroll
      for (int k = 0; k < WARPS_K; ++k)
        rings[k] = {0, 1};
      for (int unit = 0; unit < end - begin; unit += WARPS_K)
#pragma unroll
        for (int stage = 0; stage < UNIT_STAGES; ++stage)
#pragma unroll
          for (int k = 0; k < WARPS_K; ++k) {
            if (unit + k >= end - begin) break;
            Ring& ring = rings[k];
            const u32 full = barriers_of(smem, k) + 8 * ring.slot;
            barrier_wait(full + 8 * X_STAGES, ring.parity);
            barrier_expect(full, X_STAGE_BYTES);
            bulk_copy(buffers_of(smem, k) + ring.slot * X_STAGE_BYTES, image + (size_t)((unit + k) * UNIT_STAGES + stage) * X_STAGE_BYTES,
                      X_STAGE_BYTES, full, keep);
            ring.advance(X_STAGES);
          }
    }
    __syncwarp();
    __syncthreads();
  } else {
    float acc[1][N_TILES][4] = {};
    Reader x = {buffers_of(smem, warp_k), barriers_of(smem, warp_k), 0, {0, 0}, false};
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
