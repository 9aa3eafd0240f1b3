// Shared parts of the decode kernels: y (m, rows) = x (m, cols) · Wᵀ for few activation rows m, W packed (rows, cols).
//
// W is operand A of the tensor-core instructions, so a warp computes yᵀ: row tiles of 16 weight rows by n-tiles of 8
// activation rows. Compile-time macros, set by the host:
//   ELEM_BF16    1 for bfloat16, 0 for float16 (weights, x, bias, residual and y alike; sums are float32)
//   N_TILES      n-tiles of 8 activation rows held by every warp: m <= 8 * N_TILES
//   ROW_TILES    row tiles of 16 held by every warp
//   WARPS_ROW, WARPS_K   warps of a block along rows and along the columns
//   PARTS        N:M: warps (1, 2 or 4) that share a unit of 256 columns, divides WARPS_K; unstructured: units are 256 / PARTS columns,
//                as they are of all patterns where a source has SMALL_UNITS
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

#include "cluster.cuh"
#include "dependent.cuh"
#include "fragments.cuh"

// Columns that a warp takes at a time. UNSTRUCTURED and SMALL_UNITS are set by the source that includes this file.
#if UNSTRUCTURED || SMALL_UNITS
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

// Four rows of the product for activation row n, of which those from p.rows on are padding; `add` is null or holds what was copied.
__device__ __forceinline__ void store_four(const Params& p, int n, int row, const float4& sums, const Addends* add = nullptr) {
  const float v[4] = {sums.x, sums.y, sums.z, sums.w};
  const size_t at = (size_t)n * p.rows + row;
  if (p.y_vector) {
    if (row >= p.rows) return;
    ushort4 bias = make_ushort4(0, 0, 0, 0), residual = bias;
    if (add && adds_alone(p)) {
      bias = add->bias[threadIdx.x];
      residual = add->residual[threadIdx.x];
    } else {
      if (p.bias) bias = *(const ushort4*)(p.bias + row);
      if (p.residual) residual = *(const ushort4*)(p.residual + at);
    }
    *(ushort4*)(p.y + at) =
        make_ushort4(from_float(epilogue(p, v[0], bias.x, residual.x)), from_float(epilogue(p, v[1], bias.y, residual.y)),
                     from_float(epilogue(p, v[2], bias.z, residual.z)), from_float(epilogue(p, v[3], bias.w, residual.w)));
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (row + i < p.rows)
      p.y[at + i] = from_float(epilogue(p, v[i], p.bias ? p.bias[row + i] : (u16)0, p.residual ? p.residual[at + i] : (u16)0));
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

// Sums what the warps have collected over k-warps and cluster blocks and writes y's rows of block row `group`; every thread of the block
// calls it, after a barrier. `add` is null or holds what was copied for the group.
__device__ __forceinline__ void finish_and_store(float* sums, const Params& p, int group, const Addends* add = nullptr) {
  constexpr int PITCH = RED_PITCH / 4, FOURS = BLOCK_ROWS / 4;
  float4* red = (float4*)sums;
  const int plane = staged_rows(p.m) * PITCH, first_row = group * BLOCK_ROWS, splits = gridDim.y, rank = blockIdx.y;
  if (splits == 1 || WARPS_K > 1) {
    for (int e = threadIdx.x; e < p.m * FOURS; e += THREADS) {
      const int n = e / FOURS, four = e % FOURS;
      float4 sum = red[n * PITCH + four];
#pragma unroll
      for (int k = 1; k < WARPS_K; ++k)
        add_four(sum, red[k * plane + n * PITCH + four]);
      if (splits == 1)
        store_four(p, n, first_row + four * 4, sum, add);
      else
        red[n * PITCH + four] = sum;
    }
    if (splits == 1) return;
  }
  cluster_sync();
  for (int e = rank * THREADS + threadIdx.x; e < p.m * FOURS; e += splits * THREADS) {
    const int n = e / FOURS, four = e % FOURS;
    const u32 address = shared_address(red + n * PITCH + four);
    // Of all blocks at once: each read takes its time, and a cluster has eight blocks at most.
    float4 parts[8];
#pragma unroll
    for (int s = 0; s < 8; ++s)
      if (s < splits) parts[s] = cluster_read(address, s);
    float4 sum = parts[0];
#pragma unroll
    for (int s = 1; s < 8; ++s)
      if (s < splits) add_four(sum, parts[s]);
    store_four(p, n, first_row + four * 4, sum);
  }
  // A block may not leave while others still read its shared memory.
  cluster_sync();
}

__device__ __forceinline__ void reduce_and_store(unsigned char* smem, const Params& p, float (&acc)[ROW_TILES][N_TILES][4],
                                                 const Addends& add) {
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  __syncthreads();
  collect((float*)smem, p, acc);
  __syncthreads();
  finish_and_store((float*)smem, p, blockIdx.x, &add);
}
