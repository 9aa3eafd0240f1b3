// The first half of a layer for one row, in one kernel: LayerNorm, q, k and v, attention, and the product with the output weight in parts.
//
//   cluster (head, blocks along y): all of one head. Its blocks share
//     the row's columns      where the half before left its sums in parts (half/input.cuh)
//     q, k and v             pieces of 16 rows by 256 columns, in turn
//     attention              ranges of positions; the token's own key and value belong to the last block
//     the output's rows      each block's tiles by the head's columns: one of HEADS parts of the sums, for the half behind
//   and hand each other what they found through shared memory: three exchanges within the cluster, and none with other clusters.
//
// Weights, which no kernel writes, are fetched before predecessors have ended; keys and values come as far as L2.
//
// Macros: those of half/block.cuh and half/input.cuh; HEAD_SIZE 64.
#include "half/input.cuh"
#include "half/product.cuh"
#include "half/slots.cuh"
#include "softmax.cuh"

#define HEADS (HIDDEN / HEAD_SIZE)
#define HEAD_TILES (HEAD_SIZE / 16)
#define JOBS (3 * HEAD_TILES * UNITS) // pieces of q, k and v, of all blocks
#define Q_JOBS (HEAD_TILES * UNITS)
#define OUT_TILES (HIDDEN / 16 / CLUSTER)
// A head's columns of an output tile: the positions of its unit, and its values.
#define OUT_WORDS (HEAD_SIZE / 64)
#define OUT_BYTES (512 + OUT_WORDS * 1024)
#define OUT_AT_ONCE (SLOT_BYTES / OUT_BYTES)

#define LANES (HEAD_SIZE / 8)
#define GROUPS (32 / LANES)
#define STEP (WARPS * GROUPS)
#define UNROLL 2
#define TILE (UNROLL * STEP)

#if HEAD_SIZE != 64 || (OUT_TILES + WARPS - 1) / WARPS > OUT_AT_ONCE || HIDDEN / 16 % CLUSTER != 0 || THREADS < 3 * HEAD_SIZE
#error "half a layer takes heads of 64, and no more rows than its slots hold"
#endif

// Shared memory. Sums stand where the joined parts were, which nobody needs once the row is complete; parts of the attention where the row
// was, which nobody needs once q, k and v are there; and a block's own before that where the activations were.
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define PARTIAL_BYTES (4 * (HEAD_SIZE + 2))
#define AT_ROW (WARPS * SLOT_BYTES)
#define AT_X (AT_ROW + MAX(2 * HIDDEN, CLUSTER * PARTIAL_BYTES))
#define AT_SUMS (AT_X + MAX(2 * HIDDEN, WARPS * PARTIAL_BYTES))
#define AT_HEAD (AT_SUMS + MAX(JOINED_BYTES, JOBS * 64))
#define AT_ATTENDED (AT_HEAD + 6 * HEAD_SIZE)
#define AT_MOMENTS (AT_ATTENDED + 2 * HEAD_SIZE)
#define AT_BARRIERS (AT_MOMENTS + 8 * WARPS)

#if SHARED_BYTES < AT_BARRIERS + 8 * WARPS
#error "the host gives too little shared memory"
#endif

struct Params {
  Input in;
  const uint4* qkv; // (3 * HIDDEN, HIDDEN) and
  const uint4* out; // (HIDDEN, HIDDEN) as decode_nm.cu lays them out
  const u16* qkv_bias;
  uint4* k_cache; // (HEADS, capacity, HEAD_SIZE)
  uint4* v_cache;
  const int* lengths; // (1,) positions in use; the token goes behind them
  float* sums;        // (HEADS, HIDDEN)
  int capacity;
  float scale; // of the scores
};

struct Range {
  int begin, end;
};

__device__ __forceinline__ Range range_of(int length, int capacity) {
  const int count = min(length, capacity), share = (count + CLUSTER - 1) / CLUSTER, begin = min((int)cluster_rank() * share, count);
  return {begin, min(begin + share, count)};
}

// Reads past L1, so that a value written meanwhile is seen.
__device__ __forceinline__ int load_length(const int* p) {
  int v;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void prefetch_line(const uint4* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Keys or values of UNROLL positions, STEP apart; zeros behind the last.
__device__ __forceinline__ void load_tile(uint4 (&tile)[UNROLL], const uint4* at, int left) {
#pragma unroll
  for (int u = 0; u < UNROLL; ++u)
    tile[u] = u * STEP < left ? __ldcg(at + u * STEP * LANES) : make_uint4(0, 0, 0, 0);
}

// The attention of a group of lanes, of a warp or of a block over its positions, at shared address `at`: values, sum, maximum.
__device__ __forceinline__ void store_partial(u32 at, int d, float v) { store_word(at + d * 4, __float_as_uint(v)); }

// Element d of `count` partials, joined; `sum` and `maximum` are those of all of them.
template <int COUNT>
__device__ __forceinline__ float join_partials(u32 at, int d, float& sum, float& maximum) {
  float highest[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    highest[i] = load_float(at + i * PARTIAL_BYTES + (HEAD_SIZE + 1) * 4);
  maximum = highest[0];
#pragma unroll
  for (int i = 1; i < COUNT; ++i)
    maximum = fmaxf(maximum, highest[i]);
  float value = 0;
  sum = 0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const float weight = exp2_fast(highest[i] - maximum);
    value += weight * load_float(at + i * PARTIAL_BYTES + d * 4);
    sum += weight * load_float(at + i * PARTIAL_BYTES + HEAD_SIZE * 4);
  }
  return value;
}

// Fetches the warp's output tiles, `first`, `first` + WARPS and so on, to its slot.
__device__ __forceinline__ void fetch_out(const Slot& slot, const Params& p, int first) {
  if ((threadIdx.x & 31) != 0 || first >= OUT_TILES) return;
  const int column = blockIdx.x * HEAD_SIZE;
  const uint4* source = p.out + ((size_t)(cluster_rank() * OUT_TILES + first) * UNITS + column / 256) * 288;
  const int count = (OUT_TILES - first + WARPS - 1) / WARPS;
  slot.expect(count * OUT_BYTES);
  for (int i = 0; i < count; ++i, source += (size_t)WARPS * UNITS * 288) {
    slot.copy(i * OUT_BYTES, source, 512);
    slot.copy(i * OUT_BYTES + 512, source + (1 + column % 256 / 32) * 32, OUT_WORDS * 1024);
  }
}

__device__ __forceinline__ void fetch_out_ahead(const Params& p, int first) {
  const int column = blockIdx.x * HEAD_SIZE;
  for (int tile = first; tile < OUT_TILES; tile += WARPS) {
    const uint4* source = p.out + ((size_t)(cluster_rank() * OUT_TILES + tile) * UNITS + column / 256) * 288;
    fetch_ahead(source, 512);
    fetch_ahead(source + (1 + column % 256 / 32) * 32, OUT_WORDS * 1024);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) half_attention(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char smem[];
  const u32 shared = shared_address(smem), rank = cluster_rank();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.x;
  release_successor();
  arrive_together();

  // Jobs rank, rank + CLUSTER, ... of q, k and v are the block's own, and its i-th is warp i % WARPS's.
  const int own = (JOBS - (int)rank + CLUSTER - 1) / CLUSTER;
  auto job_of = [&](int i) { return (int)rank + i * CLUSTER; };
  auto piece = [&](int i) {
    const int tile = job_of(i) / UNITS, row_tile = tile / HEAD_TILES * (HIDDEN / 16) + head * HEAD_TILES + tile % HEAD_TILES;
    return p.qkv + ((size_t)row_tile * UNITS + job_of(i) % UNITS) * 288;
  };
  // Output tiles begin with the warp behind that of the last job.
  const int first_out = (warp + (own + WARPS - 1) / WARPS * WARPS - own) % WARPS;
  Slot slot;
  slot.open(shared, shared + AT_BARRIERS);
  if (warp < own) {
    slot.fetch(piece(warp));
    if (lane == 0) fetch_out_ahead(p, first_out);
  } else {
    fetch_out(slot, p, first_out);
  }
  const Constants constants = load_constants(p.in);
  float bias = 0;
  if (threadIdx.x < 3 * HEAD_SIZE)
    bias = to_float(p.qkv_bias[threadIdx.x / HEAD_SIZE * HIDDEN + head * HEAD_SIZE + threadIdx.x % HEAD_SIZE]);
  const size_t cache = (size_t)head * p.capacity * LANES;
  {
    // What the last step left is the length unless a predecessor that still runs changes it: these are hints.
    const Range range = range_of(load_length(p.lengths), p.capacity);
    for (int i = threadIdx.x; i < range.end - range.begin; i += THREADS) {
      prefetch_line(p.k_cache + cache + (size_t)(range.begin + i) * LANES);
      prefetch_line(p.v_cache + cache + (size_t)(range.begin + i) * LANES);
    }
  }
  wait_predecessor();

  const int now = load_length(p.lengths);
  join(p.in, constants, (float4*)(smem + AT_SUMS), shared + AT_ROW);
  normalise(p.in, constants, shared + AT_ROW, (float2*)(smem + AT_MOMENTS),
            [&](u32 vector, const uint4& v) { store_activations(shared + AT_X, vector, v); });
  __syncthreads();

  // Sums of each piece go to whoever needs them: those of q to all blocks, those of k and v to the last.
#pragma unroll 1
  for (int i = warp; i < own; i += WARPS) {
    const int job = job_of(i);
    float sum[4] = {};
    slot.wait();
    multiply_slot(sum, slot.data, shared + AT_X + job % UNITS * 512);
    __syncwarp();
    if (i + WARPS < own)
      slot.fetch(piece(i + WARPS));
    else
      fetch_out(slot, p, first_out);
    const u32 at = shared + AT_SUMS + job * 64 + (lane & 15) * 4, word = __float_as_uint(row_sum(sum));
    if (job < Q_JOBS) {
#pragma unroll
      for (int other = 0; other < CLUSTER; other += 2)
        push(address_in(at, other + (lane >> 4)), word);
    } else if (lane < 16) {
      push(address_in(at, CLUSTER - 1), word);
    }
  }
  arrive_together();
  // Lanes that share a position, a group's positions in flight.
  const int in_group = lane % LANES, first = warp * GROUPS + lane / LANES;
  const Range range = range_of(now, p.capacity);
  const uint4* k_at = p.k_cache + cache + (size_t)(range.begin + first) * LANES + in_group;
  const uint4* v_at = p.v_cache + cache + (size_t)(range.begin + first) * LANES + in_group;
  int left = range.end - range.begin - first;
  uint4 k[UNROLL], v[UNROLL];
  load_tile(k, k_at, left);
  load_tile(v, v_at, left);
  wait_together();
  const bool last = rank == CLUSTER - 1;
  if (threadIdx.x < (last ? 3 * HEAD_SIZE : HEAD_SIZE)) {
    const u32 at = shared + AT_SUMS + threadIdx.x / 16 * (UNITS * 64) + threadIdx.x % 16 * 4;
    float sum = 0;
#pragma unroll
    for (int u = 0; u < UNITS; ++u)
      sum += load_float(at + u * 64);
    store_half_word(shared + AT_HEAD + threadIdx.x * 2, from_float(sum + bias));
  }
  __syncthreads();

  float q[8], acc[8] = {}, sum = 0, maximum = LOWEST;
  auto load_own = [&](int which) {
    u32 word[4];
    load_shared_x4(shared + AT_HEAD + which * HEAD_SIZE * 2 + in_group * 16, word);
    return make_uint4(word[0], word[1], word[2], word[3]);
  };
  auto score_of = [&](const uint4& key) {
    float f[8], score = 0;
    unpack(key, f);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      score += q[i] * f[i];
    return group_sum<LANES>(score);
  };
  unpack(load_own(0), q);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    q[i] *= p.scale * LOG2E;
  if (last && warp == WARPS - 1 && now < p.capacity) {
    const uint4 own_k = load_own(1), own_v = load_own(2);
    const float score = score_of(own_k);
    if (lane < LANES) {
      maximum = score;
      sum = 1;
      unpack(own_v, acc);
      p.k_cache[cache + (size_t)now * LANES + in_group] = own_k;
      p.v_cache[cache + (size_t)now * LANES + in_group] = own_v;
    }
  }
#pragma unroll 1
  for (int tiles = (range.end - range.begin + TILE - 1) / TILE; tiles > 0; --tiles) {
    float score[UNROLL], highest = maximum;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      score[u] = score_of(k[u]);
      if (u * STEP >= left) score[u] = -__int_as_float(0x7f800000);
      highest = fmaxf(highest, score[u]);
    }
    const float shrink = exp2_fast(maximum - highest);
    maximum = highest;
    sum *= shrink;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      acc[i] *= shrink;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const float weight = exp2_fast(score[u] - maximum);
      float f[8];
      unpack(v[u], f);
      add_weighted(weight, f, acc, sum);
    }
    left -= TILE;
    k_at += TILE * LANES;
    v_at += TILE * LANES;
    load_tile(k, k_at, left);
    load_tile(v, v_at, left);
  }

  // Groups, warps and blocks join what they have, each weighted by its maximum.
  {
    const float highest = max_of_groups<LANES>(maximum), shrink = exp2_fast(maximum - highest);
    const u32 at = shared + AT_X + warp * PARTIAL_BYTES;
    sum = sum_of_groups<LANES>(sum * shrink);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      acc[i] = sum_of_groups<LANES>(acc[i] * shrink);
      if (lane < LANES) store_partial(at, in_group * 8 + i, acc[i]);
    }
    if (lane == 0) {
      store_partial(at, HEAD_SIZE, sum);
      store_partial(at, HEAD_SIZE + 1, highest);
    }
  }
  __syncthreads();
  if (threadIdx.x < HEAD_SIZE) {
    float total, top;
    const u32 value = __float_as_uint(join_partials<WARPS>(shared + AT_X, threadIdx.x, total, top));
    const u32 at = shared + AT_ROW + rank * PARTIAL_BYTES;
#pragma unroll
    for (int other = 0; other < CLUSTER; ++other)
      push(address_in(at + threadIdx.x * 4, other), value);
    if (threadIdx.x < CLUSTER) {
      push(address_in(at + HEAD_SIZE * 4, threadIdx.x), __float_as_uint(total));
      push(address_in(at + (HEAD_SIZE + 1) * 4, threadIdx.x), __float_as_uint(top));
    }
  }
  arrive_together();
  wait_together();
  if (threadIdx.x < HEAD_SIZE) {
    float total, top;
    const float value = join_partials<CLUSTER>(shared + AT_ROW, threadIdx.x, total, top);
    const u32 at = shared + AT_ATTENDED + place_of_word(threadIdx.x / 2) * 4 + threadIdx.x % 2 * 2;
    store_half_word(at, from_float(__fdividef(value, total)));
  }
  __syncthreads();

  if (first_out >= OUT_TILES) return;
  slot.wait();
  float* sums = p.sums + (size_t)head * HIDDEN + (rank * OUT_TILES + first_out) * 16 + lane / 4;
#pragma unroll 1
  for (int tile = first_out, at = 0; tile < OUT_TILES; tile += WARPS, at += OUT_BYTES, sums += WARPS * 16) {
    u32 positions[OUT_WORDS];
#pragma unroll
    for (int w = 0; w < OUT_WORDS; ++w)
      positions[w] = load_word(slot.data + at + lane * 16 + (head * HEAD_SIZE % 256 / 64 + w) * 4);
    float part[4] = {};
    multiply<OUT_WORDS>(part, positions, slot.data + at + 512, shared + AT_ATTENDED);
    if (lane % 4 == 0) {
      sums[0] = part[0];
      sums[8] = part[2];
    }
  }
}
