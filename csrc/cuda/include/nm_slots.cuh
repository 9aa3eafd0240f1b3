// Values of 2:4 and 4:8 weights: how a warp's units are fetched to shared memory and taken from there, in the terms of paired.cuh. Needs
// decode_common.cuh and expand.cuh before it.
//
// Units of 256 columns lie in memory as decode_nm.cu describes: 16 bytes of positions for each lane, then 16 bytes of values for each lane
// and step. A warp's unit is one of PARTS parts of these steps, with the positions of them all.
#pragma once
#include "slot_ring.cuh"

#ifndef SLOTS
#define SLOTS STAGES // units that a warp has in shared memory or on their way
#endif
#define WORDS (4 / PARTS)
#define POSITIONS_BYTES 512
#define STEP_BYTES 512
// Of a unit: its positions and its values, which lie together where it has all of them.
#define COPIES (PARTS == 1 ? 1 : 2)
#define SLOT_BYTES (POSITIONS_BYTES + STEPS * STEP_BYTES)
// What a step's product takes: operand A of dense tensor cores; or the kept values, of sparse ones, and where they stand.
#if PATTERN == 24
#define OPERAND_WORDS 5
#else
#define OPERAND_WORDS 8
#endif

// A unit that has arrived, as one lane sees it.
struct Unit {
  u32 values; // shared address of those of the first step
  u32 positions[WORDS];
};

// All steps of a unit: calls multiply(s, a) for each in order, a held until the call after the next.
template <typename Multiply>
__device__ __forceinline__ void for_each_step(const Unit& u, Multiply multiply) {
  u32 values[3][4]; // of the next steps: shared memory's latency passes while earlier ones are multiplied
  load_shared_x4(u.values, values[0]);
  if (1 < STEPS) load_shared_x4(u.values + STEP_BYTES, values[1]);
  u32 a[2][OPERAND_WORDS];
#if PATTERN == 48
  u32 codes[4];
#endif
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    if (s + 2 < STEPS) load_shared_x4(u.values + (s + 2) * STEP_BYTES, values[(s + 2) % 3]);
    const u32(&now)[4] = values[s % 3];
#if PATTERN == 24
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[s % 2][i] = now[i];
    a[s % 2][4] = u.positions[s / 2];
#else
#pragma unroll
    for (int i = 0; i < 4; ++i)
      codes[i] = s % 2 == 0 ? code_selectors(u.positions[s / 2], i) : codes[i] >> 16;
    expand_step(make_uint4(now[0], now[1], now[2], now[3]), codes, a[s % 2]);
#endif
    multiply(s, a[s % 2]);
  }
}

// Where the first units of a warp lie: told by their numbers alone.
struct First {
  u32 units[SLOTS];
};

// A warp's slots, which units go through in order.
struct Slots {
  u32 slots, barriers; // shared addresses of the warp's own
  Ring ring;           // of the oldest unit
  u32 unit;            // the one to be fetched next, NONE
  static constexpr u32 NONE = ~0u;

  __device__ __forceinline__ void init(const Params&, u32 all_slots, u32 all_barriers, int warp) {
    slots = all_slots + warp * SLOTS * SLOT_BYTES;
    barriers = all_barriers + warp * SLOTS * 8;
    ring = {0, 0};
    init_own_barriers(barriers, SLOTS, COPIES * COPY_ARRIVALS);
  }

  // A sequence has `unit`, `any` and advance(p).
  template <typename Sequence>
  __device__ __forceinline__ void look_up(const Params& p, Sequence& units, First& first) {
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      announce(p, units);
      first.units[s] = unit;
    }
  }

  template <int BEGIN, int END>
  __device__ __forceinline__ void fetch_first(const Params& p, const First& first, u64 policy) {
#pragma unroll
    for (int s = BEGIN; s < END; ++s) {
      unit = first.units[s];
      fetch(p, s, policy);
    }
  }

  template <typename Sequence>
  __device__ __forceinline__ void announce(const Params& p, Sequence& units) {
    unit = NONE;
    if (!units.any) return;
    unit = units.unit;
    units.advance(p);
  }

  // Starts copying the announced unit, if any, to slot `into`.
  __device__ __forceinline__ void fetch(const Params& p, u32 into, u64 policy) const {
    if (unit == NONE) return;
    const u32 target = slots + into * SLOT_BYTES, barrier = barriers + 8 * into;
    const uint4* source = p.weight + (size_t)(unit / PARTS) * ((POSITIONS_BYTES + 8 * STEP_BYTES) / 16);
#if PARTS == 1
    copy_block(target, source, SLOT_BYTES / 16, barrier, policy);
#else
    const u32 at = POSITIONS_BYTES + unit % PARTS * (STEPS * STEP_BYTES);
    copy_block(target, source, POSITIONS_BYTES / 16, barrier, policy);
    copy_block(target + POSITIONS_BYTES, source + at / 16, STEPS * STEP_BYTES / 16, barrier, policy);
#endif
  }

  // Waits for the oldest unit, which is number `part` of its 256 columns.
  __device__ __forceinline__ void open(Unit& u, u32 part) const {
    const u32 lane = threadIdx.x & 31, positions = slots + ring.slot * SLOT_BYTES + lane * 16;
    barrier_wait(barriers + 8 * ring.slot, ring.parity);
#if PARTS == 1
    load_shared_x4(positions, u.positions);
#else
#pragma unroll
    for (int i = 0; i < WORDS; ++i)
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(u.positions[i]) : "r"(positions + part * (16 / PARTS) + 4 * i) : "memory");
#endif
    u.values = positions + POSITIONS_BYTES;
  }

  // Gives the oldest unit's slot to the announced one.
  template <typename Sequence>
  __device__ __forceinline__ void close(const Params& p, Sequence& units, u64 policy) {
    __syncwarp();
    fetch(p, ring.slot, policy);
    ring.advance(SLOTS);
    announce(p, units);
  }
};
