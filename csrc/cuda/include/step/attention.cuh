// Attention of the new token over a part of the positions before it.
#pragma once
#include "step/ring.cuh"
#include "values.cuh"
#include "step/words.cuh"
#include "step/workspace.cuh"
#include "softmax.cuh"

// One part of a head's attention; as attention_decode.cu does it, with keys and values from the ring.
__device__ __forceinline__ void attend(const Params& p, const Ring& ring, Workspace& w, Partial* partials, Cursor& cursor,
                                       const Attention& a, int job, int layer, const u32* qkv, u32* target) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, in_group = lane % LANES, group = lane / LANES;
  const int head = job / a.parts, part = job % a.parts;
  const Range range = range_of(a, part);
  const int slots = (range.end - range.begin + POSITIONS - 1) / POSITIONS;
  const bool own = part == a.parts - 1 && a.count < p.capacity;
  float acc[8] = {}, sum = 0, maximum = LOWEST;
  if (warp < slots || (own && warp == WARPS - 1)) {
    const u32* mine = qkv + head * (HEAD_SIZE / 2) + in_group * 4;
    const bool mine_too = own && warp == WARPS - 1;
    uint4 own_q = look(mine), own_k = make_uint4(0, 0, 0, 0), own_v = own_k;
    if (mine_too) {
      own_k = look(mine + HIDDEN_WORDS);
      own_v = look(mine + 2 * HIDDEN_WORDS);
    }
    while (lacks(own_q) || lacks(own_k) || lacks(own_v)) {
      own_q = look(mine);
      if (mine_too) {
        own_k = look(mine + HIDDEN_WORDS);
        own_v = look(mine + 2 * HIDDEN_WORDS);
      }
    }
    float q[8];
    unpack(own_q, q);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      q[i] *= p.scale * LOG2E;
    note(w, 0);
    auto score_of = [&](const uint4& k) {
      float f[8], score = 0;
      unpack(k, f);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        score += q[i] * f[i];
      return group_sum<LANES>(score);
    };
    for (int s = warp; s < slots; s += WARPS) {
      constexpr int EACH = POSITIONS / GROUPS;
      const int count = min(POSITIONS, range.end - range.begin - s * POSITIONS);
      const u32 at = ring.take(cursor.slot + s, cursor.slot) + group * HEAD_SIZE * 2 + in_group * 16;
      uint4 k[EACH];
#pragma unroll
      for (int u = 0; u < EACH; ++u) {
        const bool inside = u * GROUPS + group < count;
        k[u] = inside ? read_shared(at + u * GROUPS * HEAD_SIZE * 2) : make_uint4(0, 0, 0, 0);
      }
      float score[EACH], highest = maximum;
#pragma unroll
      for (int u = 0; u < EACH; ++u) {
        score[u] = score_of(k[u]);
        if (u * GROUPS + group >= count) score[u] = -__int_as_float(0x7f800000);
        highest = fmaxf(highest, score[u]);
      }
      const float shrink = exp2_fast(maximum - highest);
      maximum = highest;
      sum *= shrink;
#pragma unroll
      for (int i = 0; i < 8; ++i)
        acc[i] *= shrink;
#pragma unroll
      for (int u = 0; u < EACH; ++u) {
        const float weight = exp2_fast(score[u] - maximum);
        float f[8];
        // What lies behind the last position may be no number.
        const bool inside = u * GROUPS + group < count;
        unpack(inside ? read_shared(at + (POSITIONS + u * GROUPS) * HEAD_SIZE * 2) : make_uint4(0, 0, 0, 0), f);
        add_weighted(weight, f, acc, sum);
      }
      ring.release(cursor.slot + s, 2);
    }
    if (mine_too) {
      const float score = score_of(own_k);
      if (group == 0) {
        const float highest = fmaxf(maximum, score), shrink = exp2_fast(maximum - highest), weight = exp2_fast(score - highest);
        float f[8];
        unpack(own_v, f);
        maximum = highest;
        sum = sum * shrink + weight;
#pragma unroll
        for (int i = 0; i < 8; ++i)
          acc[i] = acc[i] * shrink + weight * f[i];
        const size_t at = (((size_t)layer * HEADS + head) * p.capacity + a.count) * LANES + in_group;
        ((uint4*)p.k_cache)[at] = own_k;
        ((uint4*)p.v_cache)[at] = own_v;
      }
    }
    const float highest = max_of_groups<LANES>(maximum), shrink = exp2_fast(maximum - highest);
    sum = sum_of_groups<LANES>(sum * shrink);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      acc[i] = sum_of_groups<LANES>(acc[i] * shrink);
      if (group == 0) partials[warp].values[in_group * 8 + i] = acc[i];
    }
    if (lane == 0) {
      partials[warp].sum = sum;
      partials[warp].maximum = highest;
    }
  }
  cursor.slot += slots;
  workers_sync();
  if (threadIdx.x < HEAD_SIZE) {
    // Warps between the last slot's and the last one have attended to nothing.
    const int some = min(slots, WARPS), last = own && some < WARPS ? WARPS - 1 : -1;
    const bool valid = lane < some || lane == last;
    float highest = valid ? partials[lane].maximum : LOWEST;
    const float mine = highest;
#pragma unroll
    for (int offset = 16; offset; offset >>= 1)
      highest = fmaxf(highest, __shfl_xor_sync(ALL, highest, offset));
    const float weight = valid ? exp2_fast(mine - highest) : 0.0f;
    const float total = warp_sum(valid ? weight * partials[lane].sum : 0.0f);
    float value = 0;
#pragma unroll 4
    for (int i = 0; i < some; ++i)
      value += __shfl_sync(ALL, weight, i) * partials[i].values[threadIdx.x];
    if (last >= 0) value += __shfl_sync(ALL, weight, last) * partials[last].values[threadIdx.x];
    u32* at = target + (head * MAX_PARTS + part) * PARTIAL_WORDS;
    publish(at + threadIdx.x, __float_as_uint(value));
    if (threadIdx.x == 0) {
      publish(at + HEAD_SIZE, __float_as_uint(total));
      publish(at + HEAD_SIZE + 1, __float_as_uint(highest));
    }
  }
  note(w, 1);
}
