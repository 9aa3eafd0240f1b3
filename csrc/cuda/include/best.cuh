// The largest of many values and the first index that has it.
#pragma once

typedef unsigned int u32;

// A value's order among all, as an integer above 0: equal for both zeros, NaN above all.
__device__ __forceinline__ u32 order_of(float v) {
  const u32 bits = __float_as_uint(v + 0.0f);
  return bits ^ (bits & 0x80000000u ? 0xffffffffu : 0x80000000u);
}

struct Best {
  u32 order, index;
};

__device__ __forceinline__ void take(Best& best, float v, u32 index) {
  const u32 order = order_of(v);
  if (order > best.order) best = {order, index};
}

__device__ __forceinline__ Best warp_best(const Best& b) {
  const u32 order = __reduce_max_sync(0xffffffffu, b.order);
  return {order, __reduce_min_sync(0xffffffffu, b.order == order ? b.index : 0xffffffffu)};
}

__device__ __forceinline__ Best best_of(const Best* shared, int count) {
  const int lane = threadIdx.x & 31;
  return warp_best(lane < count ? shared[lane] : Best{0, 0xffffffffu});
}
