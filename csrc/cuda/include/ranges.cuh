// Which units a cluster of decode_stream.cu goes through, and what becomes of its sums. Needs decode_common.cuh and store.cuh before it.
//
// All units of all row groups, in a line, are cut into equal ranges, one per cluster, so that no multiprocessor waits for others at the
// end (stream-K, Osama et al. 2023, "Stream-K: Work-centric Parallel Decomposition for Dense Matrix-Matrix Multiplication on the GPU").
// Where a row group is cut, the cluster that has its last unit adds the others' sums. A cluster goes through its row groups from the last
// to the first, so that the sums another one needs come first, and only waits for clusters before it, which started earlier.
//   workspace behind the image of x: a flag for each warp of the grid, cleared by arrange.cu, then its sums [N_TILES][32 lanes] float4
#pragma once
#include "flags.cuh"

// The blocks of a cluster meet; what they wrote is not promised to be seen.
__device__ __forceinline__ void meet() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ int block_rank() { return CLUSTER == 1 ? 0 : (int)(blockIdx.x % CLUSTER); }
__device__ __forceinline__ int cluster_index() { return blockIdx.x / CLUSTER; }

// Units [first, last) of a row group, which is CLUSTER * BLOCK_ROWS rows.
struct Segment {
  int group, first, last;
};

// Of the whole product, in units of all row groups; there are less than 2^32 of them times the clusters.
__device__ __forceinline__ u32 total_units(const Params& p) {
  return (u32)(p.rows + CLUSTER * BLOCK_ROWS - 1) / (CLUSTER * BLOCK_ROWS) * p.units;
}

// A range as segments, from the last to the first.
struct Range {
  u32 begin, end;

  __device__ __forceinline__ bool next(const Params& p, Segment& segment) {
    if (end <= begin) return false;
    segment.group = (end - 1) / (u32)p.units;
    const u32 start = segment.group * p.units;
    segment.first = max(begin, start) - start;
    segment.last = end - start;
    end = start + segment.first;
    return true;
  }
};

__device__ __forceinline__ Range own_range(const Params& p) {
  const u32 total = total_units(p), clusters = gridDim.x / CLUSTER, index = cluster_index();
  return {total * index / clusters, total * (index + 1) / clusters};
}

// Row tile of a warp in a row group; behind the last row it is the last tile again, whose sums are not stored twice.
__device__ __forceinline__ int row_tile(int group, int warp) { return (group * CLUSTER + block_rank()) * WARPS_ROW + warp; }

// The units of one warp, segment after segment.
struct Sequence {
  size_t unit;
  Range rest;
  Segment now;
  bool any;

  __device__ __forceinline__ void enter(const Params& p) {
    any = rest.next(p, now);
    if (any) unit = (size_t)min(row_tile(now.group, threadIdx.x >> 5), (p.rows + 15) / 16 - 1) * p.units + now.first;
  }

  __device__ __forceinline__ void advance(const Params& p) {
    ++unit;
    if (++now.first == now.last) enter(p);
  }
};

// Makes y of a warp's sums over a segment, or a part that another cluster adds to its own.
__device__ __forceinline__ void finish_segment(const Params& p, float (&d)[N_TILES][4], const Segment& segment) {
  constexpr int PITCH = N_TILES * 32, STEP = CLUSTER * WARPS_ROW; // float4 of a warp, warps of a cluster
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const size_t image_bytes = (size_t)p.units * (UNIT / 64 * SUBTILE_BYTES);
  u32* flags = (u32*)((unsigned char*)p.x + image_bytes);
  float4* parts = (float4*)((unsigned char*)flags + ((size_t)gridDim.x * (WARPS_ROW * 4) + 127) / 128 * 128) + lane;
  int place = blockIdx.x * WARPS_ROW + warp;
  if (segment.last != p.units) {
#pragma unroll
    for (int nt = 0; nt < N_TILES; ++nt)
      if (nt * 8 < p.m) parts[(size_t)place * PITCH + nt * 32] = make_float4(d[nt][0], d[nt][1], d[nt][2], d[nt][3]);
    __syncwarp();
    if (lane == 0) store_release(flags + place, 1);
    return;
  }
  if (segment.first != 0) {
    // The cluster that has the row group's first unit, and those behind it.
    const u32 start = segment.group * p.units, clusters = gridDim.x / CLUSTER;
    const int others = cluster_index() - (int)(((start + 1) * clusters - 1) / total_units(p));
    for (int seen = 0; seen < others; seen += 32) {
      const u32* flag = flags + place - STEP * min(seen + lane + 1, others);
      while (!__all_sync(0xffffffffu, load_acquire(flag) != 0)) {
      }
    }
#pragma unroll 1
    for (int i = 0; i < others; ++i) {
      place -= STEP;
#pragma unroll
      for (int nt = 0; nt < N_TILES; ++nt) {
        // Of activation rows that are not there any value will do.
        const float4 v = __ldcg(parts + (size_t)place * PITCH + nt * 32);
        d[nt][0] += v.x;
        d[nt][1] += v.y;
        d[nt][2] += v.z;
        d[nt][3] += v.w;
      }
    }
  }
  store_fragments(p, d, 0, row_tile(segment.group, warp) * 16);
}
