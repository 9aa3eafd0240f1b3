// Which units of which tiles a cluster of prefill_common.cuh goes through where SPLITS is 0, and how the sums of tiles that several of them
// share meet. Needs that header's macros and structures before it.
//
// As many tiles as clusters, or twice as many ..., are whole ones of a cluster each. The units of those that are left, in a line, are cut
// into equal ranges, one per cluster where that is not too many, so that no multiprocessor waits for others in a last round (stream-K,
// Osama et al. 2023, "Stream-K: Work-centric Parallel Decomposition for Dense Matrix-Matrix Multiplication on the GPU", section 5.3). These
// come first. A range is no longer than a tile, and so has the last units of one and the first of the next at most: the cluster that has a
// tile's last unit adds what others have left of it. It multiplies the tile that it leaves to another before that, and waits for clusters
// before it alone, which started earlier.
//   workspace   [blocks][CONSUMERS][M_BLOCKS * N_TILES][128 threads] of four sums: what each block has left
//   flags       [blocks][CONSUMERS], 0 before and after: 1 says that it is there
#pragma once
#include "flags.cuh"

// What a cluster has of a tile that others share: units without the last one, which are left, or with it, which others join.
struct Share {
  int tile;
  bool left, joined;
};

// Tiles and their units as a cluster takes them.
struct Ranges {
  int at, begin, rounds; // the tile at hand, and its units
  int whole;             // the next tile of the cluster's own
  u32 first, behind;     // what is left of its range

  static __device__ __forceinline__ int clusters() { return gridDim.x / CLUSTER; }
  static __device__ __forceinline__ int shared_tiles(const Params& p) { return Schedule::tiles_of(p) % clusters(); }
  // Where the range of a cluster begins, and that of the one before it ends. Units may be fewer than clusters, and the last clusters may
  // have none: who joins many shares waits longer for their sums than they take to multiply.
  static __device__ __forceinline__ u32 begin_of(const Params& p, int cluster) {
    const int shared = shared_tiles(p), ranges = max(min(clusters(), shared * p.sharers), 1);
    return (u32)(shared * p.units) * (u32)min(cluster, ranges) / ranges;
  }

  __device__ __forceinline__ Ranges(const Params& p, int, int) {
    const int own = blockIdx.x / CLUSTER;
    whole = shared_tiles(p) + own;
    first = begin_of(p, own), behind = begin_of(p, own + 1);
    advance(p);
  }

  __device__ __forceinline__ bool any(const Params& p) const { return at < Schedule::tiles_of(p); }

  __device__ __forceinline__ void advance(const Params& p) {
    if (behind > first) {
      at = (behind - 1) / (u32)p.units;
      const u32 start = at * p.units;
      begin = max(first, start) - start, rounds = behind - start - begin;
      behind = start + begin;
    } else {
      at = whole, begin = 0, rounds = p.units;
      whole += clusters();
    }
  }

  __device__ __forceinline__ void place(const Params& p, int& row, int& token) const {
    Schedule tile(p, 0, 0);
    tile.at = at;
    tile.place(p, row, token);
  }

  __device__ __forceinline__ Share share(const Params& p) const {
    const bool left = begin + rounds < p.units;
    return {at, left, !left && begin > 0};
  }
};

struct alignas(16) FourSums {
  Sum v[4];
};

// Of a block's warpgroup.
__device__ __forceinline__ uint4* sums_of(const Params& p, int block, u32 thread) {
  return (uint4*)p.workspace + ((size_t)block * CONSUMERS + (thread >> 7)) * (M_BLOCKS * N_TILES * 128) + (thread & 127);
}

// Leaves a warpgroup's sums to the cluster that has the tile's last unit.
__device__ __forceinline__ void leave_sums(const Params& p, u32 thread, const Sum (&d)[M_BLOCKS][N_TILES][4]) {
  uint4* target = sums_of(p, blockIdx.x, thread);
#pragma unroll
  for (int i = 0; i < M_BLOCKS * N_TILES; ++i) {
    const Sum(&s)[4] = d[i / N_TILES][i % N_TILES];
    const FourSums four = {{s[0], s[1], s[2], s[3]}};
    __stcg(target + i * 128, *(const uint4*)&four);
  }
  warpgroup_sync(thread);
  if ((thread & 127) == 0) store_release(p.flags + blockIdx.x * CONSUMERS + (thread >> 7), 1);
}

// Adds what the clusters before this one have left of its tile `at`. Sums pass through the warpgroup's place for those on their way to y,
// as many at a time as that holds: registers have no room for enough of them under way, and L2 is far.
__device__ __forceinline__ void add_sums(const Params& p, u32 thread, u32 staging, Sum (&d)[M_BLOCKS][N_TILES][4], int at) {
  constexpr int COUNT = M_BLOCKS * N_TILES, GROUP = 4, DEPTH = STAGING_BYTES / (GROUP * 128 * 16);
  static_assert(COUNT % GROUP == 0 && DEPTH > 0, "sums come in whole groups");
  const u32 own = staging + (thread & 127) * 16;
#if TENSOR_STORES
  if ((thread & 127) == 0) wait_stores<0>();
#endif
  for (int other = blockIdx.x / CLUSTER - 1; other >= 0 && Ranges::begin_of(p, other + 1) > (u32)(at * p.units); --other) {
    if (Ranges::begin_of(p, other) == Ranges::begin_of(p, other + 1)) continue;
    const int block = other * CLUSTER + blockIdx.x % CLUSTER;
    u32* flag = p.flags + block * CONSUMERS + (thread >> 7);
    if ((thread & 127) == 0)
      while (load_acquire(flag) == 0) {
      }
    warpgroup_sync(thread);
    const uint4* source = sums_of(p, block, thread);
    const auto fetch = [&](int group) {
      if (group < COUNT / GROUP)
#pragma unroll
        for (int i = 0; i < GROUP; ++i)
          copy_vector(own + (group % DEPTH * GROUP + i) * 2048, source + (group * GROUP + i) * 128);
      asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll
    for (int group = 0; group < DEPTH; ++group)
      fetch(group);
#pragma unroll
    for (int group = 0; group < COUNT / GROUP; ++group) {
      // A thread reads what it has copied itself.
      asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
#pragma unroll
      for (int i = 0; i < GROUP; ++i) {
        const int place = group * GROUP + i;
        u32 read[4];
        load_shared_x4(own + (group % DEPTH * GROUP + i) * 2048, read);
        const FourSums four = *(const FourSums*)&read;
#pragma unroll
        for (int j = 0; j < 4; ++j)
          d[place / N_TILES][place % N_TILES][j] += four.v[j];
      }
      fetch(group + DEPTH);
    }
    warpgroup_sync(thread);
    if ((thread & 127) == 0) *flag = 0;
  }
}
