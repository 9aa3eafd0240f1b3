// Unstructured values: how a warp's units are stored, fetched and expanded. Needs decode_common.cuh, expand.cuh and bulk.cuh before it.
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

#ifndef SLOTS
#define SLOTS STAGES // units that a warp has in shared memory or on their way
#endif
#define WORDS (4 / PARTS)
#define MASK_BYTES (512 / PARTS)
#define HEADER_BYTES (MASK_BYTES + 32)
// Words start 128-byte aligned in a slot; a pair that keeps nothing may read one word before or behind them.
#define SLOT_LEAD 96
#define WARPS (WARPS_ROW * WARPS_K)

// Table entry for a mask byte and a parity: bytes 0 .. 3 are the words of the four pairs, counted from the one that the parity's half-word
// lies in, then 8 nibbles, two per pair: what its low and its high half take, 0 nothing, 1 the word's low half, 2 its high half. Bits 6,
// 14, 22 and 30 of these are the half-words that the octet takes. Copies of the table lie side by side so that lanes read with fewer
// conflicts.
#define TABLE_BYTES (512 * 8 * TABLE_COPIES)
#define LENGTH_BITS 0x40404040u

__device__ __forceinline__ uint2 table_entry(int byte, int parity) {
  const int kept = __popc(byte), singles = __popc((byte ^ byte >> 1) & 0x55);
  const int last = (parity + kept - 1) >> 1; // word of a single without a partner
  u32 places = 0, halves = 0;
  int next = parity, open = parity - 1, seen = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int code = byte >> (2 * j) & 3;
    int word = 0, low = 0, high = 0;
    if (code == 3) {
      word = next++;
      low = 1;
      high = 2;
    } else if (code != 0) {
      int half = 1;
      ++seen;
      if (open >= 0) {
        word = open;
        half = 2;
        open = -1;
      } else if (seen == singles) {
        word = last;
      } else {
        word = open = next++;
      }
      low = code == 1 ? half : 0;
      high = code == 2 ? half : 0;
    }
    places |= (u32)word << (8 * j);
    halves |= (u32)(low | high << 4) << (8 * j);
  }
  // Pairs that keep both columns leave a free half behind.
  const int length = kept + (singles == 0 && kept != 0 ? parity : 0);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    halves |= (u32)(length >> i & 1) << (8 * i + 6);
  return make_uint2(places, halves);
}

// Every thread of the block calls it.
__device__ __forceinline__ void fill_table(u32 table) {
  const int lane = threadIdx.x & 31;
  for (int first = threadIdx.x & ~31; first < 512; first += THREADS) {
    const uint2 mine = table_entry((first + lane) >> 1, lane & 1);
#pragma unroll
    for (int i = 0; i < TABLE_COPIES; ++i) {
      const int from = (i * 32 + lane) / TABLE_COPIES;
      const u32 places = __shfl_sync(0xffffffffu, mine.x, from), halves = __shfl_sync(0xffffffffu, mine.y, from);
      asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(table + first * (8 * TABLE_COPIES) + (i * 32 + lane) * 8), "r"(places),
                   "r"(halves)
                   : "memory");
    }
  }
}

__device__ __forceinline__ u32 dot4(u32 bytes, u32 weights, u32 sum) {
  asm("dp4a.u32.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(bytes), "r"(weights));
  return sum;
}

// The weights are signed.
__device__ __forceinline__ u32 dot4_signed(u32 bytes, u32 weights, u32 sum) {
  asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(bytes), "r"(weights));
  return sum;
}

__device__ __forceinline__ uint2 load_entry(u32 address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ u32 load_word(u32 address) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

// Tables of selector bytes by a nibble of an entry; streams B have their halves exchanged.
#define HALVES_A 0x00321044u
#define HALVES_B 0x00103244u

// A unit that has arrived, as one lane sees it. `first` and `second` are where its streams A and B have come to: the shared address of the
// word, without the column, plus 64 if its first half is taken (A), or less 64, from 64 more (B).
struct Unit {
  u32 masks[WORDS], columns[2], first, second;
};

// Its steps are expanded in three stages, so that the table's and the words' latencies pass while earlier steps are multiplied:
//   look_up_step   step s + 2: its two table entries
//   load_step      step s + 1: its eight words
//   place_step     step s:     operand A
struct Entries {
  uint2 first, second; // of octets A and B
};

struct Step {
  u32 words[8], halves[2]; // of octets A and B
};

// Entry of the mask byte at bit `at`; `parity` is 0 or 64, `table` the address of the lane's copy.
__device__ __forceinline__ uint2 look_up_octet(u32 masks, int at, u32 parity, u32 table) {
  const u32 row = TABLE_COPIES == 8 ? (parity | table) : parity * TABLE_COPIES / 8 + table;
  return load_entry(dot4(masks, (u32)(16 * TABLE_COPIES) << at, row));
}

__device__ __forceinline__ void look_up_step(const Unit& u, int s, u32 table, Entries& e) {
  const u32 masks = u.masks[s / 2];
  const int at = s % 2 * 16;
  e.first = look_up_octet(masks, at, u.first & 64, table);
  e.second = look_up_octet(masks, at + 8, ~u.second & 64, table);
}

__device__ __forceinline__ void load_step(const Entries& e, Unit& u, Step& step) {
  const u32 first = (u.first & ~127u) | u.columns[0], second = (u.second & ~127u) | u.columns[1];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    step.words[j] = load_word(dot4(e.first.x, 128u << (8 * j), first));
    step.words[4 + j] = load_word(dot4_signed(e.second.x, 128u << (8 * j), second)); // the byte 128 is -128
  }
  step.halves[0] = e.first.y;
  step.halves[1] = e.second.y;
  u.first = dot4(e.first.y & LENGTH_BITS, 0x08040201u, u.first);
  u.second = dot4_signed(e.second.y & LENGTH_BITS, 0xf8fcfeffu, u.second);
}

__device__ __forceinline__ void place_step(const Step& step, u32 (&a)[8]) {
#pragma unroll
  for (int octet = 0; octet < 2; ++octet) {
    const u32 table = octet ? HALVES_B : HALVES_A, halves = step.halves[octet];
    const u32 s0 = pick(table, table, halves), s1 = pick(table, table, halves >> 16);
    a[octet] = permute(step.words[4 * octet], s0);
    a[octet + 2] = permute(step.words[4 * octet + 1], s0 >> 16);
    a[octet + 4] = permute(step.words[4 * octet + 2], s1);
    a[octet + 6] = permute(step.words[4 * octet + 3], s1 >> 16);
  }
}

// All steps of a unit: calls multiply(s, a) for each in order, a held until the call after the next.
template <typename Multiply>
__device__ __forceinline__ void for_each_step(Unit& u, u32 table, Multiply multiply) {
  Entries entries[2];
  Step steps[2];
  u32 a[2][8];
  look_up_step(u, 0, table, entries[0]);
  load_step(entries[0], u, steps[0]);
  if (1 < STEPS) look_up_step(u, 1, table, entries[1]);
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    if (s + 1 < STEPS) load_step(entries[(s + 1) % 2], u, steps[(s + 1) % 2]);
    if (s + 2 < STEPS) look_up_step(u, s + 2, table, entries[s % 2]);
    place_step(steps[s % 2], a[s % 2]);
    multiply(s, a[s % 2]);
  }
}

// A warp's slots, which units go through in order.
struct Slots {
  u32 slots, slot_bytes, barriers; // shared addresses of the warp's own
  u32 slot, parity;                // of the oldest unit
  u32 depths[SLOTS];               // of the units in the slots, oldest first
  u32 from, to;                    // of the unit to be fetched next

  __device__ __forceinline__ void init(const Params& p, u32 all_slots, u32 all_barriers, int warp) {
    slot_bytes = SLOT_LEAD + HEADER_BYTES + (p.depth + 1) * 128;
    slots = all_slots + warp * SLOTS * slot_bytes + SLOT_LEAD;
    barriers = all_barriers + warp * SLOTS * 8;
    slot = parity = 0;
    if ((threadIdx.x & 31) == 0) {
      for (int s = 0; s < SLOTS; ++s)
        barrier_init(barriers + 8 * s, COPY_ARRIVALS);
      barrier_init_fence();
    }
    __syncwarp();
  }

  // Fetches the first units of `units`, and announces the one behind them. A sequence has `unit`, `any` and advance(p).
  template <typename Sequence>
  __device__ __forceinline__ void start(const Params& p, Sequence& units, u64 policy) {
    u32 froms[SLOTS], tos[SLOTS];
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      announce(p, units);
      froms[s] = from;
      tos[s] = to;
    }
#pragma unroll
    for (int s = 0; s < SLOTS; ++s) {
      from = froms[s];
      to = tos[s];
      depths[s] = fetch(p, s, policy);
    }
    announce(p, units);
  }

  // Looks up where the next unit lies, some time before it is fetched.
  template <typename Sequence>
  __device__ __forceinline__ void announce(const Params& p, Sequence& units) {
    from = to = 0;
    if (!units.any) return;
    from = __ldg(p.offsets + units.unit);
    to = __ldg(p.offsets + units.unit + 1);
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
    const u32 header = slots + slot * slot_bytes;
    barrier_wait(barriers + 8 * slot, parity);
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
    const u32 depth = fetch(p, slot, policy);
#pragma unroll
    for (int s = 0; s + 1 < SLOTS; ++s)
      depths[s] = depths[s + 1];
    depths[SLOTS - 1] = depth;
    if (++slot == SLOTS) {
      slot = 0;
      parity ^= 1;
    }
    announce(p, units);
  }
};
