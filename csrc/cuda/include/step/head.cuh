// The output head: a block's logits, and the largest of them.
#pragma once
#include "step/ring.cuh"
#include "values.cuh"
#include "step/workspace.cuh"
#include "best.cuh"
#include "warp.cuh"

// Logits of the block's rows, and the best of those that the warp has had.
__device__ __forceinline__ Best score_rows(const Params& p, const Ring& ring, Workspace& w, Cursor& cursor) {
  const int lane = threadIdx.x & 31;
  const int groups = (p.vocabulary + SLOT_ROWS - 1) / SLOT_ROWS;
  const int begin = (int)((long long)groups * blockIdx.x / gridDim.x), end = (int)((long long)groups * (blockIdx.x + 1) / gridDim.x);
  Best best = {0, 0xffffffffu};
  if ((threadIdx.x >> 5) >= HEAD_WARPS) return best;
  for (int group = begin + (threadIdx.x >> 5); group < end; group += HEAD_WARPS) {
    float sum[SLOT_ROWS] = {};
    float factor = 1.0f;
#if HEAD_INT8
    if (lane < SLOT_ROWS && group * SLOT_ROWS + lane < p.vocabulary) factor = p.head_scales[group * SLOT_ROWS + lane];
#endif
#pragma unroll
    for (int piece = 0; piece < ROW_SLOTS; ++piece) {
      const u32 slot = cursor.slot + (group - begin) * ROW_SLOTS + piece, at = ring.take(slot, cursor.slot);
      constexpr int EIGHTS = HIDDEN / 8 / ROW_SLOTS;
#pragma unroll 4
      for (int v = lane; v < EIGHTS; v += 32) {
        float x[8];
        unpack(read_shared(w.x + (piece * EIGHTS + v) * 16), x);
#pragma unroll
        for (int r = 0; r < SLOT_ROWS; ++r) {
#if HEAD_INT8
          u32 word[2];
          asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "r"(at + r * PIECE_BYTES + v * 8) : "memory");
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            // A byte below the exponent of 2^23 is a number once the offset is taken off again.
            const u32 bits = __byte_perm(word[i / 4] ^ 0x80808080u, 0x4b000000u, 0x7540 + i % 4);
            sum[r] += (__uint_as_float(bits) - 8388736.0f) * x[i];
          }
#else
          float f[8];
          unpack(read_shared(at + r * PIECE_BYTES + v * 16), f);
#pragma unroll
          for (int i = 0; i < 8; ++i)
            sum[r] += f[i] * x[i];
#endif
        }
      }
      ring.release(slot, 2);
    }
#pragma unroll
    for (int r = 0; r < SLOT_ROWS; ++r) {
      const int row = group * SLOT_ROWS + r;
      const float total = warp_sum(sum[r]) * (HEAD_INT8 ? __shfl_sync(ALL, factor, r) : 1.0f);
      const u16 logit = from_float(total);
      if (row < p.vocabulary) {
        take(best, to_float(logit), row);
        if (lane == 0) p.logits[row] = logit;
      }
    }
  }
  return best;
}

__device__ __forceinline__ u64 larger(u64 a, u64 b) { return a > b ? a : b; }

__device__ __forceinline__ u64 largest_of_warp(u64 v) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1)
    v = larger(v, __shfl_xor_sync(ALL, v, offset));
  return v;
}
