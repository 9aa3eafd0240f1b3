// The frame of the prefill kernels (sm_90a): y (m, rows) = x (m, cols) · Wᵀ for many activation rows m, W packed (rows, cols).
//
// W is operand A of wgmma and comes from registers or, of 8-bit values, from shared memory; x is operand B, so a block computes yᵀ: a tile
// of TILE_ROWS weight rows by TILE_TOKENS activation rows. Compile-time macros, set by the host:
//   ELEM_BF16    1 for bfloat16, 0 for float16 (weights, x, bias, residual and y alike; sums are float32)
//   VALUES       1: weights and x are e4m3; 2: int8, and sums int32; then each row of W and of x has a scale. 0: as above
//   N_TILES      n-tiles of 8 activation rows of a block's tile
//   M_BLOCKS     m64 blocks of weight rows held by a consumer warpgroup
//   CONSUMERS    consumer warpgroups
//   STAGES       buffers of 128 bytes of columns, STAGE_COLUMNS
//   CLUSTER      blocks side by side along the rows that share their activations: each fetches a part of a buffer for all
//   SPLITS       blocks of a cluster that share the columns of one tile; their sums meet in distributed shared memory
//   MIN_BLOCKS   blocks that must fit one multiprocessor (bounds the registers)
//
//              TILE_TOKENS                      x --tensor copies, multicast--> STAGES buffers [TILE_TOKENS][128 bytes], 16-byte chunks
//        +-----------+-----------+                       exchanged by the row modulo 8, as wgmma reads them
//        | block     | block     |              W --the kernel's own way--> registers of the consumers
//   rows | of tile 0 | of tile 2 |              sums --transposed through shared memory, bias, ReLU, residual--> y, row-major
//        +-----------+-----------+
//        | tile 1    | tile 3    |              blocks stay, and take tiles cluster by cluster: along the rows of a band of BAND_TOKENS
//        +-----------+-----------+              activation rows, so that those and some of W stay in L2
//
// A kernel is a struct of what its consumers do with W:
//   Weights(p, smem, fragment, unit, rounds)   by a consumer warp, which has row tile `fragment` of 16 of every tile of the block, and of
//                                              it `rounds` units of UNIT columns from `unit` on
//   static void produce(p, stage, full, tile, step)   by the producer warp: copies of its own into the buffer behind x (WEIGHT_STAGE_BYTES)
//   void start(p, tile, unit)                  row tile `tile` (of m64 block 0; 4 per further block), from `unit` on, is next; may load
//                                              ahead
//   void multiply_all(d, p, buffers, rounds)   adds the products of `rounds` units
#pragma once

#ifndef VALUES
#define VALUES 0
#endif
#include "element.cuh"
#include "bulk.cuh"
#include "cluster.cuh"
#include "wgmma.cuh"

#ifndef WEIGHT_STAGE_BYTES
#define WEIGHT_STAGE_BYTES 0
#endif
#define ELEMENT_KIND (ELEM_BF16 ? BF16 : F16)
#ifndef UNIT
#define UNIT 256
#endif
#define STAGE_COLUMNS (VALUES ? 128 : 64)
#define TILE_TOKENS (8 * N_TILES)
#define TILE_ROWS (64 * M_BLOCKS * CONSUMERS)
#define TILE_FRAGMENTS (TILE_ROWS / 16)
#define BAND_TOKENS 2048
#define THREADS (128 * (CONSUMERS + 1))
#define X_STAGE_BYTES (TILE_TOKENS * 128)
#define STAGE_BYTES (X_STAGE_BYTES + WEIGHT_STAGE_BYTES)
#define STAGING_AT (STAGES * STAGE_BYTES)
#define CHUNK_TOKENS 32
// Chunks of sums on their way to y, per consumer warpgroup: 2, and threads write them, or more, and tensor stores do while the next tile
// runs.
#ifndef STORES
#define STORES 2
#endif
#ifndef TENSOR_STORES
#define TENSOR_STORES (STORES > 2)
#endif
#define STAGING_BYTES (STORES * CHUNK_TOKENS * 128)
#define BARRIERS_AT (STAGING_AT + CONSUMERS * STAGING_BYTES)
#define SUMS_PITCH (TILE_ROWS + 4)
// Registers go from the producers to the consumers, in multiples of eight, within what the block has at its start; the
// largest sums leave the producer a few too little.
#ifndef PRODUCER_REGISTERS
#define PRODUCER_REGISTERS (M_BLOCKS * N_TILES > 40 ? 24 : 32)
#endif
#define LAUNCH_REGISTERS (65536 / MIN_BLOCKS / THREADS / 8 * 8)
#define SHARE_REGISTERS ((LAUNCH_REGISTERS * (CONSUMERS + 1) - PRODUCER_REGISTERS) / CONSUMERS / 8 * 8)
#define CONSUMER_REGISTERS (SHARE_REGISTERS > 240 ? 240 : SHARE_REGISTERS)

static_assert(TILE_TOKENS % CHUNK_TOKENS == 0 && TILE_TOKENS % (8 * CLUSTER) == 0, "a tile has whole chunks of activation rows");

struct alignas(64) Params {
  u64 x[16];                  // tensor map of x (m, cols): boxes of STAGE_COLUMNS by TILE_TOKENS / CLUSTER rows, 128-byte exchange pattern
  u64 y_map[16];              // tensor map of y (m, rows): boxes of 64 columns by CHUNK_TOKENS rows, likewise; unless y_vector is 0
  const uint4* weight;        // the kernel's own layout
  const u32* offsets;         // unstructured only, as is depth: see paired.cuh
  const u16* bias;            // (rows,) or null
  const u16* residual;        // (m, rows) contiguous or null; added last
  u16* y;                     // (m, rows) contiguous
  const float* weight_scales; // (rows,), where VALUES is not 0
  const float* x_scales;      // (m,), readable up to a multiple of TILE_TOKENS
  int m, rows;
  int units;    // ceil(cols / UNIT)
  int relu;     // clamp at 0 after the bias, before the residual
  int depth;    // words of the deepest unit
  int y_vector; // y and residual are 16-byte aligned and rows is a multiple of 8
};

// All of a block's shared memory.
extern __shared__ __align__(1024) unsigned char dynamic[];

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ float to_float(u16 v) { return load_element<ELEMENT_KIND>(&v, 0); }

__device__ __forceinline__ u32 pack_pair(float low, float high) {
  u32 v;
#if ELEM_BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
#endif
  return v;
}

__device__ __forceinline__ void load_shared_x4(u32 address, u32 (&v)[4]) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ void store_shared_x4(u32 address, const uint4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Weights are read again by the blocks of other activation rows: kept out of L1 only.
__device__ __forceinline__ uint4 load_weight(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// The same, ordered among memory accesses: the compiler moves other loads to just before their use, however early they are written.
__device__ __forceinline__ uint4 load_in_order(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ u64 activation_policy() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

#if TENSOR_STORES
// Starts copying a box from shared memory to column `column` and row `row` of y, but for what lies behind its end.
__device__ __forceinline__ void tensor_store(const u64* map, u32 source, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\n"
               "cp.async.bulk.commit_group;" ::"l"(map),
               "r"(source), "r"(column), "r"(row)
               : "memory");
}

// Of this thread's stores, all but PENDING have read their shared memory.
template <int PENDING>
__device__ __forceinline__ void wait_stores() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
#endif

// A barrier of the 128 threads of one consumer warpgroup.
__device__ __forceinline__ void warpgroup_sync() { asm volatile("bar.sync %0, 128;" ::"r"(1 + (threadIdx.x >> 7)) : "memory"); }

struct Ring {
  u32 slot, parity;
  __device__ __forceinline__ void advance() {
    if (++slot == STAGES) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// The buffers as a consumer warp goes through them, each once.
struct Buffers {
  u32 smem, before;
  Ring ring;
  bool any;

  // Shared address of the next buffer, once it is there.
  __device__ __forceinline__ u32 open() const {
    barrier_wait(smem + BARRIERS_AT + 8 * ring.slot, ring.parity);
    return smem + ring.slot * STAGE_BYTES;
  }

  __device__ __forceinline__ void release(u32 slot) const {
    const u32 empty = smem + BARRIERS_AT + 8 * (STAGES + slot), lane = threadIdx.x & 31;
#if CLUSTER == 1
    if (lane == 0) barrier_arrive(empty);
#else
    if (lane < CLUSTER) barrier_arrive_in(empty, blockIdx.y * CLUSTER + lane);
#endif
  }

  // After products have been committed: waits for those before them. With the `first` of a buffer the one before it is given back, after
  // the `last` the next one is due.
  __device__ __forceinline__ void close(bool first, bool last) {
    wait_products<1>();
    if (first) {
      if (any) release(before);
      before = ring.slot;
      any = true;
    }
    if (last) ring.advance();
  }

  __device__ __forceinline__ void finish() {
    wait_products<0>();
    if (any) release(before);
    any = false;
  }
};

// Tiles in the order in which the clusters take them.
struct Schedule {
  int row_groups, token_tiles, at;

  __device__ __forceinline__ explicit Schedule(const Params& p)
      : row_groups((p.rows + TILE_ROWS * CLUSTER - 1) / (TILE_ROWS * CLUSTER)), token_tiles((p.m + TILE_TOKENS - 1) / TILE_TOKENS),
        at(blockIdx.x / CLUSTER) {}

  __device__ __forceinline__ bool any() const { return at < row_groups * token_tiles; }
  __device__ __forceinline__ void advance() { at += gridDim.x / CLUSTER; }

  __device__ __forceinline__ void place(int& row, int& token) const {
    constexpr int BAND = (BAND_TOKENS + TILE_TOKENS - 1) / TILE_TOKENS;
    const int first = at / (BAND * row_groups) * BAND, width = min(BAND, token_tiles - first), within = at - first * row_groups;
    token = (first + within % width) * TILE_TOKENS;
    row = (within / width * CLUSTER + blockIdx.x % CLUSTER) * TILE_ROWS;
  }
};

// Of a chunk of y or residual, [CHUNK_TOKENS][64 rows] from (token, row) on: 16 bytes of a thread, between memory and shared memory.
struct Piece {
  int token, column;
  u32 address;

  __device__ __forceinline__ Piece(u32 buffer, int i) {
    token = i >> 3;
    column = (i & 7) * 8;
    address = buffer + token * 128 + ((i ^ token) & 7) * 16;
  }
};

__device__ __forceinline__ void fetch_chunk(const Params& p, u32 buffer, int token, int row) {
#pragma unroll
  for (int i = threadIdx.x & 127; i < CHUNK_TOKENS * 8; i += 128) {
    const Piece piece(buffer, i);
    const int n = token + piece.token, r = row + piece.column;
    u16 v[8] = {};
    const u16* source = p.residual + (size_t)n * p.rows + r;
    if (n < p.m && r < p.rows) {
      if (p.y_vector) {
        *(uint4*)v = *(const uint4*)source;
      } else {
        for (int j = 0; j < 8; ++j)
          if (r + j < p.rows) v[j] = source[j];
      }
    }
    store_shared_x4(piece.address, *(const uint4*)v);
  }
}

__device__ __forceinline__ void write_chunk(const Params& p, u32 buffer, int token, int row) {
#pragma unroll
  for (int i = threadIdx.x & 127; i < CHUNK_TOKENS * 8; i += 128) {
    const Piece piece(buffer, i);
    const int n = token + piece.token, r = row + piece.column;
    if (n >= p.m || r >= p.rows) continue;
    u32 v[4];
    load_shared_x4(piece.address, v);
    u16* target = p.y + (size_t)n * p.rows + r;
    if (p.y_vector) {
      *(uint4*)target = make_uint4(v[0], v[1], v[2], v[3]);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (r + j < p.rows) target[j] = (u16)(v[j / 2] >> 16 * (j % 2));
    }
  }
}

// What a lane's sums of two weight rows, `row` and 8 below it, count for.
struct Scales {
#if VALUES
  float weight[2];
  __device__ __forceinline__ Scales(const Params& p, int row)
      : weight{row < p.rows ? p.weight_scales[row] : 0.0f, row + 8 < p.rows ? p.weight_scales[row + 8] : 0.0f} {}
#else
  __device__ __forceinline__ Scales(const Params&, int) {}
#endif

  // The two sums of weight row `half`, whose n-tile begins at activation row `token`.
  __device__ __forceinline__ float2 apply(const Params& p, const Sum (&sums)[4], int half, int token) const {
    float2 v = make_float2((float)sums[2 * half], (float)sums[2 * half + 1]);
#if VALUES
    const float2 x = *(const float2*)(p.x_scales + token + (threadIdx.x & 3) * 2);
    v.x *= weight[half] * x.x, v.y *= weight[half] * x.y;
#endif
    return v;
  }
};

// Rounds the tile's sums and writes them to y: a warp's fragments of yᵀ are stored transposed into chunks of shared memory, of which
// whole lines of y are written. `row` and `token` are the place of the warpgroup's first sum, `slot` the chunk that is next in turn.
__device__ __forceinline__ void store_tile(const Params& p, u32 staging, const Sum (&d)[M_BLOCKS][N_TILES][4], int row, int token,
                                           u32& slot) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
  // Of the four 8 x 8 matrices that a warp moves at a time: activation row and chunk of 16 bytes for which the lane gives the address.
  const u32 from = (lane >> 4) * 8 + (lane & 7), at = from * 128 + ((warp * 2 + (lane >> 3 & 1)) ^ (lane & 7)) * 16;
#pragma unroll
  for (int mb = 0; mb < M_BLOCKS; ++mb) {
    const int first = row + mb * 64, mine = first + warp * 16 + (lane >> 2);
    if (first >= p.rows) return;
    float bias[2] = {0.0f, 0.0f};
    if (p.bias) {
      if (mine < p.rows) bias[0] = to_float(p.bias[mine]);
      if (mine + 8 < p.rows) bias[1] = to_float(p.bias[mine + 8]);
    }
    const Scales scales(p, mine);
#pragma unroll
    for (int chunk = 0; chunk < TILE_TOKENS / CHUNK_TOKENS; ++chunk) {
      const int n = token + chunk * CHUNK_TOKENS;
      if (n >= p.m) break;
      const u32 buffer = staging + slot * (CHUNK_TOKENS * 128);
      if (++slot == STORES) slot = 0;
      // What was in the chunk has left it.
#if TENSOR_STORES
      if ((threadIdx.x & 127) == 0) wait_stores<STORES - 1>();
#endif
      warpgroup_sync();
      if (p.residual) {
        fetch_chunk(p, buffer, n, first);
        warpgroup_sync();
      }
#pragma unroll
      for (int pair = 0; pair < CHUNK_TOKENS / 16; ++pair) {
        const u32 address = buffer + pair * (16 * 128) + at;
        u32 held[4] = {0, 0, 0, 0}, v[4];
        if (p.residual)
          asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                       : "=r"(held[0]), "=r"(held[1]), "=r"(held[2]), "=r"(held[3])
                       : "r"(address)
                       : "memory");
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int nt = chunk * (CHUNK_TOKENS / 8) + pair * 2 + i / 2;
          const float2 sums = scales.apply(p, d[mb][nt], i % 2, token + nt * 8);
          float low = sums.x + bias[i % 2], high = sums.y + bias[i % 2];
          if (p.relu) low = fmaxf(low, 0.0f), high = fmaxf(high, 0.0f);
          if (p.residual) low += to_float((u16)held[i]), high += to_float((u16)(held[i] >> 16));
          v[i] = pack_pair(low, high);
        }
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]),
                     "r"(v[2]), "r"(v[3])
                     : "memory");
      }
#if TENSOR_STORES
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      warpgroup_sync();
      if (p.y_vector) {
        if ((threadIdx.x & 127) == 0) tensor_store(p.y_map, buffer, first, n);
        continue;
      }
#else
      warpgroup_sync();
#endif
      write_chunk(p, buffer, n, first);
    }
  }
}

#if SPLITS > 1
// Puts a warpgroup's sums into shared memory, [TILE_TOKENS][SUMS_PITCH]; `above` rows of the tile, which begins at `row` and `token`, are
// before its own.
__device__ __forceinline__ void collect(const Params& p, float* sums, const Sum (&d)[M_BLOCKS][N_TILES][4], int above, int row, int token) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
#pragma unroll
  for (int mb = 0; mb < M_BLOCKS; ++mb) {
    const int mine = above + mb * 64 + warp * 16 + (lane >> 2);
    const Scales scales(p, row + mine);
#pragma unroll
    for (int nt = 0; nt < N_TILES; ++nt)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 v = scales.apply(p, d[mb][nt], half, token + nt * 8);
        float* target = sums + (nt * 8 + (lane & 3) * 2) * SUMS_PITCH + mine + half * 8;
        target[0] = v.x, target[SUMS_PITCH] = v.y;
      }
  }
}

// Adds up four weight rows of activation row n, from `row` on, and writes them to y.
__device__ __forceinline__ void store_four(const Params& p, const float4 (&part)[SPLITS], int n, int row) {
  if (row >= p.rows) return;
  float v[4] = {};
#pragma unroll
  for (int s = 0; s < SPLITS; ++s)
    v[0] += part[s].x, v[1] += part[s].y, v[2] += part[s].z, v[3] += part[s].w;
  const size_t at = (size_t)n * p.rows + row;
  u16 bias[4] = {}, residual[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (row + i < p.rows) {
      if (p.bias) bias[i] = p.bias[row + i];
      if (p.residual && !p.y_vector) residual[i] = p.residual[at + i];
    }
  if (p.residual && p.y_vector) *(uint2*)residual = *(const uint2*)(p.residual + at);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[i] += to_float(bias[i]);
    if (p.relu) v[i] = fmaxf(v[i], 0.0f);
    if (p.residual) v[i] += to_float(residual[i]);
  }
  const u32 pairs[2] = {pack_pair(v[0], v[1]), pack_pair(v[2], v[3])};
  if (p.y_vector) {
    *(uint2*)(p.y + at) = make_uint2(pairs[0], pairs[1]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (row + i < p.rows) p.y[at + i] = (u16)(pairs[i / 2] >> 16 * (i % 2));
}

// Adds up this block's share of what the splits have collected and writes it to y.
__device__ __forceinline__ void reduce_and_store(const Params& p, const float* sums, int row, int token) {
  constexpr int FOURS = TILE_ROWS / 4;
  const int rank = blockIdx.y, column = blockIdx.x % CLUSTER, count = min(TILE_TOKENS, p.m - token) * FOURS;
  constexpr int STRIDE = SPLITS * 128 * CONSUMERS;
  // As many reads under way as registers allow: another block's memory is far.
  constexpr int FLIGHT = SPLITS > 2 ? 4 : 8;
  for (int first = rank * (128 * CONSUMERS) + threadIdx.x; first < count; first += FLIGHT * STRIDE) {
    float4 part[FLIGHT][SPLITS];
#pragma unroll
    for (int f = 0; f < FLIGHT; ++f) {
      const int e = min(first + f * STRIDE, count - 1);
      const u32 address = shared_address(sums + e / FOURS * SUMS_PITCH + e % FOURS * 4);
#pragma unroll
      for (int s = 0; s < SPLITS; ++s)
        part[f][s] = cluster_read(address, s * CLUSTER + column);
    }
#pragma unroll
    for (int f = 0; f < FLIGHT; ++f) {
      const int e = first + f * STRIDE;
      if (e < count) store_four(p, part[f], token + e / FOURS, row + e % FOURS * 4);
    }
  }
}
#endif

template <class Weights>
__device__ __forceinline__ void produce(const Params& p, u32 smem, int begin, int rounds) {
  const u32 full = smem + BARRIERS_AT, empty = full + 8 * STAGES, lane = threadIdx.x & 31;
  const u32 part = blockIdx.x % CLUSTER;
#if CLUSTER > 1
  const u16 mask = (u16)(((1u << CLUSTER) - 1) << (blockIdx.y * CLUSTER));
#endif
  const u64 policy = activation_policy();
  Ring ring = {0, 1};
  wait_predecessor();
  for (Schedule tiles(p); tiles.any(); tiles.advance()) {
    int row, token;
    tiles.place(row, token);
    for (int stage = begin * (UNIT / STAGE_COLUMNS); stage < (begin + rounds) * (UNIT / STAGE_COLUMNS); ++stage) {
      const u32 buffer = smem + ring.slot * STAGE_BYTES, barrier = full + 8 * ring.slot;
      barrier_wait(empty + 8 * ring.slot, ring.parity);
      if (lane == 0) {
        barrier_expect(barrier, STAGE_BYTES);
        const u32 target = buffer + part * (X_STAGE_BYTES / CLUSTER);
        const int column = stage * STAGE_COLUMNS, first = token + part * (TILE_TOKENS / CLUSTER);
#if CLUSTER == 1
        tensor_copy(target, p.x, column, first, barrier, policy);
#else
        tensor_copy_to_all(target, p.x, column, first, barrier, mask, policy);
#endif
      }
      __syncwarp();
      Weights::produce(p, buffer + X_STAGE_BYTES, barrier, row / 16, stage);
      ring.advance();
    }
  }
}

template <class Weights>
__device__ __forceinline__ void consume(const Params& p, int begin, int rounds) {
  const u32 smem = shared_address(dynamic), warpgroup = threadIdx.x >> 7;
  const int above = warpgroup * (64 * M_BLOCKS), fragment = above / 16 + (threadIdx.x >> 5 & 3);
  Buffers buffers = {smem, 0, {0, 0}, false};
  Weights weights(p, smem, fragment, begin, rounds);
  Schedule tiles(p);
  if (!tiles.any()) return;
  int row, token;
  tiles.place(row, token);
  weights.start(p, row / 16 + fragment, begin);
  bool first = true;
#if SPLITS == 1
  u32 slot = 0;
#endif
  while (true) {
    Sum d[M_BLOCKS][N_TILES][4] = {};
    weights.multiply_all(d, p, buffers, rounds);
    buffers.finish();
    // Nothing that reads the sums may move up before the wait.
#pragma unroll
    for (int mb = 0; mb < M_BLOCKS; ++mb)
#pragma unroll
      for (int nt = 0; nt < N_TILES; ++nt)
        asm volatile(""
                     : SUM_REGISTER(d[mb][nt][0]), SUM_REGISTER(d[mb][nt][1]), SUM_REGISTER(d[mb][nt][2]),
                       SUM_REGISTER(d[mb][nt][3])::"memory");
    if (first) wait_predecessor();
    first = false;
#if SPLITS > 1
    cluster_sync();
    collect(p, (float*)dynamic, d, above, row, token);
    cluster_sync();
    reduce_and_store(p, (const float*)dynamic, row, token);
    return;
#else
    const int done_row = row, done_token = token;
    tiles.advance();
    const bool more = tiles.any();
    if (more) {
      tiles.place(row, token);
      weights.start(p, row / 16 + fragment, begin);
    }
    store_tile(p, smem + STAGING_AT + warpgroup * STAGING_BYTES, d, done_row + above, done_token, slot);
    if (more) continue;
#if TENSOR_STORES
    if ((threadIdx.x & 127) == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
    return;
#endif
  }
}

template <class Weights>
__device__ __forceinline__ void prefill(const Params& p) {
  const u32 smem = shared_address(dynamic);
  const int split = blockIdx.y;
  const int begin = (int)((long long)p.units * split / SPLITS), rounds = (int)((long long)p.units * (split + 1) / SPLITS) - begin;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(smem + BARRIERS_AT + 8 * s, 1);
      barrier_init(smem + BARRIERS_AT + 8 * (STAGES + s), 4 * CONSUMERS * CLUSTER);
    }
    barrier_init_fence();
  }
  release_successor();
#if CLUSTER * SPLITS > 1
  cluster_sync();
#endif
  __syncthreads();
  if (threadIdx.x >= 128 * CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
    if (threadIdx.x < 128 * CONSUMERS + 32) produce<Weights>(p, smem, begin, rounds);
#if SPLITS > 1
    __syncwarp();
    cluster_sync();
    cluster_sync();
#endif
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
    consume<Weights>(p, begin, rounds);
  }
  // A block may not leave while others still copy into it, arrive at its barriers or read its sums.
#if CLUSTER * SPLITS > 1
  __syncwarp();
  cluster_sync();
#endif
}
