// Unstructured values: how a warp's units are stored, fetched and expanded. Needs decode_common.cuh and expand.cuh
// before it.
//
// Lane (g, t) of a warp owns, of every 32 columns (a step), columns 8t .. 8t + 7 of rows g (octet A) and g + 8 (octet B). An octet's four
// column pairs take their values from words of two: a pair that keeps both columns from a word of its own, pairs that keep one from a word
// that two of them share, in order of their columns. Words are numbered in order of first use; where a single has no partner, it has the
// octet's last word, and the first single of the octet that follows in the lane's stream fills the half that stays free. So every pair
// takes one word, at a place that its octet's mask byte and the half-words before it (their parity) decide, and a table gives the places.
//
// A lane has two streams of a unit, the octets A of its steps and the octets B. Stream A fills a column of words downwards, the lane's own;
// stream B fills one upwards from its end, with halves exchanged, so that two streams whose words are odd meet in one word. The columns of
// streams B are dealt so that the longest come to the shortest streams A: the 32 columns are a block with little padding (6 % of the values
// at half density in units of 256 columns), which one bulk copy brings, and every lane reads a bank of its own.
//
//   weight   of each unit, contiguous: masks [32 lanes][16 / PARTS bytes], byte 2s for row g, 2s + 1 for row g + 8 of step s;
//            columns [32 lanes] uint8, that of the lane's stream B; words [depth of the unit][32 columns]
//   offsets  [T * U + 1] where each unit starts, in 16 bytes
#pragma once
#include "octets.cuh"
#include "slot_ring.cuh"

#ifndef SLOTS
#define SLOTS STAGES // units that a warp has in shared memory or on their way
#endif
#define WORDS (4 / PARTS)
#define MASK_BYTES (512 / PARTS)
#define HEADER_BYTES (MASK_BYTES + 32)
// Words start 128-byte aligned in a slot; a pair that keeps nothing may read one word before or behind them.
#define SLOT_LEAD 96
#define WARPS (WARPS_ROW * WARPS_K)

// A unit that has arrived, as one lane sees it. `first` and `second` are where its streams A and B have come to: the shared address of the
// word, without the column, plus 64 if its first half is taken (A), or less 64, from 64 more (B).
struct Unit {
  u32 masks[WORDS], columns[2], first, second;
};

// Its steps are expanded in three stages, so that the table's and the words' latencies pass while earlier steps are multiplied:
//   look_up_step   step s + 2: its two octets
//   load_step      step s + 1: its eight words
//   place_step     step s:     operand A
struct Octets {
  Octet first, second; // A and B
};

struct Step {
  u32 words[8], kinds[2]; // of octets A and B
};

__device__ __forceinline__ void look_up_step(const Unit& u, int s, u32 own, Octets& o) {
  const u32 masks = u.masks[s / 2];
  const int at = s % 2 * 16;
  o.first = look_up_octet(masks, at, u.first & 64, own);
  o.second = look_up_octet(masks, at + 8, ~u.second & 64, own);
}

__device__ __forceinline__ void load_step(const Octets& o, Unit& u, Step& step) {
  const u32 first = (u.first & ~127u) | u.columns[0], second = (u.second & ~127u) | u.columns[1];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    step.words[j] = load_pair<false>(o.first, j, first);
    step.words[4 + j] = load_pair<true>(o.second, j, second);
  }
  step.kinds[0] = kinds_of(o.first);
  step.kinds[1] = kinds_of(o.second);
  u.first = pass_octet<false>(o.first, u.first);
  u.second = pass_octet<true>(o.second, u.second);
}

__device__ __forceinline__ void place_step(const Step& step, u32 (&a)[8]) {
  u32 first[4], second[4];
  place_octet<false>(step.words, step.kinds[0], first);
  place_octet<true>(step.words + 4, step.kinds[1], second);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    a[2 * j] = first[j];
    a[2 * j + 1] = second[j];
  }
}

// All steps of a unit: calls multiply(s, a) for each in order, a held until the call after the next. `own` is own_table.
template <typename Multiply>
__device__ __forceinline__ void for_each_step(Unit& u, u32 own, Multiply multiply) {
  Octets octets[2];
  Step steps[2];
  u32 a[2][8];
  look_up_step(u, 0, own, octets[0]);
  load_step(octets[0], u, steps[0]);
  if (1 < STEPS) look_up_step(u, 1, own, octets[1]);
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    if (s + 1 < STEPS) load_step(octets[(s + 1) % 2], u, steps[(s + 1) % 2]);
    if (s + 2 < STEPS) look_up_step(u, s + 2, own, octets[s % 2]);
    place_step(steps[s % 2], a[s % 2]);
    multiply(s, a[s % 2]);
  }
}

// Offsets are few and read before anything else can start: they stay in L2 from one product to the next.
__device__ __forceinline__ u32 load_kept(const u32* p, u64 policy) {
  u32 v;
  asm volatile("ld.global.nc.L2::cache_hint.u32 %0, [%1], %2;" : "=r"(v) : "l"(p), "l"(policy));
  return v;
}

// Where the first units of a warp lie.
struct First {
  u32 froms[SLOTS], tos[SLOTS];
};

// A warp's slots, which units go through in order.
struct Slots {
  u64 keep;
  u32 slots, slot_bytes, barriers; // shared addresses of the warp's own
  Ring ring;                       // of the oldest unit
  u32 depths[SLOTS];               // of the units in the slots, oldest first
  u32 from, to;                    // of the unit to be fetched next

  __device__ __forceinline__ void init(const Params& p, u32 all_slots, u32 all_barriers, int warp) {
    slot_bytes = SLOT_LEAD + HEADER_BYTES + (p.depth + 1) * 128;
    slots = all_slots + warp * SLOTS * slot_bytes + SLOT_LEAD;
    barriers = all_barriers + warp * SLOTS * 8;
    ring = {0, 0};
    keep = activation_policy();
    init_own_barriers(barriers, SLOTS, COPY_ARRIVALS);
  }

  // Fetches the first units of `units`, and announces the one behind them. A sequence has `unit`, `any` and advance(p).
  template <typename Sequence>
  __device__ __forceinline__ void start(const Params& p, Sequence& units, u64 policy) {
    First first;
    look_up(p, units, first);
    fetch_first<0, SLOTS>(p, first, policy);
    announce(p, units);
  }

  template <typename Sequence>
  __device__ __forceinline__ void look_up(const Params& p, Sequence& units, First& first) {
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      announce(p, units);
      first.froms[s] = from;
      first.tos[s] = to;
    }
  }

  template <int BEGIN, int END>
  __device__ __forceinline__ void fetch_first(const Params& p, const First& first, u64 policy) {
#pragma unroll
    for (int s = BEGIN; s < END; ++s) {
      from = first.froms[s];
      to = first.tos[s];
      depths[s] = fetch(p, s, policy);
    }
  }

  // Looks up where the next unit lies, some time before it is fetched.
  template <typename Sequence>
  __device__ __forceinline__ void announce(const Params& p, Sequence& units) {
    from = to = 0;
    if (!units.any) return;
    from = load_kept(p.offsets + units.unit, keep);
    to = load_kept(p.offsets + units.unit + 1, keep);
    units.advance(p);
  }

  // Starts copying the announced unit, if any, to slot `into`, and says how many words deep it is.
  __device__ __forceinline__ u32 fetch(const Params& p, u32 into, u64 policy) const {
    if (to != from) copy_block(slots + into * slot_bytes, p.weight + from, to - from, barriers + 8 * into, policy);
    return (to - from - HEADER_BYTES / 16) / 8;
  }

  // Waits for the oldest unit.
  __device__ __forceinline__ void open(Unit& u) const {
    const int lane = threadIdx.x & 31;
    const u32 header = slots + ring.slot * slot_bytes;
    barrier_wait(barriers + 8 * ring.slot, ring.parity);
#if PARTS == 1
    load_shared_x4(header + lane * 16, u.masks);
#else
#pragma unroll
    for (int i = 0; i < WORDS; ++i)
      u.masks[i] = load_word(header + lane * (4 * WORDS) + 4 * i);
#endif
    u32 column;
    asm volatile("ld.shared.u8 %0, [%1];" : "=r"(column) : "r"(header + MASK_BYTES + lane) : "memory");
    u.columns[0] = lane * 4;
    u.columns[1] = column * 4;
    u.first = header + HEADER_BYTES;
    u.second = u.first + depths[0] * 128 - 64;
  }

  // Gives the oldest unit's slot to the announced one.
  template <typename Sequence>
  __device__ __forceinline__ void close(const Params& p, Sequence& units, u64 policy) {
    __syncwarp();
    const u32 depth = fetch(p, ring.slot, policy);
#pragma unroll
    for (int s = 0; s + 1 < SLOTS; ++s)
      depths[s] = depths[s + 1];
    depths[SLOTS - 1] = depth;
    ring.advance(SLOTS);
    announce(p, units);
  }
};
