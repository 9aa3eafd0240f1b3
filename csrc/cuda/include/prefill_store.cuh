// How the sums of a tile of prefill_common.cuh become y: rounded, transposed through shared memory, with bias, scales, ReLU and residual;
// or added up with those of the other splits of a cluster. Needs that header's macros and structures before it.
#pragma once

#if ELEM_BF16
#define PAIR_TYPE "bf16x2.f32"
#else
#define PAIR_TYPE "f16x2.f32"
#endif
template <bool RELU = false>
__device__ __forceinline__ u32 pack_pair(float low, float high) {
  u32 v;
  if constexpr (RELU)
    asm("cvt.rn.relu." PAIR_TYPE " %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  else
    asm("cvt.rn." PAIR_TYPE " %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}

__device__ __forceinline__ void store_shared_x4(u32 address, const uint4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

#if TENSOR_STORES
// Starts copying a box from shared memory to column `column` and row `row` of y, but for what lies behind its end.
__device__ __forceinline__ void tensor_store(const u64* map, u32 source, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(source), "r"(column), "r"(row)
               : "memory");
}

__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Of this thread's committed groups of stores, all but PENDING have read their shared memory.
template <int PENDING>
__device__ __forceinline__ void wait_stores() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
#endif

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

__device__ __forceinline__ void fetch_chunk(const Params& p, u32 thread, u32 buffer, int token, int row) {
#pragma unroll
  for (int i = thread & 127; i < CHUNK_TOKENS * 8; i += 128) {
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

__device__ __forceinline__ void write_chunk(const Params& p, u32 thread, u32 buffer, int token, int row) {
#pragma unroll
  for (int i = thread & 127; i < CHUNK_TOKENS * 8; i += 128) {
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

// The bias of a lane's sums.
struct Bias {
  float values[M_BLOCKS][2] = {};

  // `row` is that of the warpgroup's first sum.
  __device__ __forceinline__ void load(const Params& p, u32 thread, int row) {
#pragma unroll
    for (int mb = 0; mb < M_BLOCKS; ++mb)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int mine = row + mb * 64 + (thread >> 5 & 3) * 16 + (thread >> 2 & 7) + half * 8;
        values[mb][half] = p.bias && mine < p.rows ? to_float(p.bias[mine]) : 0.0f;
      }
  }
};

// Rounds the tile's sums and writes them to y: a warp's fragments of yᵀ are stored transposed into chunks of shared memory, of which
// whole lines of y are written. `row` and `token` are the place of the warpgroup's first sum. Tensor cores idle until the sums are in
// shared memory: what few products need stands in code of its own.
template <bool RESIDUAL, bool RELU>
__device__ __forceinline__ void store_tile(const Params& p, u32 thread, u32 staging, const Sum (&d)[M_BLOCKS][N_TILES][4], const Bias& bias,
                                           int row, int token) {
  constexpr int TURNS = BLOCK_CHUNKS / LEAVING, PLACES = STORES / LEAVING, TURN_TOKENS = LEAVING * CHUNK_TOKENS;
  const int lane = thread & 31, warp = thread >> 5 & 3;
  // Of the four 8 x 8 matrices that a warp moves at a time: activation row and chunk of 16 bytes for which the lane gives the address.
  const u32 from = (lane >> 4) * 8 + (lane & 7), at = from * 128 + ((warp * 2 + (lane >> 3 & 1)) ^ (lane & 7)) * 16;
  // The sums of the tile before have left, mostly long ago.
#if TENSOR_STORES
  if ((thread & 127) == 0) wait_stores<0>();
#endif
  warpgroup_sync(thread);
#pragma unroll
  for (int mb = 0; mb < M_BLOCKS; ++mb) {
    const int first = row + mb * 64;
    if (first >= p.rows) return;
    const Scales scales(p, first + warp * 16 + (lane >> 2));
#pragma unroll
    for (int within = 0; within < TURNS; ++within) {
      const int turn = mb * TURNS + within, begin = token + within * TURN_TOKENS;
      // Groups of stores are counted in turns, also behind the last activation row.
      const bool any = begin < p.m;
      const u32 place = staging + turn % PLACES * (TURN_TOKENS * 128);
      // What was there has left.
      if (turn >= PLACES) {
#if TENSOR_STORES
        if ((thread & 127) == 0) wait_stores<PLACES - 1>();
#endif
        warpgroup_sync(thread);
      }
      const int present = any ? min(LEAVING, (p.m - begin + CHUNK_TOKENS - 1) / CHUNK_TOKENS) : 0;
      if (RESIDUAL) {
#pragma unroll 1
        for (int i = 0; i < present; ++i)
          fetch_chunk(p, thread, place + i * (CHUNK_TOKENS * 128), begin + i * CHUNK_TOKENS, first);
        warpgroup_sync(thread);
      }
#pragma unroll
      for (int pair = 0; pair < TURN_TOKENS / 16; ++pair) {
        const u32 address = place + pair * (16 * 128) + at;
        u32 held[4], v[4];
        if (RESIDUAL)
          asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                       : "=r"(held[0]), "=r"(held[1]), "=r"(held[2]), "=r"(held[3])
                       : "r"(address)
                       : "memory");
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int nt = within * (TURN_TOKENS / 8) + pair * 2 + i / 2;
          const float2 sums = scales.apply(p, d[mb][nt], i % 2, token + nt * 8);
          const float add = BIAS_FIRST ? 0.0f : bias.values[mb][i % 2];
          float low = BIAS_FIRST ? sums.x : sums.x + add, high = BIAS_FIRST ? sums.y : sums.y + add;
          if (RESIDUAL) {
            if (p.relu) low = fmaxf(low, 0.0f), high = fmaxf(high, 0.0f);
            low += to_float((u16)held[i]), high += to_float((u16)(held[i] >> 16));
          }
          v[i] = pack_pair<RELU>(low, high);
        }
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]),
                     "r"(v[2]), "r"(v[3])
                     : "memory");
      }
#if TENSOR_STORES
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
      warpgroup_sync(thread);
#if TENSOR_STORES
      if (p.y_vector) {
        if ((thread & 127) == 0) {
          if (any) tensor_store(p.y_map, place, first, begin);
          commit_stores();
        }
        continue;
      }
#endif
#pragma unroll 1
      for (int i = 0; i < present; ++i)
        write_chunk(p, thread, place + i * (CHUNK_TOKENS * 128), begin + i * CHUNK_TOKENS, first);
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
