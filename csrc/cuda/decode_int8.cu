// y (m, rows) = x (m, cols) · (scales ⊙ W)ᵀ for int8 W (rows, cols), row-major, and few activation rows: the output head.
//
//   warp:  a row tile of 16; lane (g, t) reads columns 64s + 16t .. + 15 of rows g and g + 8 in step s. The columns' order within a step is
//          free as long as x follows, so that they are operand A of four m16n8k16 products.
//   block: WARPS tiles at a time, round robin, with all of x in shared memory
//
// Macros: ELEM_BF16; N_TILES, activation rows in eights.
#include "dependent.cuh"
#include "fragments.cuh"
#include "expand.cuh"

#define WARPS 8
#define THREADS (32 * WARPS)
// Steps of 64 columns that a warp has in flight.
#define AHEAD 4

struct Params {
  const unsigned char* weight; // (rows, cols)
  const float* scales;         // (rows,)
  const u16* x;                // (m, cols), contiguous, 16-byte aligned
  u16* y;                      // (m, rows)
  int m, rows, cols;           // cols a multiple of 64
};

// Two signed bytes of `word`, picked by `selector` into the low bytes of its halves, as 16-bit floats.
__device__ __forceinline__ u32 widen(u32 word, u32 selector) {
  const u32 bytes = permute(word, selector);
  u32 v;
#if ELEM_BF16
  // With the exponent of 128, seven bits count ones; the eighth says that 256 is to be taken off instead of 128.
  const u32 magnitude = (bytes & 0x007f007fu) | 0x43004300u, offset = (bytes & 0x00800080u) | 0x43004300u;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(v) : "r"(magnitude), "r"(offset));
#else
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(v) : "r"((bytes ^ 0x00800080u) | 0x64006400u), "r"(0x64806480u));
#endif
  return v;
}

extern "C" __global__ void __launch_bounds__(THREADS) decode_int8(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) unsigned char smem[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int tiles = (p.rows + 15) / 16, steps = p.cols / 64;
  const int pitch = p.cols * 2 + 16; // two rows of a step lie in different banks
  const u64 policy = weight_policy();
  int tile = blockIdx.x * WARPS + warp;
  uint4 low[AHEAD], high[AHEAD];
  const unsigned char *at_low, *at_high;
  // Rows behind the last read the last one again; their sums are not stored.
  auto begin = [&](int tile) {
    at_low = p.weight + (size_t)min(tile * 16 + g, p.rows - 1) * p.cols + t * 16;
    at_high = p.weight + (size_t)min(tile * 16 + 8 + g, p.rows - 1) * p.cols + t * 16;
#pragma unroll
    for (int s = 0; s < AHEAD; ++s)
      if (s < steps) {
        low[s] = load_weight((const uint4*)(at_low + s * 64), policy);
        high[s] = load_weight((const uint4*)(at_high + s * 64), policy);
      }
  };
  if (tile < tiles) begin(tile);
  release_successor();
  wait_predecessor();
  for (int i = threadIdx.x; i < 8 * N_TILES * (p.cols / 8); i += THREADS) {
    const int row = i / (p.cols / 8), chunk = i % (p.cols / 8);
    *(uint4*)(smem + row * pitch + chunk * 16) =
        row < p.m ? ((const uint4*)p.x)[(size_t)row * (p.cols / 8) + chunk] : make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
  const u32 x = shared_address(smem) + g * pitch + t * 32;
  for (; tile < tiles; tile += gridDim.x * WARPS) {
    const int row = tile * 16 + g;
    const float scale_low = row < p.rows ? p.scales[row] : 0, scale_high = row + 8 < p.rows ? p.scales[row + 8] : 0;
    float acc[N_TILES][4] = {};
    for (int first = 0; first < steps; first += AHEAD)
#pragma unroll
      for (int s = 0; s < AHEAD; ++s) {
        const int step = first + s;
        if (step >= steps) break;
        const u32 words[2][4] = {{low[s].x, low[s].y, low[s].z, low[s].w}, {high[s].x, high[s].y, high[s].z, high[s].w}};
        if (step + AHEAD < steps) {
          low[s] = load_weight((const uint4*)(at_low + (step + AHEAD) * 64), policy);
          high[s] = load_weight((const uint4*)(at_high + (step + AHEAD) * 64), policy);
        }
        u32 a[4][4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            a[j][i] = widen(words[i & 1][j], i < 2 ? 0x4140 : 0x4342);
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
          u32 b[2][4];
          load_shared_x4(x + n * 8 * pitch + step * 128, b[0]);
          load_shared_x4(x + n * 8 * pitch + step * 128 + 16, b[1]);
#pragma unroll
          for (int j = 0; j < 4; ++j)
            mma_dense(acc[n], a[j][0], a[j][1], a[j][2], a[j][3], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    if (tile + (int)gridDim.x * WARPS < tiles) begin(tile + gridDim.x * WARPS);
#pragma unroll
    for (int n = 0; n < N_TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = n * 8 + t * 2 + (i & 1), at = row + (i >> 1) * 8;
        if (column < p.m && at < p.rows) p.y[(size_t)column * p.rows + at] = from_float(acc[n][i] * (i < 2 ? scale_low : scale_high));
      }
  }
}
