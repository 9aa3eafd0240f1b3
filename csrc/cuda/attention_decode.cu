// Attention of one new token per row over the keys and values of the tokens before it, which also appends the token's own.
//
//   blocks (row * heads + head, part), a cluster along the parts
//   part s of S:  cache positions [s * ceil(n / S), (s + 1) * ceil(n / S)) of the n that the row has
//   block:        tiles of UNROLL steps of WARPS * GROUPS positions, warp by warp, group by group
//   group:        LANES lanes that share a position, with PER_LANE vectors of 16 bytes each of its key and of its value
//   the token's own key and value come from qkv: they belong to the last warp of the last part
//
// Each group keeps its own running maximum and sums (softmax.cuh), which the groups of a warp join by shuffles, the warps by shared memory
// and the parts by the shared memory of the cluster's block 0 (split as in Flash-Decoding, 2023). Positions of earlier steps are read
// before the predecessor has ended.
//
// Macros: ELEMENT, the type of everything; HEAD_SIZE; WARPS of a block; UNROLL, positions that each group has in flight;
// MIN_BLOCKS that must fit one multiprocessor (bounds the registers).
#include "ahead.cuh"
#include "gather.cuh"
#include "softmax.cuh"

#define THREADS (32 * WARPS)
#define VECTOR VECTOR_OF<ELEMENT>
#define MAX_PARTS 8
#define ROW_VECTORS (HEAD_SIZE / VECTOR)
#define POWER_OF_TWO (ROW_VECTORS & -ROW_VECTORS)
#define EVEN_LANES (POWER_OF_TWO < 32 ? POWER_OF_TWO : 32)
// Lanes that share a position evenly, unless each would hold so much that registers run out.
#define LANES (ROW_VECTORS / EVEN_LANES <= 5 ? EVEN_LANES : ROW_VECTORS <= 8 ? 8 : ROW_VECTORS <= 16 ? 16 : 32)
#define PER_LANE ((ROW_VECTORS + LANES - 1) / LANES)
#define GROUPS (32 / LANES)
#define STEP (WARPS * GROUPS)
#define TILE (UNROLL * STEP)

struct Params {
  const uint4* qkv;   // (batch, 3, heads, HEAD_SIZE)
  uint4* k_cache;     // (batch, heads, capacity, HEAD_SIZE)
  uint4* v_cache;     // (batch, heads, capacity, HEAD_SIZE)
  const int* lengths; // (batch,) positions in use; the token goes behind them
  void* out;          // (batch, heads, HEAD_SIZE)
  int heads, capacity;
  float scale; // of the scores
  Ahead ahead; // of the kernel behind this one
};

// Whether lane `in_group` of a group has a vector j.
__device__ __forceinline__ bool holds(int in_group, int j) { return ROW_VECTORS % LANES == 0 || in_group + j * LANES < ROW_VECTORS; }

struct Range {
  int begin, end;
};

__device__ __forceinline__ Range range_of(int length, int capacity) {
  const int count = min(length, capacity), share = (count + (int)gridDim.y - 1) / (int)gridDim.y;
  const int begin = min((int)blockIdx.y * share, count);
  return {begin, min(begin + share, count)};
}

// Reads past L1, so that a value written meanwhile is seen.
__device__ __forceinline__ int load_length(const int* p) {
  int v;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// Leaves v as it is where `wanted` is false.
__device__ __forceinline__ void load_cache(uint4& v, const uint4* p, bool wanted) {
  asm volatile("{\n"
               ".reg .pred wanted;\n"
               "setp.ne.b32 wanted, %5, 0;\n"
               "@wanted ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               "}"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
               : "l"(p), "r"((int)wanted)
               : "memory");
}

__device__ __forceinline__ void prefetch(const uint4* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// This lane's vectors of UNROLL positions, STEP apart, the first at `at`. Of those from `left` on, the tile keeps what
// it held: their weight will be zero.
__device__ __forceinline__ void load_tile(uint4 (&tile)[UNROLL][PER_LANE], const uint4* at, int left, int in_group) {
#pragma unroll
  for (int u = 0; u < UNROLL; ++u)
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j)
      load_cache(tile[u][j], at + u * STEP * ROW_VECTORS + j * LANES, u * STEP < left && holds(in_group, j));
}

__device__ __forceinline__ float dot(const float (&q)[PER_LANE][VECTOR], const uint4 (&k)[PER_LANE]) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    float f[VECTOR];
    unpack<ELEMENT>(k[j], f);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i)
      sum += q[j][i] * f[i];
  }
  return sum;
}

__device__ __forceinline__ void add_weighted(float (&acc)[PER_LANE][VECTOR], float weight, const uint4 (&v)[PER_LANE]) {
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    float f[VECTOR];
    unpack<ELEMENT>(v[j], f);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i)
      acc[j][i] += weight * f[i];
  }
}

// Element d of the values of `count` partials, joined; `sum` and `maximum` are those of all of them.
__device__ __forceinline__ float join(const Partial* partials, int count, int d, float& sum, float& maximum) {
  maximum = LOWEST;
  for (int i = 0; i < count; ++i)
    maximum = fmaxf(maximum, partials[i].maximum);
  float value = 0;
  sum = 0;
  for (int i = 0; i < count; ++i) {
    const float weight = exp2_fast(partials[i].maximum - maximum);
    value += weight * partials[i].values[d];
    sum += weight * partials[i].sum;
  }
  return value;
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) attention_decode(const __grid_constant__ Params p) {
  __shared__ Partial of_warps[WARPS], of_parts[MAX_PARTS];
  __shared__ u64 gathered;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, in_group = lane % LANES;
  const int row = blockIdx.x / p.heads, head = blockIdx.x % p.heads, parts = gridDim.y;
  const int first = warp * GROUPS + lane / LANES;
  const long long cache = (long long)blockIdx.x * p.capacity * ROW_VECTORS + in_group;
  uint4 *k_cache = p.k_cache + cache, *v_cache = p.v_cache + cache;
  release_successor();
  if (parts > 1) gather_open(&gathered, parts * (int)sizeof(Partial));

  // What the last step left is the length unless a predecessor that still runs changes it.
  const int length = load_length(p.lengths + row);
  Range range = range_of(length, p.capacity);
  const uint4* k_at = k_cache + (long long)(range.begin + first) * ROW_VECTORS;
  const uint4* v_at = v_cache + (long long)(range.begin + first) * ROW_VECTORS;
  int left = range.end - range.begin - first;
  uint4 k[UNROLL][PER_LANE] = {}, v[UNROLL][PER_LANE] = {};
  load_tile(k, k_at, left, in_group);
  load_tile(v, v_at, left, in_group);
#pragma unroll
  for (int u = UNROLL; u < 2 * UNROLL; ++u)
    if (u * STEP < left)
#pragma unroll
      for (int j = 0; j < PER_LANE; ++j) {
        if (!holds(in_group, j)) continue;
        prefetch(k_at + u * STEP * ROW_VECTORS + j * LANES);
        prefetch(v_at + u * STEP * ROW_VECTORS + j * LANES);
      }
  if (lane == 0) fetch_for_next(p.ahead, ((int)blockIdx.x * parts + (int)blockIdx.y) * WARPS + warp, (int)gridDim.x * parts * WARPS);
  wait_predecessor();

  const int now = load_length(p.lengths + row);
  const uint4* qkv = p.qkv + ((long long)row * 3 * p.heads + head) * ROW_VECTORS + in_group;
  float q[PER_LANE][VECTOR];
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j)
    unpack<ELEMENT>(holds(in_group, j) ? qkv[j * LANES] : make_uint4(0, 0, 0, 0), q[j]);
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j)
#pragma unroll
    for (int i = 0; i < VECTOR; ++i)
      q[j][i] *= p.scale * LOG2E;
  float acc[PER_LANE][VECTOR] = {}, sum = 0, maximum = LOWEST;
  if (blockIdx.y == parts - 1 && warp == WARPS - 1 && now < p.capacity) {
    uint4 own_k[PER_LANE], own_v[PER_LANE];
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
      own_k[j] = own_v[j] = make_uint4(0, 0, 0, 0);
      if (holds(in_group, j)) {
        own_k[j] = qkv[(long long)p.heads * ROW_VECTORS + j * LANES];
        own_v[j] = qkv[2ll * p.heads * ROW_VECTORS + j * LANES];
      }
    }
    const float score = group_sum<LANES>(dot(q, own_k));
    if (lane < LANES) {
      maximum = score;
      sum = 1;
      add_weighted(acc, 1.0f, own_v);
#pragma unroll
      for (int j = 0; j < PER_LANE; ++j)
        if (holds(in_group, j)) {
          k_cache[(long long)now * ROW_VECTORS + j * LANES] = own_k[j];
          v_cache[(long long)now * ROW_VECTORS + j * LANES] = own_v[j];
        }
    }
  }
  if (now != length) {
    range = range_of(now, p.capacity);
    k_at = k_cache + (long long)(range.begin + first) * ROW_VECTORS;
    v_at = v_cache + (long long)(range.begin + first) * ROW_VECTORS;
    left = range.end - range.begin - first;
    load_tile(k, k_at, left, in_group);
    load_tile(v, v_at, left, in_group);
  }

  for (int tiles = (range.end - range.begin + TILE - 1) / TILE; tiles > 0; --tiles) {
    float score[UNROLL], highest = maximum;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      score[u] = dot(q, k[u]);
    k_at += TILE * ROW_VECTORS;
    v_at += TILE * ROW_VECTORS;
    load_tile(k, k_at, left - TILE, in_group);
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      score[u] = group_sum<LANES>(score[u]);
      if (u * STEP >= left) score[u] = -__int_as_float(0x7f800000);
      highest = fmaxf(highest, score[u]);
    }
    const float shrink = exp2_fast(maximum - highest);
    maximum = highest;
    sum *= shrink;
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j)
#pragma unroll
      for (int i = 0; i < VECTOR; ++i)
        acc[j][i] *= shrink;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const float weight = exp2_fast(score[u] - maximum);
      sum += weight;
      add_weighted(acc, weight, v[u]);
    }
    left -= TILE;
    load_tile(v, v_at, left, in_group);
  }

  float highest = maximum;
#pragma unroll
  for (int offset = LANES; offset < 32; offset <<= 1)
    highest = fmaxf(highest, __shfl_xor_sync(ALL, highest, offset));
  const float shrink = exp2_fast(maximum - highest);
  sum *= shrink;
#pragma unroll
  for (int offset = LANES; offset < 32; offset <<= 1)
    sum += __shfl_xor_sync(ALL, sum, offset);
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j)
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      acc[j][i] = sum_of_groups<LANES>(acc[j][i] * shrink);
      if (lane < LANES && holds(in_group, j)) of_warps[warp].values[(j * LANES + in_group) * VECTOR + i] = acc[j][i];
    }
  if (lane == 0) {
    of_warps[warp].sum = sum;
    of_warps[warp].maximum = highest;
  }
  __syncthreads();
  const long long at = (long long)blockIdx.x * HEAD_SIZE;
  if (parts > 1) gather_ready();
#pragma unroll 1
  for (int d = threadIdx.x; d < HEAD_SIZE; d += THREADS) {
    float total, top;
    const float value = join(of_warps, WARPS, d, total, top);
    if (parts == 1) {
      store_element<ELEMENT>(p.out, at + d, __fdividef(value, total));
      continue;
    }
    Partial& mine = of_parts[blockIdx.y];
    gather_store(&gathered, &mine.values[d], __float_as_uint(value));
    if (d == 0) {
      gather_store(&gathered, &mine.sum, __float_as_uint(total));
      gather_store(&gathered, &mine.maximum, __float_as_uint(top));
    }
  }
  if (parts == 1 || blockIdx.y) return;
  gather_wait(&gathered);
#pragma unroll 1
  for (int d = threadIdx.x; d < HEAD_SIZE; d += THREADS) {
    float total, top;
    const float value = join(of_parts, parts, d, total, top);
    store_element<ELEMENT>(p.out, at + d, __fdividef(value, total));
  }
}
