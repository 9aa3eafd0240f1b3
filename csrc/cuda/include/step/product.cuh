// The block's row tiles of a product, multiplied from the ring by the workspace's activations.
#pragma once
#include "step/ring.cuh"
#include "values.cuh"
#include "step/words.cuh"
#include "step/workspace.cuh"
#include "expand.cuh"
#include "mma_sparse.cuh"
#include "warp.cuh"

// Sums of 16 rows over a unit's columns, or one of its halves, in column 0 of an m16n8 fragment.
template <int PARTS>
__device__ __forceinline__ void multiply_slot(u32 slot, int part, u32 x, u32 zeros, float (&sum)[4]) {
  constexpr int STEPS = 8 / PARTS;
  const int lane = threadIdx.x & 31;
  u32 positions[4 / PARTS];
  uint4 values[STEPS];
  if constexpr (PARTS == 1) {
    const uint4 v = read_shared(slot + lane * 16);
    positions[0] = v.x;
    positions[1] = v.y;
    positions[2] = v.z;
    positions[3] = v.w;
  } else {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(positions[0]), "=r"(positions[1]) : "r"(slot + lane * 16 + part * 8) : "memory");
  }
#pragma unroll
  for (int s = 0; s < STEPS; ++s)
    values[s] = read_shared(slot + (1 + part * STEPS + s) * 512 + lane * 16);
  float other[4] = {};
#if PATTERN == 24
  const bool live = (lane & 7) == 0;
  const u32 first = live ? x + part * STEPS * 64 + (lane >> 3) * 16 : zeros, step = live ? 64 : 0;
#else
  const Tables tables = make_tables(lane);
  const bool live = lane < 4;
  const u32 first = live ? x + part * STEPS * 64 + lane * 16 : zeros, step = live ? 64 : 0;
#endif
#pragma unroll
  for (int begin = 0; begin < STEPS; begin += 4) {
    u32 b[4][4];
#pragma unroll
    for (int s = 0; s < 4; ++s)
#if PATTERN == 24
      ldmatrix_x4(first + (begin + s) * step, b[s]);
#else
      load_shared_x4(first + (begin + s) * step, b[s]);
#endif
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      float (&acc)[4] = s % 2 ? other : sum;
      const uint4& v = values[begin + s];
      const u32 at = positions[(begin + s) / 2];
#if PATTERN == 24
      if (s % 2 == 0)
        mma_sparse<0>(acc, v, b[s], at);
      else
        mma_sparse<1>(acc, v, b[s], at);
#else
      u32 a[8];
      expand_step(v, at, s % 2 * 16, tables, a);
      mma_dense(acc, a[0], a[1], a[2], a[3], b[s][0], b[s][1]);
      mma_dense(acc, a[4], a[5], a[6], a[7], b[s][2], b[s][3]);
#endif
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    sum[i] += other[i];
}

template <int PARTS>
__device__ __forceinline__ void multiply(const Ring& ring, Workspace& w, u32 first, int slots, int units) {
  const int lane = threadIdx.x & 31;
#pragma unroll 1
  for (int job = threadIdx.x >> 5; job < slots * PARTS; job += WARPS) {
    const u32 slot = first + job / PARTS;
    float sum[4] = {};
    multiply_slot<PARTS>(ring.take(slot, first), job % PARTS, w.x + job / PARTS % units * 512, w.x - ZERO, sum);
    ring.release(slot, 2 / PARTS);
    if (lane % 4 == 0) {
      w.sums[job * 16 + lane / 4] = sum[0];
      w.sums[job * 16 + 8 + lane / 4] = sum[2];
    }
  }
}

// What a product adds to the sums of its row `lane % 16`.
struct Addends {
  float bias, residual;
};

// Multiplies the workspace's activations by the block's tiles and publishes the rows. Warp i calls it
// with the addends of the block's i-th tile.
__device__ __forceinline__ void multiply_and_publish(const Ring& ring, Workspace& w, Cursor& cursor, int first, int count, int units,
                                                     bool relu, const Addends& add, u32* target) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, slots = count * units;
  const int halves = 2 * slots <= WARPS ? 2 : 1;
  if (halves == 2)
    multiply<2>(ring, w, cursor.slot, slots, units);
  else
    multiply<1>(ring, w, cursor.slot, slots, units);
  cursor.slot += slots;
  workers_sync();
  if (warp < count) {
    const int jobs = units * halves;
    const float* sums = w.sums + warp * jobs * 16 + (lane & 15);
    float sum = 0;
#pragma unroll 4
    for (int j = lane >> 4; j < jobs; j += 2)
      sum += sums[j * 16];
    sum += __shfl_xor_sync(ALL, sum, 16);
    sum += add.bias;
    if (relu) sum = fmaxf(sum, 0.0f);
    sum += add.residual;
    const u32 pair = pack_two(sum, __shfl_down_sync(ALL, sum, 1));
    const u32 word = __shfl_sync(ALL, pair, (lane & 7) * 2);
    if (lane < 8) publish(target + (first + warp * (int)gridDim.x) * 8 + lane, word);
  }
  note(w, 1);
}

// Row that a lane of warp i finishes in the block's i-th tile.
__device__ __forceinline__ int row_of(int first) { return (first + (int)(threadIdx.x >> 5) * (int)gridDim.x) * 16 + (threadIdx.x & 15); }

__device__ __forceinline__ Addends addends(const u16* bias, int first, int count) {
  return {(int)(threadIdx.x >> 5) < count ? to_float(bias[row_of(first)]) : 0.0f, 0.0f};
}
