// What the AVX-512 products of many activation rows share: how activations are packed for them, and how their sums become results.
// In an unnamed namespace for the reason given in kernels.h.
#pragma once

#include "avx512_common.h"

namespace sparse_engine {
namespace {

constexpr int kLanes = 16;
constexpr int kBlock = 2 * kLanes; // activation rows of a full block; the last one may be half as wide

template <class Body, int... i>
[[gnu::always_inline]] inline void each(Body body, std::integer_sequence<int, i...>) {
  (body(std::integral_constant<int, i>{}), ...);
}

// body(0) .. body(N - 1) with constant indices, so that the arrays they index live in registers: a pragma on a loop comes too late for
// that.
template <int N, class Body>
[[gnu::always_inline]] inline void unrolled(Body body) {
  each(body, std::make_integer_sequence<int, N>{});
}

inline int64_t padded(int64_t columns) { return (columns + kColumnPad - 1) / kColumnPad * kColumnPad; }

inline int64_t width(int64_t rows_left) { return rows_left > kLanes ? kBlock : kLanes; }

void transpose(__m512i (&r)[kLanes]) {
  __m512i t[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      r[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + 2 + j]);
      r[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + 2 + j]);
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
  }
}

// bf16 activations: a dword holds two columns.
struct Bf16Columns {
  static constexpr int kPerDword = 2;
  static constexpr bool kInteger = false, kGroups = false;
  // 16 dwords of one activation row: 32 columns.
  static inline __m512i dwords(Bf16, const uint8_t* x, int64_t n, float) { return _mm512_maskz_loadu_epi16(__mmask32(first(n)), x); }
  template <class X>
  static inline __m512i dwords(X t, const uint8_t* x, int64_t n, float) {
    __m512 high = n > 16 ? load_fp32(t, x + 16 * sizeof(typename X::Storage), n - 16) : _mm512_setzero_ps();
    return __m512i(_mm512_cvtne2ps_pbh(high, load_fp32(t, x, n)));
  }
};

// Packed activations: an fp32 scale for each row, then a block after another; bytes of one lane's row of it per column.
template <class P>
constexpr int64_t bytes_per_row(int64_t padded_columns) {
  return padded_columns / P::kPerDword * 4;
}

inline int64_t padded_rows(int64_t m) { return (m + kLanes - 1) / kLanes * kLanes; }

inline int64_t header_bytes(int64_t m) { return padded_rows(m) * 4; }

template <class P>
size_t activation_bytes(int64_t m, int64_t columns) {
  return size_t(header_bytes(m) + padded_rows(m) * bytes_per_row<P>(padded(columns)));
}

template <class X>
float largest_magnitude(const uint8_t* row, int64_t columns) {
  __m512i most = _mm512_setzero_si512();
  for (int64_t c = 0; c < columns; c += 16) {
    __m512i bits = _mm512_castps_si512(load_fp32(X{}, row + c * int64_t(sizeof(typename X::Storage)), columns - c));
    most = _mm512_max_epu32(most, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
  }
  return float_from_bits(_mm512_reduce_max_epu32(most));
}

// Rows [16 part.., ..) of x by 16 at a time. A block is (dwords, rows, 4 bytes).
template <class P, class X>
void pack(const void* x, int64_t m, int64_t columns, void* packed, int64_t part, int64_t parts) {
  constexpr int64_t kBytes = sizeof(typename X::Storage);
  constexpr int kChunk = kLanes * P::kPerDword; // columns of 16 dwords
  auto scales = static_cast<float*>(packed);
  auto blocks = static_cast<uint8_t*>(packed) + header_bytes(m);
  int64_t row_bytes = bytes_per_row<P>(padded(columns)), sixteens = padded_rows(m) / kLanes;
  for (int64_t s = sixteens * part / parts; s < sixteens * (part + 1) / parts; ++s) {
    int64_t row = s * kLanes, block = row / kBlock * kBlock;
    int64_t stride = width(m - block) * 4;
    uint8_t* target = blocks + block * row_bytes + (row - block) * 4;
    const uint8_t* from[kLanes];
    float inverse[kLanes] = {};
    for (int i = 0; i < kLanes; ++i) {
      from[i] = row + i < m ? static_cast<const uint8_t*>(x) + (row + i) * columns * kBytes : nullptr;
      float magnitude = P::kInteger && from[i] ? largest_magnitude<X>(from[i], columns) : 0.0f;
      inverse[i] = magnitude > 0x1p-120f && magnitude < 0x1p127f ? 127.0f / magnitude : 0.0f;
      scales[row + i] = magnitude / 127.0f;
    }
    for (int64_t c = 0; c < padded(columns); c += kChunk) {
      __m512i r[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        r[i] = from[i] && c < columns ? P::dwords(X{}, from[i] + c * kBytes, columns - c, inverse[i]) : _mm512_setzero_si512();
      transpose(r);
      for (int i = 0; i < kLanes; ++i, target += stride)
        _mm512_store_si512(target, r[i]);
    }
  }
}

// Sums of n weight rows lie block after block of activation rows, each (n, width), so that a step of the product finds its own close
// together.
inline int64_t sums_bytes(int64_t rows, int64_t m) { return rows * padded_rows(m) * 4; }

inline void store_16(const Output& y, int64_t at, __mmask16 lanes, __m512 v) {
  switch (y.dtype) {
  case SPARSE_ENGINE_BF16: {
    // By hand: vcvtneps2bf16 would flush subnormals.
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y.data) + at, lanes, _mm512_cvtepi32_epi16(rounded));
    break;
  }
  case SPARSE_ENGINE_FP16:
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y.data) + at, lanes, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    break;
  default: _mm512_mask_storeu_ps(static_cast<float*>(y.data) + at, lanes, v);
  }
}

// The sums of m activation rows from `first_x` on to y, transposed 16 by 16, with the rows' and activations' scales and the bias.
template <class P>
void finish(const PanelRow* rows, int64_t n, const float* sums, int64_t first_x, int64_t m, const float* x_scales, const int32_t* row_sums,
            const Output& y, int64_t first_row) {
  for (int64_t r = 0; r < n; r += kLanes) {
    auto lanes = __mmask16(first(n - r));
    __m512 bias = _mm512_setzero_ps(), scale = _mm512_set1_ps(1.0f);
    __m512i offset = _mm512_setzero_si512();
    if (y.bias) {
      auto from = static_cast<const uint8_t*>(y.bias) + (first_row + r) * (y.bias_dtype == SPARSE_ENGINE_FP32 ? 4 : 2);
      bias = y.bias_dtype == SPARSE_ENGINE_BF16   ? load_fp32(Bf16{}, from, n - r)
             : y.bias_dtype == SPARSE_ENGINE_FP16 ? load_fp32(Fp16{}, from, n - r)
                                                  : load_fp32(Fp32{}, from, n - r);
    }
    if constexpr (P::kInteger && !P::kGroups) {
      alignas(64) float row_scales[kLanes] = {};
      for (int64_t i = r; i < n && i < r + kLanes; ++i)
        row_scales[i - r] = P::scale(rows[i].scales, 0);
      scale = _mm512_load_ps(row_scales);
      offset = _mm512_maskz_loadu_epi32(lanes, row_sums + r);
    }
    for (int64_t j = 0; j < m; j += kLanes) {
      int64_t block = j / kBlock * kBlock, stride = width(m - block);
      const float* from = sums + block * n + r * stride + (j - block);
      __m512i v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        v[i] = r + i < n ? _mm512_load_si512(from + i * stride) : _mm512_setzero_si512();
      transpose(v);
      for (int64_t i = 0; i < kLanes && j + i < m; ++i) {
        __m512 sum = _mm512_castsi512_ps(v[i]);
        if constexpr (P::kInteger) {
          if constexpr (!P::kGroups) sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(v[i], offset));
          sum = _mm512_mul_ps(sum, _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[first_x + j + i])));
        }
        store_16(y, (first_x + j + i) * y.stride + first_row + r, lanes, _mm512_add_ps(sum, bias));
      }
    }
  }
}

} // namespace
} // namespace sparse_engine
