// Expansion of packed values in registers: operand A of two m16n8k16 products from a lane's eight columns of rows g and g + 8.
// Needs the type u32 before it. A mask byte is four pairs of columns; a pair's two bits are its code, 0 .. 3.
#pragma once

// Bytes of {0, window} picked by the low 16 bits of `selectors`. __byte_perm would clear bits of the selectors first, at one
// instruction each.
__device__ __forceinline__ u32 permute(u32 window, u32 selectors) {
  u32 v;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(v) : "r"(window), "r"(selectors));
  return v;
}

// Selectors for permute(window, .) that place a window's values at the kept columns of a pair, by the pair's two mask bits: the
// values come from the window's front (low half-word first) or its back.
__device__ __forceinline__ u32 front_selector(int bits) { return bits == 0 ? 0x4444 : bits == 1 ? 0x4410 : bits == 2 ? 0x1044 : 0x3210; }
__device__ __forceinline__ u32 back_selector(int bits) { return bits == 0 ? 0x4444 : bits == 1 ? 0x4432 : bits == 2 ? 0x3244 : 0x3210; }

// A table of 16 words spread over the lanes (lane l holds entry l % 16) and read by shuffle: any lane may look up any mask of four
// columns, without bank conflicts and without clearing the index's upper bits.
__device__ __forceinline__ u32 look_up(u32 entry, u32 index) { return __shfl_sync(0xffffffffu, entry, (int)index); }

// Of four columns, selectors of pairs 0 and 1 by their codes, for values taken from the front of a window and from its back.
struct Tables {
  u32 front0, front1, back0, back1;
};

__device__ __forceinline__ Tables make_tables(int lane) {
  return {front_selector(lane & 3), front_selector(lane >> 2 & 3), back_selector(lane & 3), back_selector(lane >> 2 & 3)};
}

// The four column pairs of a group of eight from its four values (v0 low in `low`), by the mask byte at bit `at` of `masks`.
// A pair takes its kept values from a window of two: from the front for pairs 0 and 1, from the back for 2 and 3.
__device__ __forceinline__ void expand_group(u32 low, u32 high, u32 masks, int at, const Tables& t, u32& p0, u32& p1, u32& p2, u32& p3) {
  const u32 first = masks >> at, second = masks >> (at + 4);
  p0 = permute(low, look_up(t.front0, first));
  p1 = permute(__funnelshift_rc(low, high, 16 * __popc(masks & (0x03u << at))), look_up(t.front1, first));
  p2 = permute(__funnelshift_lc(low, high, 16 * __popc(masks & (0xc0u << at))), look_up(t.back0, second));
  p3 = permute(high, look_up(t.back1, second));
}

// 4:8, with selectors looked up by shuffle: values x, y and mask byte 0 (at bit `at`) are row g, z, w and byte 1 row g + 8.
__device__ __forceinline__ void expand_step(const uint4& values, u32 masks, int at, const Tables& t, u32 (&a)[8]) {
  expand_group(values.x, values.y, masks, at, t, a[0], a[2], a[4], a[6]);
  expand_group(values.z, values.w, masks, at + 8, t, a[1], a[3], a[5], a[7]);
}

__device__ __forceinline__ u32 pick(u32 low, u32 high, u32 selectors) {
  u32 v;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(low), "r"(high), "r"(selectors));
  return v;
}

// Pair i's codes of four mask bytes as selectors of `pick` over two tables of four bytes: byte b holds code | (code + 4) << 4.
__device__ __forceinline__ u32 code_selectors(u32 masks, int i) { return (masks >> (2 * i) & 0x03030303u) * 0x11u + 0x40404040u; }

// Tables of bytes by a pair's code: the low and the high byte of front_selector and back_selector, and of the selector of a window of two
// values out of four that starts behind the first pair's values or ends before the last pair's.
#define FRONT_LOW 0x10441044u
#define FRONT_HIGH 0x32104444u
#define BACK_LOW 0x10443244u
#define BACK_HIGH 0x32324444u
#define AFTER_LOW 0x54323210u
#define AFTER_HIGH 0x76545432u
#define BEFORE_LOW 0x10323254u
#define BEFORE_HIGH 0x32545476u

// 4:8 with arithmetic in place of shuffles and counts of set bits, which keep a lane waiting for longer. codes[i] are code_selectors of
// pair i, moved so that this step's two mask bytes come first.
__device__ __forceinline__ void expand_step(const uint4& values, const u32 (&codes)[4], u32 (&a)[8]) {
  const u32 s0 = pick(FRONT_LOW, FRONT_HIGH, codes[0]), s1 = pick(FRONT_LOW, FRONT_HIGH, codes[1]);
  const u32 s2 = pick(BACK_LOW, BACK_HIGH, codes[2]), s3 = pick(BACK_LOW, BACK_HIGH, codes[3]);
  const u32 after = pick(AFTER_LOW, AFTER_HIGH, codes[0]), before = pick(BEFORE_LOW, BEFORE_HIGH, codes[3]);
  a[0] = permute(values.x, s0);
  a[2] = permute(pick(values.x, values.y, after), s1);
  a[4] = permute(pick(values.x, values.y, before), s2);
  a[6] = permute(values.y, s3);
  a[1] = permute(values.z, s0 >> 16);
  a[3] = permute(pick(values.z, values.w, after >> 16), s1 >> 16);
  a[5] = permute(pick(values.z, values.w, before >> 16), s2 >> 16);
  a[7] = permute(values.w, s3 >> 16);
}

__device__ __forceinline__ void exchange_across(u32& low, u32& high, int lanes, bool upper) {
  const u32 other = __shfl_xor_sync(0xffffffffu, upper ? low : high, lanes);
  low = upper ? other : low;
  high = upper ? high : other;
}

// For activations whose columns lie in their own order: lane (g, t) has the column pairs 0 .. 3 of group t of a step, of rows g (a[0],
// a[2], a[4], a[6]) and g + 8 (a[1], ...), and gets pair t of groups 0 .. 3 in their places.
__device__ __forceinline__ void exchange_pairs(u32 (&a)[8]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    exchange_across(a[row], a[row + 2], 1, odd);
    exchange_across(a[row + 4], a[row + 6], 1, odd);
    exchange_across(a[row], a[row + 4], 2, upper);
    exchange_across(a[row + 2], a[row + 6], 2, upper);
  }
}
