// int8 and int4 weights on AVX2: kept values are expanded to bytes 32 columns at a time and multiplied by int8 activations.
//
//   values  a b c d e f g h ....   16 bytes from the row's pointer, in each 128-bit half
//   mask    0x69 0x1d              two table entries side by side; the second moved on by the first byte's number of set bits
//   vpshufb a 0 0 b 0 c d 0 | e 0 f g h 0 0 0
//
// vpmaddubsw adds two products in 16 bits, where |w| times x with the sign of w cannot saturate: 2 · 128 · 127 < 32768.
// int4 values become bytes first. 128 columns, the span of an int4 scale, go together.

#include <immintrin.h>

#include <utility>

#include "kernels.h"
#include "numeric.h"
#include "sparse_engine.h"

namespace sparse_engine {
namespace {

struct Shuffle {
  alignas(64) uint8_t index[256][8];
};

constexpr Shuffle make_shuffle() {
  Shuffle t{};
  for (int mask = 0; mask < 256; ++mask)
    for (int slot = 0, kept = 0; slot < 8; ++slot) {
      bool keep = mask >> slot & 1;
      t.index[mask][slot] = keep ? uint8_t(kept) : 0x80; // vpshufb writes 0 for an index with the top bit set
      kept += keep;
    }
  return t;
}

// n for the second byte's 8 slots and 0 for the first's.
struct Advance {
  alignas(64) uint8_t by[9][16];
};

constexpr Advance make_advance() {
  Advance t{};
  for (int n = 0; n <= 8; ++n)
    for (int slot = 8; slot < 16; ++slot)
      t.by[n][slot] = uint8_t(n);
  return t;
}

constexpr Shuffle kShuffle = make_shuffle();
constexpr Advance kAdvance = make_advance();

inline int count(uint32_t bits) { return __builtin_popcount(bits); }

inline __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// The table entries of a mask's two bytes, both counting from their own first value.
inline __m128i entries(uint32_t mask) {
  __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kShuffle.index[mask & 0xff]));
  return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(first), reinterpret_cast<const __m64*>(kShuffle.index[mask >> 8 & 0xff])));
}

inline __m256i both(__m128i low, __m128i high) { return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1); }

template <class Source>
inline __m256i expand_any(Source& source, uint32_t mask) {
  __m128i half[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i, mask >>= 16) {
    __m128i move = _mm_load_si128(reinterpret_cast<const __m128i*>(kAdvance.by[count(mask & 0xff)]));
    half[i] = _mm_shuffle_epi8(source.sixteen(), _mm_add_epi8(entries(mask), move));
    source.take(count(mask & 0xffff));
  }
  return both(half[0], half[1]);
}

// 4 values in every mask byte.
template <class Source>
inline __m256i expand_half(Source& source, uint32_t mask) {
  const __m256i move = _mm256_set_epi64x(0x0c0c0c0c0c0c0c0c, 0x0808080808080808, 0x0404040404040404, 0);
  __m256i index = _mm256_add_epi8(both(entries(mask), entries(mask >> 16)), move);
  __m256i w = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(source.sixteen()), index);
  source.take(16);
  return w;
}

// Where a row's values are read next.
struct Int8 {
  static constexpr bool kGroups = false;
  const uint8_t* values;

  explicit Int8(const uint8_t* values) : values(values) {}
  inline __m128i sixteen() const { return load_128(values); }
  inline void take(int n) { values += n; }
  inline __m256i dense() {
    __m256i w = load_256(values);
    values += 32;
    return w;
  }
  static inline float scale(const uint8_t* scales, int64_t) { return Fp32::load(scales); }
};

struct Int4 {
  static constexpr bool kGroups = true;
  const uint8_t* values;
  uint64_t nibbles = 0;

  explicit Int4(const uint8_t* values) : values(values) {}
  inline __m128i sixteen() const {
    const uint8_t* from = values + nibbles / 2;
    uint64_t bits, odd = nibbles & 1;
    memcpy(&bits, from, sizeof bits);
    bits = bits >> (4 * odd) | (uint64_t(from[8]) << 60 & (0 - odd));
    const __m128i low = _mm_set1_epi8(0x0f), sign = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    __m128i both = _mm_cvtsi64_si128(int64_t(bits));
    __m128i pairs = _mm_unpacklo_epi8(both, _mm_srli_epi16(both, 4));
    return _mm_shuffle_epi8(sign, _mm_and_si128(pairs, low));
  }
  inline void take(int n) { nibbles += uint64_t(n); }
  static inline float scale(const uint8_t* scales, int64_t group) {
    uint16_t half;
    memcpy(&half, scales + 2 * group, sizeof half);
    return _cvtsh_ss(half);
  }
};

template <class X>
inline __m256 load_fp32(const uint8_t* p, int64_t n) {
  constexpr int kBytes = sizeof(typename X::Storage);
  alignas(32) float values[8] = {};
  if constexpr (kBytes == 4) {
    if (n >= 8) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
  } else if (n >= 8) {
    __m128i half = load_128(p);
    if constexpr (std::is_same_v<X, Fp16>) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  for (int64_t i = 0; i < n && i < 8; ++i)
    values[i] = X::load(p + i * kBytes);
  return _mm256_load_ps(values);
}

// Activations become int8 (padded_columns / 32, m, 32).
template <class X>
void pack_x(const void* x, int m, int64_t columns, int64_t padded_columns, void* packed) {
  constexpr int64_t kBytes = sizeof(typename X::Storage);
  auto scales = static_cast<float*>(packed);
  for (int i = 0; i < m; ++i) {
    const uint8_t* row = static_cast<const uint8_t*>(x) + i * columns * kBytes;
    // Magnitudes order as their bits do, with NaN on top, so that it reaches the result.
    __m256i most = _mm256_setzero_si256();
    for (int64_t c = 0; c < columns; c += 8) {
      __m256i bits = _mm256_castps_si256(load_fp32<X>(row + c * kBytes, columns - c));
      most = _mm256_max_epu32(most, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
    }
    alignas(32) uint32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), most);
    uint32_t top = 0;
    for (uint32_t lane : lanes)
      top = lane > top ? lane : top;
    float magnitude = float_from_bits(top);
    float inverse = magnitude > 0x1p-120f && magnitude < 0x1p127f ? 127.0f / magnitude : 0.0f;
    scales[i] = magnitude / 127.0f;
    auto target = static_cast<uint8_t*>(packed) + kActivationHeader + 32 * i;
    for (int64_t c = 0; c < padded_columns; c += 8) {
      __m128i q = _mm_setzero_si128();
      if (c < columns && inverse != 0.0f) {
        __m256i all = _mm256_cvtps_epi32(_mm256_mul_ps(load_fp32<X>(row + c * kBytes, columns - c), _mm256_set1_ps(inverse)));
        __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
        q = _mm_packs_epi16(words, words);
      }
      _mm_storel_epi64(reinterpret_cast<__m128i*>(target + c / 32 * 32 * m + c % 32), q);
    }
  }
}

inline float sum_of(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

enum class Kind { kAny, kHalf, kDense };

// Between two conversions to fp32 no int32 lane can overflow: 4 products of at most 128 · 127 per 32 columns.
constexpr int64_t kGroupsPerFlush = 4096;

template <class V, int M, int R, Kind kind>
struct Block {
  const Rows& rows;
  const uint8_t* x;
  V source[R];
  __m256i sum[R][M]; // int8: int32 since the last flush; int4: int16 of this group, at most 4 · 2 · 8 · 127
  __m256 total[R][M];

  template <int... r>
  Block(const Rows& rows, const void* activations, std::integer_sequence<int, r...>)
      : rows(rows), x(static_cast<const uint8_t*>(activations) + kActivationHeader), source{V(rows.values[r])...} {
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        total[i][m] = _mm256_setzero_ps();
        sum[i][m] = _mm256_setzero_si256();
      }
    }
  }

  inline void multiply(const __m256i (&w)[R]) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __m256i magnitude = _mm256_abs_epi8(w[r]);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        __m256i products = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(load_256(x + 32 * m), w[r]));
        if constexpr (V::kGroups)
          sum[r][m] = _mm256_add_epi16(sum[r][m], products);
        else
          sum[r][m] = _mm256_add_epi32(sum[r][m], _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
      }
    }
    x += 32 * M;
  }

  // Adds the integer sums to the totals: of int4 at the end of each group.
  inline void flush(int64_t group) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __m256 scale = _mm256_set1_ps(V::kGroups ? V::scale(rows.scales[r], group) : 1.0f);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        __m256i wide = V::kGroups ? _mm256_madd_epi16(sum[r][m], _mm256_set1_epi16(1)) : sum[r][m];
        total[r][m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(wide), scale, total[r][m]);
        sum[r][m] = _mm256_setzero_si256();
      }
    }
  }

  inline void groups(int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
#pragma GCC unroll 4
      for (int step = 0; step < 4; ++step) {
        __m256i w[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          if constexpr (kind == Kind::kDense) {
            w[r] = source[r].dense();
          } else {
            uint32_t mask;
            memcpy(&mask, rows.bitmask[r] + 16 * group + 4 * step, sizeof mask);
            w[r] = kind == Kind::kHalf ? expand_half(source[r], mask) : expand_any(source[r], mask);
          }
        }
        multiply(w);
      }
      if constexpr (V::kGroups) flush(group);
    }
    if constexpr (!V::kGroups) flush(0);
  }

  inline void rest(int64_t group, int64_t columns) {
    for (int64_t c = 128 * group; c < columns; c += 32) {
      __m256i w[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        if constexpr (kind == Kind::kDense) {
          alignas(32) uint8_t padded[32] = {};
          memcpy(padded, source[r].values, size_t(columns - c < 32 ? columns - c : 32));
          source[r].values += 32;
          w[r] = load_256(padded);
        } else {
          uint64_t bits = word_bits(rows.bitmask[r], c / 64, columns);
          w[r] = expand_any(source[r], uint32_t(bits >> (c % 64)));
        }
      }
      multiply(w);
    }
    if (128 * group < columns) flush(group);
  }

  inline void finish(const float* x_scales, float* out) const {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
        out[r * M + m] = sum_of(total[r][m]) * x_scales[m] * (V::kGroups ? 1.0f : Fp32::load(rows.scales[r]));
    }
  }
};

template <class V, int M, int R, Kind kind>
void products(const Rows& rows, const void* x, int64_t columns, float* out) {
  Block<V, M, R, kind> block(rows, x, std::make_integer_sequence<int, R>{});
  int64_t groups = columns / 128;
  for (int64_t begin = 0; begin < groups; begin += kGroupsPerFlush)
    block.groups(begin, begin + kGroupsPerFlush < groups ? begin + kGroupsPerFlush : groups);
  block.rest(groups, columns);
  block.finish(static_cast<const float*>(x), out);
}

template <class V, class Out>
void expand_row(const Rows& rows, int64_t columns, void* out) {
  V source(rows.values[0]);
  auto target = static_cast<typename Out::Storage*>(out);
  for (int64_t c = 0; c < columns; c += 32) {
    alignas(32) int8_t w[32];
    uint64_t bits = word_bits(rows.bitmask[0], c / 64, columns);
    _mm256_store_si256(reinterpret_cast<__m256i*>(w), expand_any(source, uint32_t(bits >> (c % 64))));
    float scale = V::scale(rows.scales[0], c / 128);
    for (int64_t i = 0; i < 32 && c + i < columns; ++i)
      target[c + i] = Out::round(float(w[i]) * scale);
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
  constexpr int kMostActivations = 4;
  ValueKernels set{};
  set.x_bytes = 1;
  set.max_m = kMostActivations;
  set.rows_one = rows_for(1);
  set.rows_many = rows_for(2);
  set.pack[SPARSE_ENGINE_BF16] = pack_x<Bf16>;
  set.pack[SPARSE_ENGINE_FP16] = pack_x<Fp16>;
  set.pack[SPARSE_ENGINE_FP32] = pack_x<Fp32>;
  set.expand[SPARSE_ENGINE_BF16] = expand_row<V, Bf16>;
  set.expand[SPARSE_ENGINE_FP16] = expand_row<V, Fp16>;
  set.expand[SPARSE_ENGINE_FP32] = expand_row<V, Fp32>;
  fill<V, kMostActivations>(set);
  return set;
}

} // namespace

ValueKernels avx2_int8() { return kernels_for<Int8>(); }
ValueKernels avx2_int4() { return kernels_for<Int4>(); }

} // namespace sparse_engine
