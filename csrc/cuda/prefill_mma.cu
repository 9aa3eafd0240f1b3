// y = x · Wᵀ for 2:4 weights and many activation rows on Ampere and newer (sm_80): mma.sp over stages that cp.async fetches.
//
// `weight` is the layout of decode_nm.cu, x (m, cols) with 16-byte aligned rows, cols a multiple of 8. Beside the macros of
// decode_common.cuh, of which N_TILES and ROW_TILES are a warp's:
//   WARPS_N      warps of a block along the activation rows
//
//            BLOCK_TOKENS                        a stage, 64 columns: x [BLOCK_TOKENS][128 bytes], 16-byte chunks exchanged by the row
//        +-----------+-----------+               modulo 8; W [BLOCK_ROWS / 16][2 steps][32 lanes][16 bytes] and a word of positions for
//   rows | warp 0, 0 | warp 0, 1 | ...           each lane, as they lie in memory
//        +-----------+-----------+               STAGES - 1 stages are on their way while one is multiplied
//        | warp 1, 0 | warp 1, 1 |               blocks: along the rows within a band of BAND_TILES token tiles, which then stay in L2
//        +-----------+-----------+
#define PATTERN 24
#define X_PAD 0
#define PARTS 1
#define WARPS_K WARPS_N // THREADS counts all warps
#include "decode_common.cuh"
#include "mma_sparse.cuh"

#define BLOCK_TOKENS (8 * N_TILES * WARPS_N)
#define BAND_TILES 8
#define ROW_TILES_OF_BLOCK (BLOCK_ROWS / 16)
#define X_BYTES (BLOCK_TOKENS * 128)
#define W_BYTES (ROW_TILES_OF_BLOCK * 1024)
#define STAGE_BYTES (X_BYTES + W_BYTES + ROW_TILES_OF_BLOCK * 128)
// Sums on their way to y, two buffers of eight activation rows for each of the WARPS_N.
#define SUMS_ROWS (8 * WARPS_N)

__device__ __forceinline__ void copy_16(u32 target, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_4(u32 target, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target), "l"(source) : "memory");
}

// Starts copying columns [64 * k, 64 * k + 64) of the block's activations and weights to `stage`.
__device__ __forceinline__ void fetch(const Params& p, u32 stage, int first_tile, int token, int k) {
#pragma unroll
  for (int i = threadIdx.x; i < BLOCK_TOKENS * 8; i += THREADS) {
    const int row = i >> 3, chunk = i & 7, n = token + row, c = k * 64 + chunk * 8;
    const bool inside = n < p.m && c < p.cols;
    copy_16(stage + row * 128 + ((chunk ^ row) & 7) * 16, inside ? p.x + (size_t)n * p.ldx + c : p.x, inside ? 16 : 0);
  }
  const int last_tile = (p.rows + 15) / 16 - 1;
#pragma unroll
  for (int i = threadIdx.x; i < ROW_TILES_OF_BLOCK * 64; i += THREADS) {
    // Tiles behind the last row read the last tile again; their sums are not stored.
    const int tile = min(first_tile + i / 64, last_tile);
    const uint4* unit = p.weight + ((size_t)tile * p.units + k / 4) * (9 * 32);
    copy_16(stage + X_BYTES + i * 16, unit + (1 + k % 4 * 2) * 32 + i % 64, 16);
  }
#pragma unroll
  for (int i = threadIdx.x; i < ROW_TILES_OF_BLOCK * 32; i += THREADS) {
    const int tile = min(first_tile + i / 32, last_tile);
    const uint4* unit = p.weight + ((size_t)tile * p.units + k / 4) * (9 * 32);
    copy_4(stage + X_BYTES + W_BYTES + i * 4, (const u32*)(unit + i % 32) + k % 4);
  }
}

template <int STEP>
__device__ __forceinline__ void multiply(float (&acc)[ROW_TILES][N_TILES][4], u32 x, u32 w, const u32 (&positions)[ROW_TILES]) {
  uint4 a[ROW_TILES];
#pragma unroll
  for (int rt = 0; rt < ROW_TILES; ++rt) {
    u32 v[4];
    load_shared_x4(w + (rt * 2 + STEP) * 512, v);
    a[rt] = make_uint4(v[0], v[1], v[2], v[3]);
  }
#pragma unroll
  for (int nt = 0; nt < N_TILES; ++nt) {
    u32 b[4];
    ldmatrix_x4(x + nt * (8 * 128), b);
#pragma unroll
    for (int rt = 0; rt < ROW_TILES; ++rt)
      mma_sparse<STEP>(acc[rt][nt], a[rt], b, positions[rt]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) prefill_mma(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char smem[];
  const u32 base = shared_address(smem);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warp_row = warp % WARPS_ROW, warp_n = warp / WARPS_ROW;
  const int row_groups = (p.rows + BLOCK_ROWS - 1) / BLOCK_ROWS, token_tiles = (p.m + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
  const int first = blockIdx.x / (BAND_TILES * row_groups) * BAND_TILES, width = min(BAND_TILES, token_tiles - first);
  const int within = blockIdx.x - first * row_groups;
  const int token = (first + within % width) * BLOCK_TOKENS, row = within / width * BLOCK_ROWS;
  const int count = (p.cols + 63) / 64;

  release_successor();
  wait_predecessor();
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < count) fetch(p, base + s * STAGE_BYTES, row / 16, token, s);
    commit_stage();
  }
  // Of the four matrices of 8 columns of a step: the activation row and the chunk that the lane gives the address of.
  const u32 x_row = base + (warp_n * (8 * N_TILES) + (lane & 7)) * 128;
  const u32 x_chunks[2] = {((lane >> 3) ^ (lane & 7)) * 16u, ((4 + (lane >> 3)) ^ (lane & 7)) * 16u};
  const u32 w_lane = base + X_BYTES + warp_row * ROW_TILES * 1024 + lane * 16;
  const u32 positions_lane = base + X_BYTES + W_BYTES + warp_row * ROW_TILES * 128 + lane * 4;
  float acc[ROW_TILES][N_TILES][4] = {};
  for (int k = 0, slot = 0; k < count; ++k, slot = slot + 1 == STAGES ? 0 : slot + 1) {
    wait_stage();
    __syncthreads();
    if (k + STAGES - 1 < count) fetch(p, base + (slot == 0 ? STAGES - 1 : slot - 1) * STAGE_BYTES, row / 16, token, k + STAGES - 1);
    commit_stage();
    const u32 stage = slot * STAGE_BYTES;
    u32 positions[ROW_TILES];
#pragma unroll
    for (int rt = 0; rt < ROW_TILES; ++rt)
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(positions[rt]) : "r"(positions_lane + stage + rt * 128) : "memory");
    multiply<0>(acc, x_row + x_chunks[0] + stage, w_lane + stage, positions);
    multiply<1>(acc, x_row + x_chunks[1] + stage, w_lane + stage, positions);
  }

  wait_copies();
  __syncthreads();
  float* sums = (float*)smem;
#pragma unroll
  for (int nt = 0; nt < N_TILES; ++nt) {
    float* buffer = sums + nt % 2 * (SUMS_ROWS * RED_PITCH);
#pragma unroll
    for (int rt = 0; rt < ROW_TILES; ++rt)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        buffer[(warp_n * 8 + (lane & 3) * 2 + (i & 1)) * RED_PITCH + (warp_row * ROW_TILES + rt) * 16 + (lane >> 2) + (i >> 1) * 8] =
            acc[rt][nt][i];
    __syncthreads();
    for (int e = threadIdx.x; e < SUMS_ROWS * (BLOCK_ROWS / 4); e += THREADS) {
      const int which = e / (BLOCK_ROWS / 4), four = e % (BLOCK_ROWS / 4) * 4, n = token + which / 8 * (8 * N_TILES) + nt * 8 + which % 8;
      if (n < p.m) store_four(p, n, row + four, *(const float4*)(buffer + which * RED_PITCH + four));
    }
  }
}
