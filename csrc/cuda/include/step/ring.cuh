// The ring of slots in shared memory through which a block gets its weights, keys and values, and the warp that fills it.
#pragma once
#include "step/shares.cuh"
#include "bulk.cuh"

struct Ring {
  u32 data, full, empty; // shared addresses

  __device__ __forceinline__ u32 place(u32 slot) const { return data + slot % SLOTS * SLOT_BYTES; }

  // A worker's warp waits for a slot of a phase that began at slot `first`; all its lanes call release when they have read it, `share` of
  // two halves. Copies arrive in any order, and a barrier tells a turn only from the next one: where the slot has had a turn in this phase,
  // another warp may still wait for that, so that its release comes first.
  __device__ __forceinline__ u32 take(u32 slot, u32 first) const {
    if (slot - first >= SLOTS) barrier_wait(empty + slot % SLOTS * 8, (slot / SLOTS & 1) ^ 1);
    barrier_wait(full + slot % SLOTS * 8, slot / SLOTS & 1);
    __syncwarp();
    return place(slot);
  }
  __device__ __forceinline__ void release(u32 slot, int halves) const {
    __syncwarp();
    if ((int)(threadIdx.x & 31) < halves) barrier_arrive(empty + slot % SLOTS * 8);
  }

  // One thread fills slots, in order.
  __device__ __forceinline__ u32 open(u32 slot, u32 bytes) const {
    barrier_wait(empty + slot % SLOTS * 8, (slot / SLOTS & 1) ^ 1);
    barrier_expect(full + slot % SLOTS * 8, bytes);
    return full + slot % SLOTS * 8;
  }
};

__device__ __forceinline__ void prefetch_vector(const void* p, int elements) {
  for (int line = (int)blockIdx.x + (int)gridDim.x * (int)(threadIdx.x & 31); line * 64 < elements; line += 32 * (int)gridDim.x)
    asm volatile("prefetch.global.L2::evict_last [%0];" ::"l"((const char*)p + line * 128));
}

// The last warp: copies what this block will read, in order.
__device__ __forceinline__ void fill(const Params& p, const Ring& ring, const Layer* layers, int length) {
  const int lane = threadIdx.x & 31;
  const u64 policy = weight_policy();
  const Attention attention = attention_of(length, p.capacity);
  Cursor cursor = {0, 0};
  for (int l = 0; l < p.layer_count; ++l) {
    const Layer& layer = layers[l];
#pragma unroll 1
    for (int i = 0; i < 8; ++i)
      prefetch_vector(i < 4 ? layer.bias[i] : i < 6 ? layer.scale[i - 4] : layer.shift[i - 6], i < 4 ? rows_of(i) : HIDDEN);
#pragma unroll 1
    for (int product = QKV; product <= FC2; ++product) {
      int count;
      if (product == OUT) {
        const int job = cursor.deal(HEADS * attention.parts, count);
        const Range range = range_of(attention, job % attention.parts);
        const size_t base = ((size_t)l * HEADS + job / attention.parts) * p.capacity;
#pragma unroll 1
        for (int at = range.begin; count && at < range.end; at += POSITIONS, ++cursor.slot) {
          if (lane) continue;
          const u32 bytes = min(POSITIONS, range.end - at) * HEAD_SIZE * 2, target = ring.place(cursor.slot);
          const u32 barrier = ring.open(cursor.slot, 2 * bytes);
          bulk_copy(target, p.k_cache + (base + at) * HEAD_SIZE, bytes, barrier, policy);
          bulk_copy(target + POSITIONS * HEAD_SIZE * 2, p.v_cache + (base + at) * HEAD_SIZE, bytes, barrier, policy);
        }
      }
      const int first = cursor.deal(rows_of(product) / 16, count), units = units_of(product);
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        const char* source = (const char*)layer.weight[product] + (size_t)(first + i * (int)gridDim.x) * units * SLOT_BYTES;
#pragma unroll 1
        for (int u = 0; u < units; ++u, ++cursor.slot)
          if (lane == 0)
            bulk_copy(ring.place(cursor.slot), source + (size_t)u * SLOT_BYTES, SLOT_BYTES, ring.open(cursor.slot, SLOT_BYTES), policy);
      }
    }
    __syncwarp();
  }
  prefetch_vector(p.final_scale, HIDDEN);
  prefetch_vector(p.final_shift, HIDDEN);
  if (lane) return;
  const int groups = (p.vocabulary + SLOT_ROWS - 1) / SLOT_ROWS;
  const int end = (int)((long long)groups * (blockIdx.x + 1) / gridDim.x);
#pragma unroll 1
  for (int group = (int)((long long)groups * blockIdx.x / gridDim.x); group < end; ++group) {
    const u32 bytes = ROW_SLOTS > 1 ? PIECE_BYTES : min(SLOT_ROWS, p.vocabulary - group * SLOT_ROWS) * HEAD_ROW_BYTES;
    const unsigned char* source = p.head + (size_t)group * SLOT_ROWS * HEAD_ROW_BYTES;
#pragma unroll 1
    for (int piece = 0; piece < ROW_SLOTS; ++piece, ++cursor.slot)
      bulk_copy(ring.place(cursor.slot), source + (size_t)piece * PIECE_BYTES, bytes, ring.open(cursor.slot, bytes), policy);
  }
}
