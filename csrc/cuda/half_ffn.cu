// The second half of a layer for one row, in one kernel: LayerNorm, the first product with its bias and ReLU, and the second in parts.
//
//   cluster (unit, blocks along y): 256 of the middle's values, which are one unit of the second product's columns. Its blocks share
//     the row's columns      where the half before left its sums in parts (half/input.cuh)
//     the first's rows       two row tiles each by all columns, in pieces of 256
//     the second's rows      each block's tiles by the cluster's unit: one of MIDDLES parts of the sums, for the half behind
//   and hand each other what they found through shared memory: two exchanges within the cluster, and none with other clusters.
//
// Weights, which no kernel writes, are fetched before predecessors have ended.
//
// Macros: those of half/block.cuh and half/input.cuh.
#include "half/input.cuh"
#include "half/product.cuh"
#include "half/slots.cuh"

#define TILES (16 / CLUSTER) // of the first product, of a block
#define FIRST (TILES * UNITS)
#define SECOND (HIDDEN / 16 / CLUSTER)
#define MIDDLES gridDim.x

#if 16 % CLUSTER != 0 || HIDDEN / 16 % CLUSTER != 0
#error "half a layer is shared by 2, 4, 8 or 16 blocks"
#endif

// Shared memory; sums stand where the joined parts were, which nobody needs once the row is complete.
#define AT_ROW (WARPS * SLOT_BYTES)
#define AT_X (AT_ROW + 2 * HIDDEN)
#define AT_SUMS (AT_X + 2 * HIDDEN)
#define AT_MIDDLE (AT_SUMS + (JOINED_BYTES > FIRST * 64 ? JOINED_BYTES : FIRST * 64))
#define AT_MOMENTS (AT_MIDDLE + 512)
#define AT_BARRIERS (AT_MOMENTS + 8 * WARPS)

#if SHARED_BYTES < AT_BARRIERS + 8 * WARPS
#error "the host gives too little shared memory"
#endif

struct Params {
  Input in;
  const uint4* first;  // (256 * MIDDLES, HIDDEN) and
  const uint4* second; // (HIDDEN, 256 * MIDDLES) as decode_nm.cu lays them out
  const u16* bias;     // (256 * MIDDLES,) of the first
  float* sums;         // (MIDDLES, HIDDEN)
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) half_ffn(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char smem[];
  const u32 shared = shared_address(smem), rank = cluster_rank();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, middle = blockIdx.x;
  release_successor();
  arrive_together();

  // Job j is warp j % WARPS's: the first product's pieces, then the second's.
  auto piece = [&](int job) {
    if (job < FIRST) return p.first + ((size_t)(middle * 16 + rank * TILES) * UNITS + job) * 288;
    return p.second + ((size_t)(rank * SECOND + job - FIRST) * MIDDLES + middle) * 288;
  };
  Slot slot;
  slot.open(shared, shared + AT_BARRIERS);
  if (warp < FIRST + SECOND) slot.fetch(piece(warp));
  if (lane == 0)
    for (int job = warp + WARPS; job < FIRST + SECOND; job += WARPS)
      fetch_ahead(piece(job), SLOT_BYTES);
  const Constants constants = load_constants(p.in);
  const float bias = threadIdx.x < 16 * TILES ? to_float(p.bias[(middle * 16 + rank * TILES) * 16 + threadIdx.x]) : 0;
  wait_predecessor();

  join(p.in, constants, (float4*)(smem + AT_SUMS), shared + AT_ROW);
  normalise(p.in, constants, shared + AT_ROW, (float2*)(smem + AT_MOMENTS),
            [&](u32 vector, const uint4& v) { store_activations(shared + AT_X, vector, v); });
  __syncthreads();

  int job = warp;
#pragma unroll 1
  for (; job < FIRST; job += WARPS) {
    float sum[4] = {};
    slot.wait();
    multiply_slot(sum, slot.data, shared + AT_X + job % UNITS * 512);
    __syncwarp();
    if (job + WARPS < FIRST + SECOND) slot.fetch(piece(job + WARPS));
    const float total = row_sum(sum);
    if (lane < 16) store_word(shared + AT_SUMS + job * 64 + lane * 4, __float_as_uint(total));
  }
  __syncthreads();
  if (warp < TILES / 2 || (TILES == 1 && warp == 0)) {
    // A warp completes two tiles: 32 rows, 16 words.
    float sum = 0;
    if (threadIdx.x < 16 * TILES)
#pragma unroll
      for (int u = 0; u < UNITS; ++u)
        sum += load_float(shared + AT_SUMS + (threadIdx.x / 16 * UNITS + u) * 64 + threadIdx.x % 16 * 4);
    sum = fmaxf(sum + bias, 0.0f);
    const u32 pair = pack_two(sum, __shfl_down_sync(ALL, sum, 1)), word = __shfl_sync(ALL, pair, (lane & 15) * 2);
    const u32 k = rank * (8 * TILES) + warp * 16 + (lane & 15), at = shared + AT_MIDDLE + place_of_word(k) * 4;
    if ((lane & 15) < 8 * TILES)
#pragma unroll
      for (int other = 0; other < CLUSTER; other += 2)
        push(address_in(at, other + (lane >> 4)), word);
  }
  arrive_together();
  wait_together();

  float* sums = p.sums + (size_t)middle * HIDDEN + rank * SECOND * 16 + lane / 4;
#pragma unroll 1
  for (; job < FIRST + SECOND; job += WARPS) {
    float sum[4] = {};
    slot.wait();
    multiply_slot(sum, slot.data, shared + AT_MIDDLE);
    __syncwarp();
    if (job + WARPS < FIRST + SECOND) slot.fetch(piece(job + WARPS));
    if (lane % 4 == 0) {
      sums[(job - FIRST) * 16] = sum[0];
      sums[(job - FIRST) * 16 + 8] = sum[2];
    }
  }
}
