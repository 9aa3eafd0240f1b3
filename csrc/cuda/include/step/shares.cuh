// What of each phase falls to a block: row tiles of a product, and a part of a head's attention.
#pragma once
#include "step/model.cuh"

// What both kinds of warps follow in step: the block's share of each phase, and how many slots it has used.
struct Cursor {
  u32 slot;
  int start; // the block that has the next phase's first tile

  // The block's first one of `tiles`, which are dealt to blocks in turn, and how many it has.
  __device__ __forceinline__ int deal(int tiles, int& count) {
    const int blocks = (int)gridDim.x;
    int first = (int)blockIdx.x - start;
    if (first < 0) first += blocks;
    count = first < tiles ? (tiles - first + blocks - 1) / blocks : 0;
    start = (start + tiles) % blocks;
    return first;
  }
};

struct Attention {
  int count, parts; // positions in use, and parts that share them
};

__device__ __forceinline__ Attention attention_of(int length, int capacity) {
  const int count = min(length, capacity);
  return {count, max(1, min(MAX_PARTS, (count + PART_POSITIONS - 1) / PART_POSITIONS))};
}

struct Range {
  int begin, end;
};

__device__ __forceinline__ Range range_of(const Attention& a, int part) {
  const int share = (a.count + a.parts - 1) / a.parts, begin = min(part * share, a.count);
  return {begin, min(begin + share, a.count)};
}
