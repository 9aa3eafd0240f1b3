// int8 and int4 weights on AVX-512: kept values are expanded over the mask's set bits as bytes, 64 columns at a time, and
// multiplied by int8 activations with vpdpbusd, which wants one side unsigned: the weights, moved by an offset z.
//
//   w        a z z b z c d z ..            vpexpandb of 64 mask bits onto a register of z; z is 128 for int8 and 8 for int4
//   x        q                             the int8 activation
//   sum      -z Σ q + Σ (w + z) q          the first sum, over all columns, is the same for all weight rows: packing computes it once
//
// int4 values become bytes first: a quarter of the register holds each run of 8 nibbles in front of 32 bits of its own,
// and vpmultishiftqb brings every nibble to the bottom of a byte. Two words, 128 columns, go together: the span of an int4 scale.

#include <immintrin.h>

#include "avx512_common.h"

namespace sparse_engine {
namespace {

template <class V>
int64_t start_count(int64_t padded_columns) {
  return (padded_columns + V::kStartColumns - 1) / V::kStartColumns;
}

// The lanes of what kColumns columns' products begin at, -z Σ q.
inline __m512i start_of(int offset, const uint8_t* x, int64_t words, int64_t stride) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < words; ++i)
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(char(offset)), _mm512_loadu_si512(x + i * stride));
  return _mm512_sub_epi32(_mm512_setzero_si512(), sum);
}

// Activations become starts int32 (starts, m, 16), one for every V::kStartColumns columns, and behind them int8 (padded_columns / 64, m,
// 64).
template <class V, class X>
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
    int64_t starts = start_count<V>(padded_columns);
    auto start = static_cast<uint8_t*>(packed) + kActivationHeader + 64 * i;
    uint8_t* target = start + starts * 64 * m;
    for (int64_t c = 0; c < padded_columns; c += 16) {
      __m128i q = _mm_setzero_si128();
      if (c < columns && inverse != 0.0f) {
        __m512 scaled = _mm512_mul_ps(load_fp32(X{}, row + c * kBytes, columns - c), _mm512_set1_ps(inverse));
        q = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(scaled));
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + c / 64 * 64 * m + c % 64), q);
    }
    for (int64_t s = 0; s < starts; ++s) {
      int64_t word = s * V::kStartColumns / 64, words = columns / 128 * 2 - word; // of whole pairs
      words = words < V::kStartColumns / 64 ? words : V::kStartColumns / 64;
      _mm512_storeu_si512(start + s * 64 * m, start_of(V::kOffset, target + word * 64 * m, words, 64 * m));
    }
  }
}

// Bytes ahead of its row's pointer that a prefetch touches. Rows of one stream lie end to end, so it runs on into the next.
constexpr int kPrefetch = 512;

inline uint64_t load_bits(const uint8_t* bitmask) {
  uint64_t bits;
  memcpy(&bits, bitmask, sizeof bits);
  return bits;
}

// The weights of one row, read from its start: `pair` is 128 columns, moved by the offset, in two registers.
struct Pair {
  __m512i w[2];
};

// The first values of `v` over the mask's set bits; zero, moved by the offset, over the others.
template <int kOffset>
inline __m512i spread(uint64_t mask, __m512i v) {
  return _mm512_mask_expand_epi8(_mm512_set1_epi8(char(kOffset)), mask, v);
}

// Between two conversions to fp32 no int32 lane can overflow: 4 products of at most 255 · 128 per 64 columns.
constexpr int64_t kPairsPerFlush = 4096;

struct Int8 {
  static constexpr bool kGroups = false;
  static constexpr int kOffset = 128;
  static constexpr int64_t kStartColumns = 128 * kPairsPerFlush;
  const uint8_t* values;

  explicit Int8(const uint8_t* values) : values(values) {}
  inline void ahead() const { prefetch(values + kPrefetch); }
  static inline __m512i moved(__m512i v) { return _mm512_xor_si512(v, _mm512_set1_epi8(char(kOffset))); }
  inline __m512i word(uint64_t mask) {
    __m512i w = spread<kOffset>(mask, moved(_mm512_loadu_si512(values)));
    values += count(mask);
    return w;
  }
  inline Pair dense() {
    Pair p{{moved(_mm512_loadu_si512(values)), moved(_mm512_loadu_si512(values + 64))}};
    prefetch(values + 64 + kPrefetch);
    values += 128;
    return p;
  }
  inline __m512i dense_word(int64_t n) {
    __m512i w = moved(_mm512_maskz_loadu_epi8(first(n), values));
    values += 64;
    return w;
  }
  inline Pair any(uint64_t m0, uint64_t m1) {
    Pair p;
    p.w[0] = word(m0);
    p.w[1] = word(m1);
    return p;
  }
  static constexpr int64_t kHalfBytes = 64;
  inline const uint8_t* byte() const { return values; }
  inline void take(int64_t pairs) { values += kHalfBytes * pairs; }
  // Both words keep 32 values. In halves of a register, as an expansion reads its source from the bottom.
  static inline Pair half(const uint8_t* values, uint64_t m0, uint64_t m1) {
    const __m256i offset = _mm256_set1_epi8(char(kOffset));
    __m256i v0 = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)), offset);
    __m256i v1 = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 32)), offset);
    return {{spread<kOffset>(m0, _mm512_castsi256_si512(v0)), spread<kOffset>(m1, _mm512_castsi256_si512(v1))}};
  }
  static inline __m512 scale(const uint8_t* scales, int64_t) { return _mm512_set1_ps(Fp32::load(scales)); }
};

// Where the 8 nibbles of a 64-bit lane begin, from its first or second one on.
struct From {
  alignas(64) uint8_t bits[2][64];
};

constexpr From make_from() {
  From t{};
  for (int odd = 0; odd < 2; ++odd)
    for (int i = 0; i < 64; ++i)
      t.bits[odd][i] = uint8_t(4 * (i % 8 + odd));
  return t;
}

constexpr From kFrom = make_from();

struct Int4 {
  static constexpr bool kGroups = true;
  static constexpr int kOffset = 8;
  static constexpr int64_t kStartColumns = kScaleColumns;
  static constexpr long long kNibbles = 0x1c1814100c080400; // kFrom's first
  static constexpr int kMaskThenMove = 0x6a;                // of vpternlog: (a & b) ^ c
  uint64_t next; // twice the address of the next value's byte, plus 1 where it is the high nibble

  explicit Int4(const uint8_t* values) : next(2 * uint64_t(reinterpret_cast<uintptr_t>(values))) {}
  inline const uint8_t* byte() const { return reinterpret_cast<const uint8_t*>(uintptr_t(next / 2)); }
  inline void ahead() const { prefetch(byte() + kPrefetch); }
  inline __m512i word(uint64_t mask) {
    const __m512i neighbours = _mm512_setr_epi32(0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8);
    __m512i lanes = _mm512_permutexvar_epi32(neighbours, _mm512_loadu_si512(byte()));
    __m512i bytes = _mm512_multishift_epi64_epi8(_mm512_load_si512(kFrom.bits[next % 2]), lanes);
    bytes = _mm512_ternarylogic_epi64(bytes, _mm512_set1_epi8(15), _mm512_set1_epi8(kOffset), kMaskThenMove);
    next += uint64_t(count(mask));
    return spread<kOffset>(mask, bytes);
  }
  inline Pair any(uint64_t m0, uint64_t m1) {
    Pair p;
    p.w[0] = word(m0);
    p.w[1] = word(m1);
    return p;
  }
  static constexpr int64_t kHalfBytes = 32;
  inline void take(int64_t pairs) { next += uint64_t(64 * pairs); }
  static inline Pair half(const uint8_t* values, uint64_t m0, uint64_t m1) {
    const __m256i from = _mm256_set1_epi64x(kNibbles), low = _mm256_set1_epi8(15), offset = _mm256_set1_epi8(kOffset);
    __m256i v[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      __m256i lanes = _mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 16 * i)));
      v[i] = _mm256_ternarylogic_epi64(_mm256_multishift_epi64_epi8(from, lanes), low, offset, kMaskThenMove);
    }
    return {{spread<kOffset>(m0, _mm512_castsi256_si512(v[0])), spread<kOffset>(m1, _mm512_castsi256_si512(v[1]))}};
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

template <class V, int M, int R, Kind kind>
struct Block {
  const Rows& rows;
  const uint8_t *start, *x;
  V source[R];
  Int32x16 sum[R][M];
  __m512 total[R][M];
  static constexpr int kScales = 16; // pairs of int4 whose scales are converted at once

  template <int... r>
  Block(const Rows& rows, const void* activations, int64_t columns, std::integer_sequence<int, r...>)
      : rows(rows), start(static_cast<const uint8_t*>(activations) + kActivationHeader),
        x(start + 64 * M * start_count<V>((columns + kColumnPad - 1) / kColumnPad * kColumnPad)), source{V(rows.values[r])...} {
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        total[i][m] = _mm512_setzero_ps();
    }
  }

  // The sums of int8 begin anew.
  inline void begin() {
    if constexpr (!V::kGroups) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        __m512i first = _mm512_loadu_si512(start + 64 * m);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          sum[r][m] = Int32x16(first);
      }
      start += 64 * M;
    }
  }

  // Pair at / step of those whose scales are given.
  inline void multiply(const Pair (&p)[R], const float (&scales)[R][kScales], int64_t at, int step) {
    const uint8_t* xp = x + at * (128 * M / step);
    if constexpr (V::kGroups) {
      const uint8_t* starts = start + at * (64 * M / step);
      __m512 scale[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        float one;
        memcpy(&one, reinterpret_cast<const uint8_t*>(scales[r]) + (step == 16 ? at / 4 : 4 * at), sizeof one);
        scale[r] = _mm512_set1_ps(one);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        __m512i x0 = held(_mm512_loadu_si512(xp + 64 * m)), x1 = held(_mm512_loadu_si512(xp + 64 * (M + m)));
        __m512i first = held(_mm512_loadu_si512(starts + 64 * m));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          __m512i t = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(first, p[r].w[0], x0), p[r].w[1], x1);
          total[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(t), scale[r], total[r][m]);
        }
      }
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < 2 * M; ++i) {
        __m512i xs = held(_mm512_loadu_si512(xp + 64 * i));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          sum[r][i % M] = Int32x16(_mm512_dpbusd_epi32(__m512i(sum[r][i % M]), p[r].w[i / M], xs));
      }
    }
  }

  inline void flush() {
    if constexpr (!V::kGroups) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
          total[r][m] = _mm512_add_ps(total[r][m], _mm512_cvtepi32_ps(__m512i(sum[r][m])));
      }
    }
  }

  inline void pairs(int64_t begin, int64_t end) {
    alignas(64) float scales[R][kScales];
    for (int64_t i = begin; i < end;) {
      int64_t until = V::kGroups && end - i > kScales ? i + kScales : end;
      if constexpr (V::kGroups) {
        for (int r = 0; r < R; ++r)
          _mm512_store_ps(scales[r], V::scales(rows.scales[r], i, end - i));
      }
      if constexpr (kind == Kind::kHalf) {
        const uint8_t *values[R], *bitmask[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          values[r] = source[r].byte();
          bitmask[r] = rows.bitmask[r] + 16 * i;
          source[r].take(until - i);
        }
        // Everything that moves is a multiple of one number, which the compiler must not replace by a register for each.
        for (int64_t at = 0, last = 16 * (until - i); at < last; at += 16) {
          __asm__("" : "+r"(at));
          Pair p[R];
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const uint8_t* from = values[r] + at * (V::kHalfBytes / 16);
            prefetch(from + kPrefetch);
            p[r] = V::half(from, load_bits(bitmask[r] + at), load_bits(bitmask[r] + at + 8));
          }
          multiply(p, scales, at, 16);
        }
      } else {
        for (int64_t at = 0; at < until - i; ++at) {
          Pair p[R];
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            source[r].ahead();
            if constexpr (kind == Kind::kDense) {
              p[r] = source[r].dense();
            } else {
              const uint8_t* bitmask = rows.bitmask[r] + 16 * (i + at);
              p[r] = source[r].any(load_bits(bitmask), load_bits(bitmask + 8));
            }
          }
          multiply(p, scales, at, 1);
        }
      }
      x += 128 * M * (until - i);
      if (V::kGroups) start += 64 * M * (until - i);
      i = until;
    }
  }

  // The columns behind the last whole pair, on their own. Activations are padded to a word, so the second one may have none.
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
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      __m512i first = start_of(V::kOffset, x + 64 * m, left > 64 ? 2 : 1, 64 * M);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        __m512i t = _mm512_dpbusd_epi32(first, w[0][r], _mm512_loadu_si512(x + 64 * m));
        if (left > 64) t = _mm512_dpbusd_epi32(t, w[1][r], _mm512_loadu_si512(x + 64 * (M + m)));
        total[r][m] =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(t), V::kGroups ? V::scale(rows.scales[r], pair) : _mm512_set1_ps(1.0f), total[r][m]);
      }
    }
  }

  inline void finish(const float* x_scales, float* out) const {
    auto row_scale = [&](int r) { return V::kGroups ? 1.0f : Fp32::load(rows.scales[r]); };
    add_all<R, M>(total, out, [&](int r) {
      if constexpr (M > 1) return _mm256_mul_ps(_mm256_loadu_ps(x_scales), _mm256_set1_ps(row_scale(r)));
      float scale[4] = {};
      for (int i = 0; i < R; ++i)
        scale[i] = row_scale(i);
      return _mm256_mul_ps(_mm256_set1_ps(x_scales[0]), _mm256_setr_ps(scale[0], scale[1], scale[2], scale[3], 0, 0, 0, 0));
    });
  }
};

template <class V, int M, int R, Kind kind>
void products(const Rows& rows, const void* x, int64_t columns, float* out) {
  Block<V, M, R, kind> block(rows, x, columns, std::make_integer_sequence<int, R>{});
  int64_t pairs = columns / 128;
  for (int64_t begin = 0; begin < pairs; begin += kPairsPerFlush) {
    block.begin();
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
    _mm512_store_si512(word, _mm512_sub_epi8(source.word(word_bits(rows.bitmask[0], c / 64, columns)), _mm512_set1_epi8(char(V::kOffset))));
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
  set.start_columns = V::kStartColumns;
  set.max_m = kMaxActivations;
  set.rows_one = rows_for(1);
  set.rows_many = rows_for(2);
  set.pack[SPARSE_ENGINE_BF16] = pack_x<V, Bf16>;
  set.pack[SPARSE_ENGINE_FP16] = pack_x<V, Fp16>;
  set.pack[SPARSE_ENGINE_FP32] = pack_x<V, Fp32>;
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
