// y = x · Wᵀ for 2:4, 4:8 and unstructured weights and up to 128 activation rows on Hopper (sm_90a); PATTERN is 24, 48 or 0.
//
// `weight` is the layout of decode_nm.cu (a lane's 16 bytes are its part of operand A of a wgmma just as of an mma) or of paired.cuh.
// x is operand B: of a 2:4 weight as tensor copies bring it from x itself; weights that are expanded ask for another order of the columns,
// and read the image that arrange.cu makes of x. A block has WARPS_ROW / 4 warpgroups of 64 weight rows each, WARPS_K times, which take
// the units in turn, and one warp more that fetches x; PARTS and ROW_TILES are 1, except that unstructured units may be half as long.
// Warpgroups along the columns keep a multiprocessor busy where the row groups are few. Macros of this kernel, X_STAGES and X_SUBTILES:
// the buffers of x that each k-warp has, of 64 * X_SUBTILES columns; the number divides a unit. CLUSTER (2:4 only): blocks of as many row
// groups that share x, each of which fetches a part of its rows for all: x, read by every block, may be more traffic than W.
//
//   global W --copies of a unit of columns by each warp for itself--> STAGES slots per warp --> registers, expanded
//   x --tensor copies-------+
//   image of x --bulk copies+--> X_STAGES buffers of 64 * X_SUBTILES columns for each k-warp --> wgmma, warpgroups of a k-warp alike
#define X_PAD 0
#define PRODUCERS 1
#define UNSTRUCTURED (PATTERN == 0)
#define TENSOR_COPIES (PATTERN == 24)
#include "decode_common.cuh"
#include "expand.cuh"
#include "bulk.cuh"
#include "wgmma.cuh"
#include "unit_products.cuh"
#include "block_sums.cuh"
#if UNSTRUCTURED
#include "paired.cuh"
#endif

#if (!UNSTRUCTURED && PARTS != 1) || ROW_TILES != 1 || WARPS_ROW % 4 != 0
#error "decode_wgmma takes whole warpgroups along the rows"
#endif
#if CLUSTER > 1 && (!TENSOR_COPIES || N_TILES % CLUSTER != 0)
#error "decode_wgmma shares tensor copies of whole n-tiles"
#endif

#define SUBTILE_BYTES (8 * N_TILES * 128)
#define X_STAGE_BYTES (X_SUBTILES * SUBTILE_BYTES)
#define BARRIERS_AT (WARPS_K * X_STAGES * X_STAGE_BYTES)
#define SLOT_BARRIERS_AT (BARRIERS_AT + 16 * WARPS_K * X_STAGES)
#define SLOTS_AT ((SLOT_BARRIERS_AT + 8 * WARPS_K * WARPS_ROW * STAGES + 127) / 128 * 128)

// Of k-warp k: shared addresses of its buffers of x, and of the barriers that say that they are full; behind those are the empty ones.
__device__ __forceinline__ u32 buffers_of(u32 smem, int k) { return smem + k * (X_STAGES * X_STAGE_BYTES); }
__device__ __forceinline__ u32 barriers_of(u32 smem, int k) { return smem + BARRIERS_AT + k * (16 * X_STAGES); }

// Waits for all threads of the block, and of those that share its activations.
__device__ __forceinline__ void meet() {
  __syncwarp();
#if CLUSTER > 1
  cluster_sync();
#else
  __syncthreads();
#endif
}

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
#if CLUSTER == 1
      if (any && (threadIdx.x & 31) == 0) barrier_arrive(barriers + 8 * (X_STAGES + before));
#else
      // Every block that shares activations has to know: it fetches a part of the buffer's next content.
      if (any && (threadIdx.x & 31) < CLUSTER)
        barrier_arrive_in(barriers + 8 * (X_STAGES + before), blockIdx.y * CLUSTER + (threadIdx.x & 31));
#endif
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

// Where a block's activations come from.
struct Activations {
#if TENSOR_COPIES
  const u64* map;
#endif
  u64 policy;

  // Starts copying what follows column `column` to a buffer; of a cluster, a part of the rows to every block.
  __device__ __forceinline__ void fetch(const Params& p, u32 buffer, u32 full, int column) const {
    barrier_expect(full, X_STAGE_BYTES);
#if TENSOR_COPIES
    constexpr int PART = 8 * N_TILES / CLUSTER;
    const int row = blockIdx.x % CLUSTER * PART;
#pragma unroll
    for (int t = 0; t < X_SUBTILES; ++t) {
      const u32 target = buffer + t * SUBTILE_BYTES + row * 128;
#if CLUSTER == 1
      tensor_copy(target, map, column + 64 * t, row, full, policy);
#else
      tensor_copy_to_all(target, map, column + 64 * t, row, full, (u16)(((1 << CLUSTER) - 1) << blockIdx.y * CLUSTER), policy);
#endif
    }
#else
    bulk_copy(buffer, (const unsigned char*)p.x + (size_t)(column / 64) * SUBTILE_BYTES, X_STAGE_BYTES, full, policy);
#endif
  }
};

#if TENSOR_COPIES
// `map` describes x in boxes of 64 columns by 8 * N_TILES / CLUSTER rows, 16-byte chunks exchanged by the row modulo 8.
#define ARGUMENTS const __grid_constant__ Params p, const __grid_constant__ TensorMap map
#else
#define ARGUMENTS const __grid_constant__ Params p
#endif

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) decode_wgmma(ARGUMENTS) {
  extern __shared__ __align__(1024) unsigned char dynamic[];
  const u32 smem = shared_address(dynamic);
  const int warp = threadIdx.x >> 5, warp_k = warp / WARPS_ROW;
  const int begin = (u32)p.units * blockIdx.y / gridDim.y, end = (u32)p.units * (blockIdx.y + 1) / gridDim.y;
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
#if TENSOR_COPIES
    prefetch_map(map.words);
#endif
    for (int k = 0; k < WARPS_K; ++k)
      for (int s = 0; s < X_STAGES; ++s) {
        barrier_init(barriers_of(smem, k) + 8 * s, 1);
        barrier_init(barriers_of(smem, k) + 8 * (X_STAGES + s), WARPS_ROW * CLUSTER);
      }
    barrier_init_fence();
  }
#if UNSTRUCTURED
  table.finish(smem + SLOTS_AT);
#endif
  release_successor();
  meet();

  if (warp >= WARPS_ROW * WARPS_K) {
    if ((threadIdx.x & 31) == 0) {
      Activations x;
      x.policy = activation_policy();
#if TENSOR_COPIES
      x.map = map.words;
#endif
      constexpr int UNIT_STAGES = UNIT / 64 / X_SUBTILES;
      Ring rings[WARPS_K];
#pragma unroll
      for (int k = 0; k < WARPS_K; ++k)
        rings[k] = {0, 1};
      prefetch_bias(p);
      wait_predecessor();
      for (int unit = 0; unit < end - begin; unit += WARPS_K)
#pragma unroll
        for (int stage = 0; stage < UNIT_STAGES; ++stage)
#pragma unroll
          for (int k = 0; k < WARPS_K; ++k) {
            if (unit + k >= end - begin) break;
            Ring& ring = rings[k];
            const u32 full = barriers_of(smem, k) + 8 * ring.slot;
            barrier_wait(full + 8 * X_STAGES, ring.parity);
            x.fetch(p, buffers_of(smem, k) + ring.slot * X_STAGE_BYTES, full, (begin + unit + k) * UNIT + stage * (64 * X_SUBTILES));
            ring.advance(X_STAGES);
          }
    }
    meet();
  } else {
    float acc[1][N_TILES][4] = {};
    Reader x = {buffers_of(smem, warp_k), barriers_of(smem, warp_k), 0, {0, 0}, false};
    weights.multiply_all(acc[0], p, x, rounds, policy);
    wait_products<0>();
    wait_predecessor();
    // The buffers become the place of the sums.
    meet();
    collect((float*)dynamic, p, acc);
  }
  __syncthreads();
  finish_block((float*)dynamic, p);
}
