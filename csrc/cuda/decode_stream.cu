// y = x · Wᵀ as decode_wgmma.cu makes it, but CLUSTER blocks share activations, and all row groups together are cut into equal ranges of
// units: for weights of many row groups, where whole ones would leave multiprocessors idle at the end.
//
// `weight` is the layout of decode_nm.cu (a lane's 16 bytes are its part of operand A of a wgmma just as of an mma) or of paired.cuh.
// x is operand B, see feed.cuh. A block has WARPS_ROW / 4 warpgroups of 64 weight rows each, and one warp more that fetches x;
// WARPS_K, PARTS and ROW_TILES are 1, except that unstructured units may be half as long. How clusters share the units and add their sums
// is in ranges.cuh.
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
#error "decode_stream takes whole warpgroups along the rows"
#endif

// Two subtiles at most for unstructured weights: a unit may be no longer, and the slots need the memory.
#define X_SUBTILES (N_TILES == 16 || (UNSTRUCTURED && N_TILES == 8) ? 1 : N_TILES == 8 || UNSTRUCTURED ? 2 : 4)
#define SUBTILE_BYTES (8 * N_TILES * 128)
#define X_STAGE_BYTES (X_SUBTILES * SUBTILE_BYTES)
#define BARRIERS_AT (X_STAGES * X_STAGE_BYTES)
#define SLOTS_AT ((BARRIERS_AT + 8 * (2 * X_STAGES + WARPS_ROW * STAGES) + 127) / 128 * 128)
#include "store.cuh"
#include "ranges.cuh"
#include "feed.cuh"

#if UNSTRUCTURED

struct Weights {
  u32 own;
  Slots slots;
  Sequence sequence;

  __device__ __forceinline__ void start(const Params& p, u32 smem, int warp, u64 policy) {
    own = own_table(smem + SLOTS_AT);
    sequence.rest = own_range(p);
    sequence.enter(p);
    slots.init(p, smem + SLOTS_AT + TABLE_BYTES, smem + BARRIERS_AT + 16 * X_STAGES, warp);
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
  Ring ring;         // of the oldest unit
  Sequence sequence; // of the unit to be fetched next

  // Fetches the sequence's next unit, if any, to `slot`.
  __device__ __forceinline__ void fetch(const Params& p, u32 slot, u64 policy) {
    if (!sequence.any) return;
    if ((threadIdx.x & 31) == 0) {
      barrier_expect(barriers + 8 * slot, SLOT_BYTES);
      bulk_copy(slots + slot * SLOT_BYTES, p.weight + sequence.unit * (SLOT_BYTES / 16), SLOT_BYTES, barriers + 8 * slot, policy);
    }
    sequence.advance(p);
  }

  __device__ __forceinline__ void start(const Params& p, u32 smem, int warp, u64 policy) {
    slots = smem + SLOTS_AT + warp * STAGES * SLOT_BYTES;
    barriers = smem + BARRIERS_AT + 8 * (2 * X_STAGES + warp * STAGES);
    ring = {0, 0};
    init_own_barriers(barriers, STAGES, 1);
    sequence.rest = own_range(p);
    sequence.enter(p);
#pragma unroll 1
    for (u32 s = 0; s < STAGES; ++s)
      fetch(p, s, policy);
  }

  __device__ __forceinline__ void multiply_all(float (&d)[N_TILES][4], const Params& p, Reader& x, int rounds, u64 policy) {
    const int lane = threadIdx.x & 31;
    Operands operands;
    for (int round = 0; round < rounds; ++round) {
      const u32 slot = slots + ring.slot * SLOT_BYTES + lane * 16;
      barrier_wait(barriers + 8 * ring.slot, ring.parity);
      multiply_unit(d, slot, x, operands);
      __syncwarp();
      fetch(p, ring.slot, policy);
      ring.advance(STAGES);
    }
  }
};

#endif

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) decode_stream(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char dynamic[];
  const u32 smem = shared_address(dynamic);
  const int warp = threadIdx.x >> 5;
  const u64 policy = weight_policy();
#if UNSTRUCTURED
  TableLoad table;
  table.start();
#endif
  Weights weights;
  if (warp < WARPS_ROW)
    weights.start(p, smem, warp, policy);
  else if (threadIdx.x == 32 * WARPS_ROW)
    init_buffers(smem);
#if UNSTRUCTURED
  table.finish(smem + SLOTS_AT);
#endif
  release_successor();
  __syncthreads();
#if CLUSTER > 1
  // Barriers were made visible to other blocks by their own fence.
  meet();
#endif

  Range rest = own_range(p);
  if (warp < WARPS_ROW) {
    Reader x = {smem, 0, {0, 0}, false};
    Segment segment;
    while (rest.next(p, segment)) {
      float sums[N_TILES][4] = {};
      weights.multiply_all(sums, p, x, segment.last - segment.first, policy);
      wait_products<0>();
      wait_predecessor();
      finish_segment(p, sums, segment);
    }
  } else {
    feed(p, smem, rest);
  }
#if CLUSTER > 1
  // A block may not leave while others still reach into its shared memory.
  meet();
#endif
}
