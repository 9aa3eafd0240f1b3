// int8 and int4 weights on AVX-512: kept values are expanded over the mask's set bits as bytes, 64 columns at a time, and
// multiplied by int8 activations with vpdpbusd, which wants one side unsigned.
//
//   x        q + 128, unsigned             q the int8 activation
//   w        a 0 0 b 0 c d 0 ..            vpexpandb of 64 mask bits
//   sum      Σ w (q + 128) - 128 Σ w       the second sum once per weight row, whatever the number of activation rows
//
// int4 values become bytes first: a quarter of the register holds each run of 8 nibbles in front of 32 bits of its own,
// vpmultishiftqb brings every nibble to the bottom of a byte, and vgf2p8affineqb copies its sign upwards.
// Two words, 128 columns, go together: the span of an int4 scale.

#include <immintrin.h>

#include <utility>

#include "kernels.h"
#include "numeric.h"
#include "sparse_engine.h"

namespace sparse_engine {
namespace {

inline int count(uint64_t bits) { return int(_mm_popcnt_u64(bits)); }

inline __mmask64 first(int64_t n) { return n >= 64 ? ~uint64_t(0) : n <= 0 ? 0 : (uint64_t(1) << n) - 1; }

inline __m512 load_fp32(Bf16, const uint8_t* p, int64_t n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16(first(n)), p)), 16));
}
inline __m512 load_fp32(Fp16, const uint8_t* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16(first(n)), p)); }
inline __m512 load_fp32(Fp32, const uint8_t* p, int64_t n) { return _mm512_maskz_loadu_ps(__mmask16(first(n)), p); }

// Activations become uint8 (padded_columns / 64, m, 64).
template <class X>
void pack_x(const void* x, int m, int64_t columns, int64_t padded_columns, void* packed) {
  constexpr int64_t kBytes = sizeof(typename X::Storage);
  auto scales = static_cast<float*>(packed);
  for (int i = 0; i < m; ++i) {
    const uint8_t* row = static_cast<const uint8_t*>(x) + i * columns * kBytes;
    // Magnitudes order as their bits do, with NaN on top, so that it reaches the result.
    __m512i most = _mm512_setzero_si512();
    for (int64_t c = 0; c < columns; c += 16) {
      __m512i bits = _mm512_castps_si512(load_fp32(X{}, row + c * kBytes, columns - c));
      most = _mm512_max_epu32(most, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
    }
    float magnitude = float_from_bits(_mm512_reduce_max_epu32(most));
    float inverse = magnitude > 0x1p-120f && magnitude < 0x1p127f ? 127.0f / magnitude : 0.0f;
    scales[i] = magnitude / 127.0f;
    auto target = static_cast<uint8_t*>(packed) + kActivationHeader + 64 * i;
    for (int64_t c = 0; c < padded_columns; c += 16) {
      __m128i q = _mm_setzero_si128();
      if (c < columns && inverse != 0.0f) {
        __m512 scaled = _mm512_mul_ps(load_fp32(X{}, row + c * kBytes, columns - c), _mm512_set1_ps(inverse));
        q = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(scaled));
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + c / 64 * 64 * m + c % 64), _mm_xor_si128(q, _mm_set1_epi8(char(0x80))));
    }
  }
}

// Bytes ahead of its row's pointer that a prefetch touches. Rows of one stream lie end to end, so it runs on into the next.
constexpr int kPrefetch = 512;

inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

inline uint64_t load_bits(const uint8_t* bitmask) {
  uint64_t bits;
  memcpy(&bits, bitmask, sizeof bits);
  return bits;
}

// The weights of one row, read from its start: `pair` is 128 columns as int8 in two registers.
struct Pair {
  __m512i w[2];
  __m512i sum; // 128 Σ w in int32 lanes, whichever lane a weight falls into
};

inline __m512i times_128(__m512i w) { return _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(char(0x80)), w); }

struct Int8 {
  static constexpr bool kGroups = false;
  const uint8_t* values;

  explicit Int8(const uint8_t* values) : values(values) {}
  inline void ahead() const { prefetch(values + kPrefetch); }
  inline __m512i word(uint64_t mask) {
    __m512i w = _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(values));
    values += count(mask);
    return w;
  }
  inline Pair dense() {
    Pair p{{_mm512_loadu_si512(values), _mm512_loadu_si512(values + 64)}, {}};
    prefetch(values + 64 + kPrefetch);
    values += 128;
    p.sum = _mm512_dpbusd_epi32(times_128(p.w[0]), _mm512_set1_epi8(char(0x80)), p.w[1]);
    return p;
  }
  inline __m512i dense_word(int64_t n) {
    __m512i w = _mm512_maskz_loadu_epi8(first(n), values);
    values += 64;
    return w;
  }
  inline Pair any(uint64_t m0, uint64_t m1) {
    Pair p;
    p.w[0] = word(m0);
    p.w[1] = word(m1);
    p.sum = _mm512_dpbusd_epi32(times_128(p.w[0]), _mm512_set1_epi8(char(0x80)), p.w[1]);
    return p;
  }
  // Both words keep 32 values: one register of them.
  inline Pair half(uint64_t m0, uint64_t m1) {
    __m512i v = _mm512_loadu_si512(values);
    values += 64;
    return {{_mm512_maskz_expand_epi8(m0, v), _mm512_maskz_expand_epi8(m1, _mm512_castsi256_si512(_mm512_extracti64x4_epi64(v, 1)))},
            times_128(v)};
  }
  static inline __m512 scale(const uint8_t* scales, int64_t) { return _mm512_set1_ps(Fp32::load(scales)); }
};

struct Int4 {
  static constexpr bool kGroups = true;
  // The matrix over bits that keeps the low four and copies the fourth upwards.
  static constexpr long long kSignCopies = 0x0102040808080808;
  const uint8_t* values;
  uint64_t nibbles = 0; // values taken so far

  explicit Int4(const uint8_t* values) : values(values) {}
  inline void ahead() const { prefetch(values + nibbles / 2 + kPrefetch); }
  // Each 64-bit lane's nibbles from bit `shift` on as 8 signed bytes.
  static inline __m512i spread(__m512i lanes, int64_t shift) {
    const __m512i from = _mm512_add_epi8(_mm512_set1_epi64(0x1c1814100c080400), _mm512_set1_epi8(char(shift)));
    return sign(_mm512_multishift_epi64_epi8(from, lanes));
  }
  static inline __m512i sign(__m512i nibbles) { return _mm512_gf2p8affine_epi64_epi8(nibbles, _mm512_set1_epi64(0x0102040808080808), 0); }
  inline __m512i word(uint64_t mask) {
    const __m512i neighbours = _mm512_setr_epi32(0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8);
    __m512i lanes = _mm512_permutexvar_epi32(neighbours, _mm512_loadu_si512(values + nibbles / 2));
    __m512i w = _mm512_maskz_expand_epi8(mask, spread(lanes, int64_t(nibbles % 2 * 4)));
    nibbles += uint64_t(count(mask));
    return w;
  }
  inline Pair any(uint64_t m0, uint64_t m1) {
    Pair p;
    p.w[0] = word(m0);
    p.w[1] = word(m1);
    p.sum = times_128(_mm512_add_epi8(p.w[0], p.w[1]));
    return p;
  }
  // Both words keep 32 values. In halves of a register, as an expansion reads its source from the bottom.
  inline Pair half(uint64_t m0, uint64_t m1) {
    const __m256i from = _mm256_set1_epi64x(0x1c1814100c080400), copies = _mm256_set1_epi64x(kSignCopies);
    __m256i v[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      __m256i lanes = _mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + nibbles / 2 + 16 * i)));
      v[i] = _mm256_gf2p8affine_epi64_epi8(_mm256_multishift_epi64_epi8(from, lanes), copies, 0);
    }
    nibbles += 64;
    // Sums of two values fit a byte, and it does not matter which lane of the result they fall into.
    __m256i sum = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(char(0x80)), _mm256_add_epi8(v[0], v[1]));
    return {{_mm512_maskz_expand_epi8(m0, _mm512_castsi256_si512(v[0])), _mm512_maskz_expand_epi8(m1, _mm512_castsi256_si512(v[1]))},
            _mm512_zextsi256_si512(sum)};
  }
  static inline __m512 scale(const uint8_t* scales, int64_t pair) {
    int16_t half;
    memcpy(&half, scales + 2 * pair, sizeof half);
    return _mm512_cvtph_ps(_mm256_set1_epi16(half));
  }
  // The next 16 (or `left`) scales as fp32: one conversion for 16 pairs.
  static inline __m512 scales(const uint8_t* scales, int64_t pair, int64_t left) { return load_fp32(Fp16{}, scales + 2 * pair, left); }
};

// What vpdpbusd sums: with the general type of integer registers, GCC keeps arrays of sums in memory.
typedef int32_t Int32x16 __attribute__((vector_size(64)));

enum class Kind { kAny, kHalf, kDense };

// Between two conversions to fp32 no int32 lane can overflow: 4 products of at most 255 · 128 per 64 columns.
constexpr int64_t kPairsPerFlush = 4096;

template <class V, int M, int R, Kind kind>
struct Block {
  const Rows& rows;
  const uint8_t* x;
  V source[R];
  Int32x16 sum[R][M], weights[R];
  __m512 total[R][M];
  static constexpr int kScales = 16; // pairs of int4 whose scales are converted at once

  template <int... r>
  Block(const Rows& rows, const void* activations, std::integer_sequence<int, r...>)
      : rows(rows), x(static_cast<const uint8_t*>(activations) + kActivationHeader), source{V(rows.values[r])...} {
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        total[i][m] = _mm512_setzero_ps();
    }
    clear();
  }

  inline void clear() {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      weights[r] = Int32x16{};
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        sum[r][m] = Int32x16{};
    }
  }

  inline void multiply(const Pair (&p)[R], const float (&scales)[R][kScales], int64_t pair) {
    if constexpr (V::kGroups) {
      __m512i start[R];
      __m512 scale[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        start[r] = _mm512_sub_epi32(_mm512_setzero_si512(), p[r].sum);
        scale[r] = _mm512_set1_ps(scales[r][pair % kScales]);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        __m512i x0 = _mm512_loadu_si512(x + 64 * m), x1 = _mm512_loadu_si512(x + 64 * (M + m));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          __m512i t = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start[r], x0, p[r].w[0]), x1, p[r].w[1]);
          total[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(t), scale[r], total[r][m]);
        }
      }
    } else {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        weights[r] += Int32x16(p[r].sum);
#pragma GCC unroll 16
      for (int i = 0; i < 2 * M; ++i) {
        __m512i xs = _mm512_loadu_si512(x + 64 * i);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          sum[r][i % M] = Int32x16(_mm512_dpbusd_epi32(__m512i(sum[r][i % M]), xs, p[r].w[i / M]));
      }
    }
    x += 128 * M;
  }

  inline void flush() {
    if constexpr (!V::kGroups) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
          total[r][m] = _mm512_add_ps(total[r][m], _mm512_cvtepi32_ps(__m512i(sum[r][m] - weights[r])));
      }
      clear();
    }
  }

  inline void pairs(int64_t begin, int64_t end) {
    alignas(64) float scales[R][kScales];
    for (int64_t i = begin; i < end; ++i) {
      if constexpr (V::kGroups) {
        if (i % kScales == 0)
          for (int r = 0; r < R; ++r)
            _mm512_store_ps(scales[r], V::scales(rows.scales[r], i, end - i));
      }
      Pair p[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        source[r].ahead();
        if constexpr (kind == Kind::kDense) {
          p[r] = source[r].dense();
        } else {
          const uint8_t* bitmask = rows.bitmask[r] + 16 * i;
          if constexpr (kind == Kind::kHalf)
            p[r] = source[r].half(load_bits(bitmask), load_bits(bitmask + 8));
          else
            p[r] = source[r].any(load_bits(bitmask), load_bits(bitmask + 8));
        }
      }
      multiply(p, scales, i);
    }
  }

  // The columns behind the last whole pair. Activations are padded to a word, so the second one may have none.
  inline void rest(int64_t pair, int64_t columns) {
    int64_t left = columns - 128 * pair;
    if (left == 0) return;
    __m512i w[2][R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        int64_t word = 2 * pair + half;
        if (64 * word >= columns) {
          w[half][r] = _mm512_setzero_si512();
          continue;
        }
        if constexpr (kind == Kind::kDense)
          w[half][r] = source[r].dense_word(columns - 64 * word);
        else
          w[half][r] = source[r].word(word_bits(rows.bitmask[r], word, columns));
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __m512i offset = _mm512_add_epi32(times_128(w[0][r]), times_128(w[1][r]));
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        __m512i t = _mm512_dpbusd_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), offset), _mm512_loadu_si512(x + 64 * m), w[0][r]);
        if (left > 64) t = _mm512_dpbusd_epi32(t, _mm512_loadu_si512(x + 64 * (M + m)), w[1][r]);
        total[r][m] =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(t), V::kGroups ? V::scale(rows.scales[r], pair) : _mm512_set1_ps(1.0f), total[r][m]);
      }
    }
  }

  inline void finish(const float* x_scales, float* out) const {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        out[r * M + m] = _mm512_reduce_add_ps(total[r][m]) * x_scales[m] * (V::kGroups ? 1.0f : Fp32::load(rows.scales[r]));
    }
  }
};

template <class V, int M, int R, Kind kind>
void products(const Rows& rows, const void* x, int64_t columns, float* out) {
  Block<V, M, R, kind> block(rows, x, std::make_integer_sequence<int, R>{});
  int64_t pairs = columns / 128;
  for (int64_t begin = 0; begin < pairs; begin += kPairsPerFlush) {
    block.pairs(begin, begin + kPairsPerFlush < pairs ? begin + kPairsPerFlush : pairs);
    block.flush();
  }
  block.rest(pairs, columns);
  block.finish(static_cast<const float*>(x), out);
}

inline void store(Bf16, uint8_t* target, __mmask16 lanes, __m512 v) {
  _mm256_mask_storeu_epi16(target, lanes, __m256i(_mm512_cvtneps_pbh(v)));
}
inline void store(Fp16, uint8_t* target, __mmask16 lanes, __m512 v) {
  _mm256_mask_storeu_epi16(target, lanes, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(Fp32, uint8_t* target, __mmask16 lanes, __m512 v) { _mm512_mask_storeu_ps(target, lanes, v); }

template <class V, class Out>
void expand_row(const Rows& rows, int64_t columns, void* out) {
  V source(rows.values[0]);
  auto target = static_cast<uint8_t*>(out);
  for (int64_t c = 0; c < columns; c += 64) {
    alignas(64) int8_t word[64];
    _mm512_store_si512(word, source.word(word_bits(rows.bitmask[0], c / 64, columns)));
    __m512 scale = V::scale(rows.scales[0], c / 128);
    for (int64_t i = 0; i < 64 && c + i < columns; i += 16) {
      __m512 w = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(word + i))));
      store(Out{}, target + (c + i) * int64_t(sizeof(typename Out::Storage)), __mmask16(first(columns - c - i)), _mm512_mul_ps(w, scale));
    }
  }
}

constexpr int rows_for(int m) { return m == 1 ? 4 : 2; }

template <class V, int M>
void fill(ValueKernels& set) {
  set.packed[0][M] = products<V, M, rows_for(M), Kind::kAny>;
  set.packed[1][M] = products<V, M, rows_for(M), Kind::kHalf>;
  set.packed_one[M] = products<V, M, 1, Kind::kAny>;
  if constexpr (!V::kGroups) {
    set.dense[M] = products<V, M, rows_for(M), Kind::kDense>;
    set.dense_one[M] = products<V, M, 1, Kind::kDense>;
  }
  if constexpr (M > 1) fill<V, M - 1>(set);
}

template <class V>
ValueKernels kernels_for() {
  ValueKernels set{};
  set.x_bytes = 1;
  set.max_m = kMaxActivations;
  set.rows_one = rows_for(1);
  set.rows_many = rows_for(2);
  set.pack[SPARSE_ENGINE_BF16] = pack_x<Bf16>;
  set.pack[SPARSE_ENGINE_FP16] = pack_x<Fp16>;
  set.pack[SPARSE_ENGINE_FP32] = pack_x<Fp32>;
  set.expand[SPARSE_ENGINE_BF16] = expand_row<V, Bf16>;
  set.expand[SPARSE_ENGINE_FP16] = expand_row<V, Fp16>;
  set.expand[SPARSE_ENGINE_FP32] = expand_row<V, Fp32>;
  fill<V, kMaxActivations>(set);
  return set;
}

} // namespace

ValueKernels avx512_int8() { return kernels_for<Int8>(); }
ValueKernels avx512_int4() { return kernels_for<Int4>(); }

} // namespace sparse_engine
