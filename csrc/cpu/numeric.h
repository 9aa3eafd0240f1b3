// Conversions between fp32 and the 16-bit types, in portable C++. In an unnamed namespace for the reason given in kernels.h.
#pragma once

#include <stdint.h>
#include <string.h>

namespace sparse_engine {
namespace {

inline float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct Bf16 {
  using Storage = uint16_t;
  static inline float load(const uint8_t* p) {
    uint16_t bits;
    memcpy(&bits, p, sizeof bits);
    return float_from_bits(uint32_t(bits) << 16);
  }
  static inline Storage round(float value) { // to nearest, ties to even
    uint32_t bits = bits_from_float(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
};

struct Fp16 {
  using Storage = uint16_t;
  static inline float load(const uint8_t* p) {
    uint16_t half;
    memcpy(&half, p, sizeof half);
    uint32_t sign = uint32_t(half & 0x8000u) << 16;
    uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    // Shifted into place the number is 2^-112 of its value, subnormals included.
    float scaled = float_from_bits(magnitude << 13) * 0x1p112f;
    return float_from_bits(sign | bits_from_float(scaled));
  }
  static inline Storage round(float value) { // to nearest, ties to even
    uint32_t bits = bits_from_float(value);
    uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u); // 65520 and above round to infinity
    if (magnitude < 0x38800000u) {                                 // subnormal: adding 0.5 lets the addition round at 2^-24
      float shifted = float_from_bits(magnitude) + 0.5f;
      return uint16_t(sign | (bits_from_float(shifted) - 0x3f000000u));
    }
    uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23);
    return uint16_t(sign | (rounded >> 13));
  }
};

struct Fp32 {
  using Storage = float;
  static inline float load(const uint8_t* p) {
    float value;
    memcpy(&value, p, sizeof value);
    return value;
  }
  static inline Storage round(float value) { return value; }
};

// Bits of the columns from 64 * word to the row's end as one integer, bit j for column 64 * word + j; reads the row's own bytes only.
inline uint64_t tail_bits(const uint8_t* bitmask, int64_t word, int64_t columns) {
  int left = int(columns - 64 * word);
  uint64_t bits = 0;
  for (int b = 0; 8 * b < left; ++b)
    bits |= uint64_t(bitmask[8 * word + b]) << (8 * b);
  return bits & (~uint64_t(0) >> (64 - left));
}

// The 64 bits of word `word`, of which fewer may belong to the row at its end.
inline uint64_t word_bits(const uint8_t* bitmask, int64_t word, int64_t columns) {
  if (columns - 64 * word < 64) return tail_bits(bitmask, word, columns);
  uint64_t bits; // little-endian, as the bitmask is
  memcpy(&bits, bitmask + 8 * word, sizeof bits);
  return bits;
}

} // namespace
} // namespace sparse_engine
