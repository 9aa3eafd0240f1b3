// The LayerNorm that half a layer begins with, of the state and what the half before it left for it: sums in parts.
//
// A cluster's blocks share the columns: each adds the parts of its own and gives the others the state's new values; then each takes the
// LayerNorm of the whole row.
//
// Macros beside those of block.cuh: PARTS, rows of sums.
#pragma once
#include "half/block.cuh"

struct Input {
  const float* parts; // (PARTS, HIDDEN), or null: the state is complete
  const u16* bias;    // (HIDDEN,) of the product that they are parts of
  const u16* state;   // (HIDDEN,) what the product is added to
  u16* total;         // (HIDDEN,) the sum of all, for the next half; another buffer than `state`
  const u16* scale;   // (HIDDEN,) of the LayerNorm
  const u16* shift;
  float eps;
};

#define QUADS (HIDDEN / 4 / CLUSTER) // four columns each, of one block
#define JOINERS (THREADS / QUADS < PARTS ? THREADS / QUADS : PARTS)
#define ROW_VECTORS (HIDDEN / 8)
#define NORM_WARPS (ROW_VECTORS / 32)
#define JOINED_BYTES (JOINERS * QUADS * 16)

#if HIDDEN % 256 != 0 || ROW_VECTORS > THREADS || QUADS > THREADS
#error "half a layer takes widths that are multiples of 256, up to eight columns for each thread"
#endif

// What no kernel writes, loaded while predecessors run.
struct Constants {
  uint4 scale, shift;
  uint2 bias;
};

__device__ __forceinline__ Constants load_constants(const Input& in) {
  Constants c = {};
  if (threadIdx.x < ROW_VECTORS) {
    c.scale = ((const uint4*)in.scale)[threadIdx.x];
    c.shift = ((const uint4*)in.shift)[threadIdx.x];
  }
  if (in.parts && threadIdx.x < QUADS) c.bias = ((const uint2*)in.bias)[cluster_rank() * QUADS + threadIdx.x];
  return c;
}

__device__ __forceinline__ void add_parts(float4& sum, const float4& v) {
  sum.x += v.x;
  sum.y += v.y;
  sum.z += v.z;
  sum.w += v.w;
}

// The state's new values, in this block's copy of the row. `joined` is JOINED_BYTES of shared memory, `row` the shared address of 2 *
// HIDDEN bytes. All threads of the cluster call it, after wait_predecessor; every block has arrived once at the cluster's barrier before.
__device__ __forceinline__ void join(const Input& in, const Constants& c, float4* joined, u32 row) {
  const u32 rank = cluster_rank(), quad = threadIdx.x % QUADS, group = threadIdx.x / QUADS;
  uint2 before = make_uint2(0, 0);
  if (threadIdx.x < QUADS) before = __ldcg((const uint2*)in.state + rank * QUADS + threadIdx.x);
  if (in.parts) {
    if (group < JOINERS) {
      constexpr int EACH = (PARTS + JOINERS - 1) / JOINERS;
      const float4* at = (const float4*)in.parts + rank * QUADS + quad;
      float4 v[EACH];
#pragma unroll
      for (int i = 0; i < EACH; ++i) {
        const int part = group + i * JOINERS;
        v[i] = part < PARTS ? __ldcg(at + part * (HIDDEN / 4)) : make_float4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 1; i < EACH; ++i)
        add_parts(v[0], v[i]);
      joined[group * QUADS + quad] = v[0];
    }
    __syncthreads();
  }
  wait_together();
  if (threadIdx.x < QUADS) {
    if (in.parts) {
      float4 sum = joined[quad];
#pragma unroll
      for (int i = 1; i < JOINERS; ++i)
        add_parts(sum, joined[i * QUADS + quad]);
      // As the products' epilogues do it: the bias, then the residual.
      const float first = sum.x + to_float((u16)c.bias.x) + to_float((u16)before.x);
      const float second = sum.y + to_float((u16)(c.bias.x >> 16)) + to_float((u16)(before.x >> 16));
      const float third = sum.z + to_float((u16)c.bias.y) + to_float((u16)before.y);
      const float fourth = sum.w + to_float((u16)(c.bias.y >> 16)) + to_float((u16)(before.y >> 16));
      before = make_uint2(pack_two(first, second), pack_two(third, fourth));
    }
    if (blockIdx.x == 0) ((uint2*)in.total)[rank * QUADS + quad] = before;
#pragma unroll
    for (u32 other = 0; other < CLUSTER; ++other)
      push(address_in(row + (rank * QUADS + quad) * 8, other), before);
  }
  arrive_together();
  wait_together();
}

// Gives store(vector, eight values) the LayerNorm of the row at shared address `row`. Moments are joined as in row_norm.cuh: lanes' and
// warps' alike.
template <class Store>
__device__ __forceinline__ void normalise(const Input& in, const Constants& c, u32 row, float2* moments, const Store& store) {
  const int warp = threadIdx.x >> 5;
  float x[8] = {};
  if (warp < NORM_WARPS) {
    u32 word[4];
    load_shared_x4(row + threadIdx.x * 16, word);
    unpack(make_uint4(word[0], word[1], word[2], word[3]), x);
    float mean = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      mean += x[i] * 0.125f;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      squares += (x[i] - mean) * (x[i] - mean);
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
      const float other = __shfl_xor_sync(ALL, mean, offset), more = __shfl_xor_sync(ALL, squares, offset), distance = other - mean;
      squares += more + distance * distance * (4.0f * offset);
      mean = 0.5f * (mean + other);
    }
    if ((threadIdx.x & 31) == 0) moments[warp] = make_float2(mean, squares);
  }
  __syncthreads();
  if (warp < NORM_WARPS) {
    float mean = 0, total = 0;
#pragma unroll
    for (int i = 0; i < NORM_WARPS; ++i)
      mean += moments[i].x * (1.0f / NORM_WARPS);
#pragma unroll
    for (int i = 0; i < NORM_WARPS; ++i) {
      const float distance = moments[i].x - mean;
      total += moments[i].y + 256.0f * distance * distance;
    }
    const float factor = rsqrtf(total * (1.0f / HIDDEN) + in.eps);
    float a[8], b[8], y[8];
    unpack(c.scale, a);
    unpack(c.shift, b);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      y[i] = (x[i] - mean) * factor * a[i] + b[i];
    store(threadIdx.x, make_uint4(pack_two(y[0], y[1]), pack_two(y[2], y[3]), pack_two(y[4], y[5]), pack_two(y[6], y[7])));
  }
}

// A vector of the row as operand B of the products, at shared address `x`.
__device__ __forceinline__ void store_activations(u32 x, u32 vector, const uint4& v) {
  const u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (u32 i = 0; i < 4; ++i)
    store_word(x + place_of_word(vector * 4 + i) * 4, word[i]);
}
