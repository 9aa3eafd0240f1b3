// The units of W that one consumer warp of prefill_common.cuh goes through, tile after tile, when it fetches them for itself. Needs that
// header before it.
#pragma once

struct Sequence {
  Tiles tiles;
  size_t unit;
  int fragment, left;
  bool any;

  // `fragment` is the warp's row tile of every tile of the block.
  __device__ __forceinline__ Sequence(const Params& p, int fragment, int begin, int rounds) : tiles(p, begin, rounds), fragment(fragment) {
    enter(p);
  }

  __device__ __forceinline__ void enter(const Params& p) {
    any = tiles.any(p);
    if (!any) return;
    int row, token;
    tiles.place(p, row, token);
    // Tiles behind the last row read the last tile again; their sums are not stored.
    unit = (size_t)min(row / 16 + fragment, (p.rows + 15) / 16 - 1) * p.units + tiles.begin;
    left = tiles.rounds;
  }

  __device__ __forceinline__ void advance(const Params& p) {
    ++unit;
    if (--left != 0) return;
    tiles.advance(p);
    enter(p);
  }
};

// Blocks of other activation rows read the weights again.
__device__ __forceinline__ u64 shared_weight_policy() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
