// How the sums of a tile of prefill_common.cuh become e4m3 levels behind a ReLU, which the next product multiplies: with scales of the
// activation rows that were known before there was a sum, of which y_times are the inverses. Needs that header's macros and structures
// before it.
//
// Tensor stores bring chunks of [CHUNK_TOKENS][64 rows] bytes to y, whose 16-byte pieces are exchanged by half the row modulo 4.
#pragma once

#if VALUES != 1 || SPLITS > 1 || !TENSOR_STORES
#error "levels are left of e4m3 sums that one block has, by tensor stores"
#endif

// Two levels, the first in the lower byte.
__device__ __forceinline__ u32 relu_levels(float2 v, float2 times) {
  u16 pair;
  asm("cvt.rn.satfinite.relu.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(v.y * times.y), "f"(v.x * times.x));
  return pair;
}

// Four levels of one activation row from those of two activation rows 2q and 2q + 1 and two weight rows g and g + 8 that each lane (g, q)
// has: lanes whose g differ by one exchange activation rows, those whose g differ by two weight rows.
__device__ __forceinline__ u32 transpose_levels(u32 own, int lane) {
  const u32 near = __shfl_xor_sync(0xffffffffu, own, 4);
  own = __byte_perm(own, near, lane & 4 ? 0x3715 : 0x6240);
  const u32 far = __shfl_xor_sync(0xffffffffu, own, 8);
  return __byte_perm(own, far, lane & 8 ? 0x3276 : 0x5410);
}

// As store_tile.
__device__ __forceinline__ void store_levels(const Params& p, u32 thread, u32 staging, const Sum (&d)[M_BLOCKS][N_TILES][4],
                                             const Bias& bias, int row, int token) {
  constexpr int TURNS = BLOCK_CHUNKS / LEAVING, PLACES = STORES / LEAVING, TURN_TOKENS = LEAVING * CHUNK_TOKENS;
  const int lane = thread & 31, warp = thread >> 5 & 3, g = lane >> 2, q = lane & 3;
  // Where the lane's four levels of an n-tile belong in a chunk.
  const u32 at = (2 * q + (g & 1)) * 64 + (warp ^ q) * 16 + ((g >> 1 & 1) * 2 + (g >> 2)) * 4;
  if ((thread & 127) == 0) wait_stores<0>();
  warpgroup_sync(thread);
#pragma unroll
  for (int mb = 0; mb < M_BLOCKS; ++mb) {
    const int first = row + mb * 64;
    if (first >= p.rows) return;
    const Scales scales(p, first + warp * 16 + g);
#pragma unroll
    for (int within = 0; within < TURNS; ++within) {
      const int turn = mb * TURNS + within, begin = token + within * TURN_TOKENS;
      const u32 place = staging + turn % PLACES * (TURN_TOKENS * 64);
      // What was there has left.
      if (turn >= PLACES) {
        if ((thread & 127) == 0) wait_stores<PLACES - 1>();
        warpgroup_sync(thread);
      }
#pragma unroll
      for (int i = 0; i < TURN_TOKENS / 8; ++i) {
        const int nt = within * (TURN_TOKENS / 8) + i, here = token + nt * 8;
        const float2 times = *(const float2*)(p.y_times + here + q * 2);
        u32 levels = 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float2 sums = scales.apply(p, d[mb][nt], half, here);
          sums.x += bias.values[mb][half], sums.y += bias.values[mb][half];
          levels |= relu_levels(sums, times) << 16 * half;
        }
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(place + i * 512 + at), "r"(transpose_levels(levels, lane)) : "memory");
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      warpgroup_sync(thread);
      if ((thread & 127) == 0) {
        // Groups of stores are counted in turns, also behind the last activation row.
        if (begin < p.m) tensor_store(p.y_map, place, first, begin);
        commit_stores();
      }
    }
  }
}
