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

__device__ __forceinline__ u32 pick(u32 low, u32 high, u32 selectors) {
  u32 v;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(low), "r"(high), "r"(selectors));
  return v;
}

// Pair i's codes of four mask bytes as selectors of `pick` over two tables of four bytes: byte b holds code | (code + 4) << 4.
__device__ __forceinline__ u32 code_selectors(u32 masks, int i) { return (masks >> (2 * i) & 0x03030303u) * 0x11u + 0x40404040u; }

// Tables of bytes by a pair's code: the low and the high byte of selectors that place a window's values at the kept columns of a pair, from
// the window's front (low half-word first) or its back, and of selectors of a window of two values out of four that starts behind the
// first pair's values or ends before the last pair's. So pairs 0 and 1 take theirs from a window's front, 2 and 3 from its back.
#define FRONT_LOW 0x10441044u
#define FRONT_HIGH 0x32104444u
#define BACK_LOW 0x10443244u
#define BACK_HIGH 0x32324444u
#define AFTER_LOW 0x54323210u
#define AFTER_HIGH 0x76545432u
#define BEFORE_LOW 0x10323254u
#define BEFORE_HIGH 0x32545476u

// 4:8: values x, y are row g's four, z, w those of row g + 8. codes[i] are code_selectors of pair i, moved so that this step's two mask
// bytes come first. Tables read by shuffles, and counts of set bits, kept a lane waiting for longer.
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
