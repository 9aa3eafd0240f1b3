// Unstructured values: how a lane's stream is stored, fetched and expanded. Needs decode_common.cuh and expand.cuh before it.
//
// Lane (g, t) of a warp owns, of every 32 columns (a step), columns 8t .. 8t + 7 of rows g (octet A) and g + 8 (octet B). An octet's four
// column pairs take their values from words of two: a pair that keeps both columns from a word of its own, pairs that keep one from a word
// that two of them share, in order of their columns. Words are numbered in order of first use; where the singles are odd, the last one lies
// in the octet's last word, of which one half stays free. A step holds octet A's words upwards and octet B's downwards, halves exchanged,
// so that the two free halves are one word:
//
//      word   0      1           last
//           [A A]  [A A]  [A B]  [B B]        ceil((values of A + values of B) / 2) words
//
// So every pair takes one word, at a place that its octet's mask byte alone decides, and a table over bytes gives the places.
//
//   masks    [T][U][32 lanes][16 / PARTS bytes]: byte 2s for row g, 2s + 1 for row g + 8 of step s
//   counts   [T][U][32 lanes] uint8: words of a lane's stream of the unit
//   weight   of each unit, with `full` the fewest words of a lane: words 0 .. full - 1 as [word][lane], then each lane's further words,
//   lane
//            by lane; the unit's end is padded to 16 bytes
//   offsets  [T * U + 1] where each unit's words start, in 16 bytes
#pragma once

#define WORDS (4 / PARTS)

// Table entry: bytes 0 .. 3 are the words of the four pairs, then 8 nibbles, two per pair: what its low and its high half take, 0 nothing,
// 1 the word's low half, 2 its high half. Copies of the table lie side by side so that the lanes of half a warp read without conflicts.
#define TABLE_BYTES (256 * 8 * TABLE_COPIES)

__device__ __forceinline__ void fill_table(u32 table) {
  for (int byte = threadIdx.x; byte < 256; byte += THREADS) {
    const int last = (__popc(byte) - 1) >> 1; // word of a single without a partner
    const int pairs_with_one = __popc((byte ^ byte >> 1) & 0x55);
    u32 places = 0, halves = 0;
    int next = 0, open = -1, singles = 0;
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
        ++singles;
        if (open >= 0) {
          word = open;
          half = 2;
          open = -1;
        } else if (singles == pairs_with_one) {
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
    for (int c = 0; c < TABLE_COPIES; ++c)
      asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(table + (byte * TABLE_COPIES + c) * 8), "r"(places), "r"(halves) : "memory");
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

// Tables of selector bytes by a nibble of an entry; octet B has its halves exchanged.
#define HALVES_A 0x00321044u
#define HALVES_B 0x00103244u

// A unit's steps are expanded in three stages, so that the table's and the words' latencies pass while earlier steps are multiplied:
//   look_up_step   step s + 2: its two table entries
//   load_step      step s + 1: its eight words
//   place_step     step s:     operand A
// `base` is the shared address of the lane's next word, words are 128 bytes apart; `table` that of the lane's copy.
struct Entries {
  uint2 first, second; // of octets A and B
};

struct Step {
  u32 words[8], halves[2]; // of octets A and B
};

// Step s of a unit with `masks`.
__device__ __forceinline__ void look_up_step(const u32 (&masks)[WORDS], int s, u32 table, Entries& e) {
  const int at = s % 2 * 16;
  e.first = load_entry(dot4(masks[s / 2], (u32)(8 * TABLE_COPIES) << at, table));
  e.second = load_entry(dot4(masks[s / 2], (u32)(8 * TABLE_COPIES) << (at + 8), table));
}

__device__ __forceinline__ void load_step(const u32 (&masks)[WORDS], int s, const Entries& e, u32& base, Step& step) {
  const u32 length = (64 * __popc(masks[s / 2] & (0xffffu << (s % 2 * 16))) + 64) & ~127u, last = base + length - 128;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    step.words[j] = load_word(dot4(e.first.x, 128u << (8 * j), base));
    step.words[4 + j] = load_word(dot4_signed(e.second.x, 128u << (8 * j), last)); // the byte 128 is -128
  }
  step.halves[0] = e.first.y;
  step.halves[1] = e.second.y;
  base += length;
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
__device__ __forceinline__ void for_each_step(const u32 (&masks)[WORDS], u32 base, u32 table, Multiply multiply) {
  Entries entries[2];
  Step steps[2];
  u32 a[2][8];
  look_up_step(masks, 0, table, entries[0]);
  look_up_step(masks, 1, table, entries[1]);
  load_step(masks, 0, entries[0], base, steps[0]);
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    if (s + 1 < STEPS) load_step(masks, s + 1, entries[(s + 1) % 2], base, steps[(s + 1) % 2]);
    if (s + 2 < STEPS) look_up_step(masks, s + 2, table, entries[s % 2]);
    place_step(steps[s % 2], a[s % 2]);
    multiply(s, a[s % 2]);
  }
}

// Starts copying a unit's words to `slot` (shared address of word 0, lane 0); `words` are this lane's.
__device__ __forceinline__ void stage_words(const Params& p, u32 slot, int words, u32 offset) {
  const int lane = threadIdx.x & 31;
  const int full = (int)__reduce_min_sync(0xffffffffu, (unsigned)words), longest = (int)__reduce_max_sync(0xffffffffu, (unsigned)words);
  const uint4* source = p.weight + offset;
  for (int i = lane; i < full * 8; i += 32)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(slot + i * 16), "l"(source + i) : "memory");
  const int further = words - full;
  int before = further;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, before, d);
    if (lane >= d) before += other;
  }
  const u32* rest = (const u32*)(source + full * 8) + (before - further);
  u32 target = slot + full * 128 + lane * 4;
  for (int j = 0; j < longest - full; j += 4, target += 512, rest += 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (j + i < further) asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target + i * 128), "l"(rest + i) : "memory");
  }
}

// What must be known of a unit before its words can be fetched.
struct Unit {
  u32 masks[WORDS], offset;
  int words;
};

__device__ __forceinline__ void load_unit(const Params& p, size_t unit, Unit& u, u64 policy) {
  const int lane = threadIdx.x & 31;
  load_positions((const uint4*)((const u32*)p.masks + (unit * 32 + lane) * WORDS), u.masks, policy);
  u.offset = p.offsets[unit];
  u.words = p.counts[unit * 32 + lane];
}
