// Shared parts of the decode kernels: y (m, rows) = x (m, cols) · Wᵀ for few activation rows m, W packed (rows, cols).
//
// W is operand A of the tensor-core instructions, so a warp computes yᵀ: row tiles of 16 weight rows by n-tiles of 8
// activation rows. Compile-time macros, set by the host:
//   ELEM_BF16    1 for bfloat16, 0 for float16 (weights, x, bias, residual and y alike; sums are float32)
//   N_TILES      n-tiles of 8 activation rows held by every warp: m <= 8 * N_TILES
//   ROW_TILES    row tiles of 16 held by every warp
//   WARPS_ROW, WARPS_K   warps of a block along rows and along the columns
//   PARTS        N:M: warps (1, 2 or 4) that share a unit of 256 columns, divides WARPS_K; unstructured: units are 256 / PARTS columns
//   STAGES       buffers of x in shared memory; unstructured: slots of units per warp
//   MIN_BLOCKS   blocks that must fit one multiprocessor (bounds the registers)
//
//   block (bx, s) of grid (row groups, splits), a cluster along the splits:
//        columns of split s: units of 256, unit u_begin + round * ROUND_UNITS + k-warp / PARTS
//      +----------+----------+----
//      | k-warp 0 | k-warp 1 | ...   one round: x for ROUND_UNITS units is staged in shared memory,
//      |  WARPS_ROW * ROW_TILES * 16 rows    every warp streams its own units of W through registers
//      +----------+----------+----
//   The k-warps' sums meet in shared memory, those of a cluster's blocks in distributed shared memory.
#pragma once

#include "dependent.cuh"
#include "fragments.cuh"

// Columns that a lane's positions describe together. UNSTRUCTURED is set by the source that includes this file.
#if UNSTRUCTURED
#define UNIT (256 / PARTS)
#define ROUND_UNITS WARPS_K
#else
#define UNIT 256
#define ROUND_UNITS (WARPS_K / PARTS)
#endif
// Warps that fetch activations for the others, where a kernel has them; they come last.
#ifndef PRODUCERS
#define PRODUCERS 0
#endif
// Blocks side by side along the rows that share activations, where a kernel has them: with its splits they are a cluster.
#ifndef CLUSTER
#define CLUSTER 1
#endif
// Fours of sums that a thread reads from other blocks at once: another block's memory is far, registers are few.
#ifndef SUMS_AT_ONCE
#define SUMS_AT_ONCE 8
#endif
#define THREADS (32 * (WARPS_ROW * WARPS_K + PRODUCERS))
#define BLOCK_ROWS (16 * ROW_TILES * WARPS_ROW)
#define RED_PITCH (BLOCK_ROWS + 4)
// Zeros that lanes without an activation row read in place of x; the x buffers start behind it.
#define ZERO_BYTES 128
#define X_PITCH (ROUND_UNITS * UNIT * 2 + X_PAD)
// Steps of 32 columns that a warp makes in its part of a unit.
#define STEPS (8 / PARTS)

struct Params {
  const uint4* weight; // the kernel's own layout, described beside each kernel
  const u32* offsets;  // unstructured only, as are depth and x_buffers: see paired.cuh
  const u16* x;        // (m, cols), row stride ldx elements, columns contiguous
  const u16* bias;     // (rows,) or null
  const u16* residual; // (m, rows) contiguous or null; added last
  u16* y;              // (m, rows) contiguous
  int m, rows, cols, ldx;
  int units;     // ceil(cols / UNIT)
  int relu;      // clamp at 0 after the bias, before the residual
  int x_vector;  // x rows are 16-byte aligned and cols is a multiple of 8
  int y_vector;  // y, bias and residual are 8-byte aligned and rows is a multiple of 4
  int depth;     // words of the deepest unit
  int x_buffers; // of decode_unstructured, in shared memory: two, or one for every round of a row group
};

// A lane's positions for its part of a unit: 16 / PARTS bytes.
__device__ __forceinline__ void load_positions(const uint4* p, u32 (&v)[4 / PARTS], u64 policy) {
#if PARTS == 1
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "l"(p), "l"(policy));
#elif PARTS == 2
  asm volatile("ld.global.nc.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;" : "=r"(v[0]), "=r"(v[1]) : "l"(p), "l"(policy));
#else
  asm volatile("ld.global.nc.L2::cache_hint.u32 %0, [%1], %2;" : "=r"(v[0]) : "l"(p), "l"(policy));
#endif
}

// Rows of x held per buffer: the real ones for one n-tile, whose other lanes read zeros; else all, the rest zeroed once.
__device__ __forceinline__ int staged_rows(int m) { return N_TILES == 1 ? m : 8 * N_TILES; }

__device__ __forceinline__ void clear_padding(unsigned char* smem, const Params& p, int buffers = STAGES) {
  for (int i = threadIdx.x; i < ZERO_BYTES / 16; i += THREADS)
    ((uint4*)smem)[i] = make_uint4(0, 0, 0, 0);
#if N_TILES > 1
  for (int s = 0; s < buffers; ++s) {
    unsigned char* stage = smem + ZERO_BYTES + (size_t)s * staged_rows(p.m) * X_PITCH;
    int chunks = (8 * N_TILES - p.m) * (X_PITCH / 16);
    for (int i = threadIdx.x; i < chunks; i += THREADS)
      ((uint4*)(stage + (size_t)p.m * X_PITCH))[i] = make_uint4(0, 0, 0, 0);
  }
#endif
}

// Starts copying x columns [column, column + ROUND_UNITS * 256) into buffer `stage`; columns from `cols` on become zero.
__device__ __forceinline__ void stage_x(unsigned char* smem, const Params& p, int stage, int column) {
  constexpr int CHUNKS = ROUND_UNITS * UNIT / 8;
  unsigned char* base = smem + ZERO_BYTES + (size_t)stage * staged_rows(p.m) * X_PITCH;
  for (int i = threadIdx.x; i < p.m * CHUNKS; i += THREADS) {
    int row = i / CHUNKS, chunk = i % CHUNKS, c = column + chunk * 8;
    const u16* source = p.x + (size_t)row * p.ldx + c;
    unsigned char* target = base + row * X_PITCH + chunk * 16;
    if (p.x_vector) {
      int bytes = c < p.cols ? 16 : 0;
      asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(bytes ? source : p.x), "r"(bytes)
                   : "memory");
    } else {
      u32 word[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        u32 low = c + 2 * j < p.cols ? source[2 * j] : 0, high = c + 2 * j + 1 < p.cols ? source[2 * j + 1] : 0;
        word[j] = low | high << 16;
      }
      *(uint4*)target = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }
}

__device__ __forceinline__ void commit_stage() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until the oldest of STAGES - 1 outstanding buffers has landed.
__device__ __forceinline__ void wait_stage() { asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory"); }

__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

__device__ __forceinline__ float4 cluster_read(u32 address, int rank) {
  float4 v = make_float4(0, 0, 0, 0);
#if __CUDA_ARCH__ >= 900
  u32 remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(remote) : "memory");
#endif
  return v;
}

__device__ __forceinline__ void add_four(float4& sum, const float4& v) {
  sum.x += v.x;
  sum.y += v.y;
  sum.z += v.z;
  sum.w += v.w;
}

__device__ __forceinline__ float epilogue(const Params& p, float v, u16 bias, u16 residual) {
  if (p.bias) v += to_float(bias);
  if (p.relu) v = fmaxf(v, 0.0f);
  if (p.residual) v += to_float(residual);
  return v;
}

// What the epilogue adds to the sums of a single activation row, copied to shared memory while the product is made: their way from memory
// would come on top. A thread copies what it will add itself. It is the last of a block's shared memory where there is one n-tile.
struct Addends {
  ushort4 bias[BLOCK_ROWS / 4], residual[BLOCK_ROWS / 4];
};

__device__ __forceinline__ Addends& addends(unsigned char* smem) {
  u32 bytes;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
  return *(Addends*)(smem + bytes - sizeof(Addends));
}

__device__ __forceinline__ bool adds_alone(const Params& p) { return N_TILES == 1 && p.m == 1 && gridDim.y == 1 && p.y_vector; }

__device__ __forceinline__ void copy_addend(const Params& p, int group, ushort4* target, const u16* source) {
  const int row = group * BLOCK_ROWS + threadIdx.x * 4;
  if (!source || !adds_alone(p) || threadIdx.x >= BLOCK_ROWS / 4 || row >= p.rows) return;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(target + threadIdx.x)), "l"(source + row) : "memory");
}

// No kernel writes the bias, so that its copy may start before predecessors have ended; both belong to the next group that is committed.
__device__ __forceinline__ void copy_bias(const Params& p, int group, Addends& add) { copy_addend(p, group, add.bias, p.bias); }
__device__ __forceinline__ void copy_residual(const Params& p, int group, Addends& add) { copy_addend(p, group, add.residual, p.residual); }

// What the epilogue adds to four rows of the product, two elements a word, where those lie side by side (y_vector).
struct Addend {
  uint2 bias, residual;
};

// Of activation row n, from `row` on; `add` is null or holds what was copied.
__device__ __forceinline__ Addend load_addend(const Params& p, int n, int row, const Addends* add) {
  Addend found = {};
  if (row >= p.rows) return found;
  if (add && adds_alone(p)) return {*(const uint2*)(add->bias + threadIdx.x), *(const uint2*)(add->residual + threadIdx.x)};
  if (p.bias) found.bias = *(const uint2*)(p.bias + row);
  if (p.residual) found.residual = *(const uint2*)(p.residual + (size_t)n * p.rows + row);
  return found;
}

// Four rows of the product for activation row n, of which those from p.rows on are padding: with y_vector, and without.
__device__ __forceinline__ void store_vector(const Params& p, int n, int row, const float4& sums, const Addend& add) {
  if (row >= p.rows) return;
  const uint2 b = add.bias, r = add.residual;
  *(ushort4*)(p.y + (size_t)n * p.rows + row) = make_ushort4(
      from_float(epilogue(p, sums.x, (u16)b.x, (u16)r.x)), from_float(epilogue(p, sums.y, (u16)(b.x >> 16), (u16)(r.x >> 16))),
      from_float(epilogue(p, sums.z, (u16)b.y, (u16)r.y)), from_float(epilogue(p, sums.w, (u16)(b.y >> 16), (u16)(r.y >> 16))));
}

__device__ __forceinline__ void store_scalar(const Params& p, int n, int row, const float4& sums) {
  const float v[4] = {sums.x, sums.y, sums.z, sums.w};
  const size_t at = (size_t)n * p.rows + row;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (row + i < p.rows)
      p.y[at + i] = from_float(epilogue(p, v[i], p.bias ? p.bias[row + i] : (u16)0, p.residual ? p.residual[at + i] : (u16)0));
}

__device__ __forceinline__ void store_four(const Params& p, int n, int row, const float4& sums, const Addends* add = nullptr) {
  if (p.y_vector)
    store_vector(p, n, row, sums, load_addend(p, n, row, add));
  else
    store_scalar(p, n, row, sums);
}

// Floats that the sums of all warps take in shared memory.
__device__ __forceinline__ int sums_floats(const Params& p) { return WARPS_K * staged_rows(p.m) * RED_PITCH; }

// Puts a warp's accumulators where finish_and_store sums them. acc[rt][nt] is an m16n8 fragment.
__device__ __forceinline__ void collect(float* red, const Params& p, float (&acc)[ROW_TILES][N_TILES][4]) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warp_row = warp % WARPS_ROW, warp_k = warp / WARPS_ROW;
  const int group = lane >> 2, quad = lane & 3;
  const int plane = staged_rows(p.m) * RED_PITCH;
#pragma unroll
  for (int rt = 0; rt < ROW_TILES; ++rt)
#pragma unroll
    for (int nt = 0; nt < N_TILES; ++nt)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int n = nt * 8 + quad * 2 + (i & 1), row = (warp_row * ROW_TILES + rt) * 16 + group + (i >> 1) * 8;
        if (n < p.m) red[warp_k * plane + n * RED_PITCH + row] = acc[rt][nt][i];
      }
}

// Four of the sums of all k-warps.
__device__ __forceinline__ float4 add_warps(const float4* red, const Params& p, int at) {
  const int plane = staged_rows(p.m) * (RED_PITCH / 4);
  float4 sum = red[at];
#pragma unroll
  for (int k = 1; k < WARPS_K; ++k)
    add_four(sum, red[k * plane + at]);
  return sum;
}

// Adds up what the warps have collected and writes it to y, AT_ONCE fours for each thread at a time: what is added comes from afar.
template <int AT_ONCE>
__device__ __forceinline__ void store_sums(const float4* red, const Params& p, int first_row, const Addends* add) {
  constexpr int PITCH = RED_PITCH / 4, FOURS = BLOCK_ROWS / 4;
  const int count = p.m * FOURS;
  for (int first = threadIdx.x; first < count; first += AT_ONCE * THREADS) {
    Addend given[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int e = first + i * THREADS;
      if (e < count) given[i] = load_addend(p, e / FOURS, first_row + e % FOURS * 4, add);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int e = first + i * THREADS, n = e / FOURS, four = e % FOURS;
      if (e < count) store_vector(p, n, first_row + four * 4, add_warps(red, p, n * PITCH + four), given[i]);
    }
  }
}

// Adds up this block's share of what the splits, S at most, have collected and writes it to y, likewise. VECTOR: y_vector.
template <int S, int AT_ONCE, bool VECTOR>
__device__ __forceinline__ void store_splits(const float4* red, const Params& p, int first_row) {
  constexpr int PITCH = RED_PITCH / 4, FOURS = BLOCK_ROWS / 4;
  const int splits = gridDim.y, count = p.m * FOURS, step = splits * THREADS, column = blockIdx.x % CLUSTER;
  // Every thread of the cluster goes as many rounds, one at least.
  for (int first = 0; first < count; first += AT_ONCE * step) {
    const int own = first + blockIdx.y * THREADS + threadIdx.x;
    Addend given[AT_ONCE];
    float4 parts[AT_ONCE][S];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int e = own + i * step;
      if (VECTOR && e < count) given[i] = load_addend(p, e / FOURS, first_row + e % FOURS * 4, nullptr);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int e = min(own + i * step, count - 1);
      const u32 address = shared_address(red + e / FOURS * PITCH + e % FOURS);
#pragma unroll
      for (int s = 0; s < S; ++s)
        if (s < splits && first + i * step < count) parts[i][s] = cluster_read(address, s * CLUSTER + column);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
#pragma unroll
      for (int s = 1; s < S; ++s)
        if (s < splits) add_four(parts[i][0], parts[i][s]);
    // A block may not leave while others still read its shared memory.
    if (first + AT_ONCE * step >= count) cluster_arrive();
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int e = own + i * step, n = e / FOURS, row = first_row + e % FOURS * 4;
      if (e >= count) continue;
      if (VECTOR)
        store_vector(p, n, row, parts[i][0], given[i]);
      else
        store_scalar(p, n, row, parts[i][0]);
    }
    __syncwarp();
  }
  cluster_wait();
}

// Sums what the warps have collected over k-warps and cluster blocks and writes y's rows of block row `group`; every thread of the block
// calls it, after a barrier. `add` is null or holds what was copied for the group.
__device__ __forceinline__ void finish_and_store(float* sums, const Params& p, int group, const Addends* add = nullptr) {
  constexpr int PITCH = RED_PITCH / 4, FOURS = BLOCK_ROWS / 4;
  float4* red = (float4*)sums;
  const int first_row = group * BLOCK_ROWS, splits = gridDim.y, count = p.m * FOURS;
#if SUMS_AT_ONCE > 8
  if (splits == 1 && p.y_vector) {
    store_sums<SUMS_AT_ONCE / 4>(red, p, first_row, add);
    return;
  }
#endif
  if (splits == 1 || WARPS_K > 1) {
    for (int e = threadIdx.x; e < count; e += THREADS) {
      const int n = e / FOURS, four = e % FOURS;
      const float4 sum = add_warps(red, p, n * PITCH + four);
      if (splits == 1)
        store_four(p, n, first_row + four * 4, sum, add);
      else
        red[n * PITCH + four] = sum;
    }
    if (splits == 1) return;
    __syncwarp();
  }
  cluster_sync();
  if (!p.y_vector) store_splits<8, 1, false>(red, p, first_row);
#if SUMS_AT_ONCE > 8
  else if (splits <= 4)
    store_splits<4, SUMS_AT_ONCE / 4, true>(red, p, first_row);
#endif
  else
    store_splits<8, SUMS_AT_ONCE / 8, true>(red, p, first_row);
}

__device__ __forceinline__ void reduce_and_store(unsigned char* smem, const Params& p, float (&acc)[ROW_TILES][N_TILES][4],
                                                 const Addends& add) {
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  __syncthreads();
  collect((float*)smem, p, acc);
  __syncthreads();
  finish_and_store((float*)smem, p, blockIdx.x, &add);
}
