// Lays activations out for decode_stream.cu and, of weights that are expanded, decode_wgmma.cu: x (m, cols), row stride ldx elements,
// becomes buffers that bulk copies fetch as they are.
//
//   image  [units subtiles of 64 columns][ROWS][128 bytes], ROWS = 8 * N_TILES; 16-byte chunk c of a row lies at place
//          c ^ (row % 8), as wgmma expects it; columns from `cols` on are zero, rows from m on are left as they are
//   EXPANDED 0: chunk c holds columns 8c .. 8c + 7
//   EXPANDED 1: of each step of 32 columns, column 8t + 2j + e lies at place 8j + 2t + e: lane t of a quad holds columns 8t .. 8t + 7 of
//          W, but operand A takes columns 2t, 2t + 1, 2t + 8 and 2t + 9 from it
//
// One thread writes one chunk. The kernel's flags, `rows` words behind the image, are cleared as well.
#define ROW_TILES 1
#define WARPS_ROW 8
#define WARPS_K 1
#define PARTS 1
#define STAGES 2
#define X_PAD 0
#include "decode_common.cuh"

__device__ __forceinline__ u32 load_pair(const Params& p, const u16* row, int c) {
  if (p.x_vector) return c < p.cols ? *(const u32*)(row + c) : 0;
  const u32 low = c < p.cols ? row[c] : 0, high = c + 1 < p.cols ? row[c + 1] : 0;
  return low | high << 16;
}

extern "C" __global__ void __launch_bounds__(THREADS) arrange(const __grid_constant__ Params p) {
  release_successor();
  // y is the image; a unit is one subtile of 64 columns.
  const int i = blockIdx.x * THREADS + threadIdx.x, chunk = i & 7, row = (i >> 3) % p.m, subtile = (i >> 3) / p.m;
  wait_predecessor();
  u32* flags = (u32*)((unsigned char*)p.y + (size_t)p.units * (8 * N_TILES) * 128);
  for (int j = i; j < p.rows; j += gridDim.x * THREADS)
    flags[j] = 0;
  if (subtile >= p.units) return;
  const u16* source = p.x + (size_t)row * p.ldx;
  u32 words[4];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
#if EXPANDED
    const int c = subtile * 64 + (chunk >> 2) * 32 + 8 * t + (chunk & 3) * 2;
#else
    const int c = subtile * 64 + chunk * 8 + t * 2;
#endif
    words[t] = load_pair(p, source, c);
  }
  unsigned char* target = (unsigned char*)p.y + ((size_t)subtile * (8 * N_TILES) + row) * 128 + ((chunk ^ (row & 7)) << 4);
  *(uint4*)target = make_uint4(words[0], words[1], words[2], words[3]);
}
