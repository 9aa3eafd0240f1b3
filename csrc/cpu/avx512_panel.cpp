// Products with many activation rows on AVX-512: bound by multiply-adds, so weights are spread into a tile in cache and each
// of them, broadcast, meets 16 activation rows at once.
//
//              activations of a block: k0 k1 of row 0, of row 1, ..  .. of row 15 | 16 .. 31         one dword per row and lane
//   tile row r    w k0 k1      broadcast  x  the two registers   ->  sums of row r, 2 x 16 lanes
//        ...      w k0 k1                                            12 rows x 2 registers = 24 sums, no reduction at the end
//
// A dword holds 1 fp32, 2 bf16 or 4 int8 columns, multiplied by vfmadd, vdpbf16ps or vpdpbusd.

#include <immintrin.h>

#include <utility>

#include "kernels.h"
#include "numeric.h"
#include "sparse_engine.h"

namespace sparse_engine {
namespace {

constexpr int kLanes = 16;
constexpr int kBlock = 2 * kLanes; // activation rows of a full block; the last one may be half as wide
constexpr int kStep = 12;          // weight rows of a micro-kernel
constexpr int kWordsAhead = 3;     // words of the next tile that are spread per 8 dwords

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

inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

inline int count(uint64_t bits) { return int(_mm_popcnt_u64(bits)); }

inline uint64_t first(int64_t n) { return n >= 64 ? ~uint64_t(0) : n <= 0 ? 0 : (uint64_t(1) << n) - 1; }

inline int64_t padded(int64_t columns) { return (columns + kColumnPad - 1) / kColumnPad * kColumnPad; }

inline int64_t width(int64_t rows_left) { return rows_left > kLanes ? kBlock : kLanes; }

inline __m512 load_fp32(Bf16, const uint8_t* p, int64_t n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16(first(n)), p)), 16));
}
inline __m512 load_fp32(Fp16, const uint8_t* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16(first(n)), p)); }
inline __m512 load_fp32(Fp32, const uint8_t* p, int64_t n) { return _mm512_maskz_loadu_ps(__mmask16(first(n)), p); }

// The values of one row, taken 64 columns at a time. `at` counts what was taken: values, or nibbles of int4.

struct Bf16Panel {
  static constexpr int kPerDword = 2, kColumns = 256;
  static constexpr bool kInteger = false, kGroups = false;
  static constexpr int kPieceBytes = kColumns; // of values, where half of the columns are kept
  static inline const uint8_t* place(const uint8_t* values, int64_t at) { return values + 2 * at; }
  static inline void spread(const uint8_t* values, int64_t& at, uint64_t bits, uint8_t* tile) {
    const uint8_t* from = place(values, at);
    int low = count(uint32_t(bits));
    _mm512_store_si512(tile, _mm512_maskz_expand_epi16(uint32_t(bits), _mm512_loadu_si512(from)));
    _mm512_store_si512(tile + 64, _mm512_maskz_expand_epi16(uint32_t(bits >> 32), _mm512_loadu_si512(from + 2 * low)));
    at += low + count(bits >> 32);
  }
  using Sum = __m512;
  static inline Sum multiply(Sum sum, __m512i x, __m512i w) { return _mm512_dpbf16_ps(sum, __m512bh(w), __m512bh(x)); }
  // 16 dwords of one activation row: 32 columns.
  static inline __m512i dwords(Bf16, const uint8_t* x, int64_t n, float) { return _mm512_maskz_loadu_epi16(__mmask32(first(n)), x); }
  template <class X>
  static inline __m512i dwords(X t, const uint8_t* x, int64_t n, float) {
    __m512 high = n > 16 ? load_fp32(t, x + 16 * sizeof(typename X::Storage), n - 16) : _mm512_setzero_ps();
    return __m512i(_mm512_cvtne2ps_pbh(high, load_fp32(t, x, n)));
  }
};

inline __m512 widen(Fp16, __m256i halves) { return _mm512_cvtph_ps(halves); }

// fp32 and fp16 values, both multiplied as fp32.
template <class T>
struct Fp32Panel {
  static constexpr int kPerDword = 1, kColumns = 128;
  static constexpr bool kInteger = false, kGroups = false;
  static constexpr int kPieceBytes = kColumns / 2 * int(sizeof(typename T::Storage));
  static inline const uint8_t* place(const uint8_t* values, int64_t at) { return values + at * int64_t(sizeof(typename T::Storage)); }
  static inline void spread(const uint8_t* values, int64_t& at, uint64_t bits, uint8_t* tile) {
    for (int i = 0; i < 4; ++i, bits >>= 16, tile += 64) {
      auto mask = __mmask16(bits);
      const uint8_t* from = place(values, at);
      __m512 w;
      if constexpr (sizeof(typename T::Storage) == 4)
        w = _mm512_maskz_expand_ps(mask, _mm512_loadu_ps(from));
      else
        w = _mm512_cvtph_ps(_mm256_maskz_expand_epi16(mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
      _mm512_store_ps(tile, w);
      at += count(mask);
    }
  }
  using Sum = __m512;
  static inline Sum multiply(Sum sum, __m512i x, __m512i w) { return _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(x), sum); }
  template <class X>
  static inline __m512i dwords(X t, const uint8_t* x, int64_t n, float) {
    return __m512i(load_fp32(t, x, n));
  }
};

// What vpdpbusd sums: with the general type of integer registers, GCC keeps arrays of sums in memory.
typedef int32_t Int32x16 __attribute__((vector_size(64)));

struct IntegerPanel {
  static constexpr int kPerDword = 4;
  static constexpr bool kInteger = true;
  using Sum = Int32x16;
  static inline Sum multiply(Sum sum, __m512i x, __m512i w) { return Sum(_mm512_dpbusd_epi32(__m512i(sum), x, w)); }
  // 64 columns, quantised and moved by 128 to be unsigned.
  template <class X>
  static inline __m512i dwords(X t, const uint8_t* x, int64_t n, float inverse) {
    __m512i bytes = _mm512_setzero_si512();
    if (inverse != 0.0f) {
      __m128i q[4];
      for (int i = 0; i < 4; ++i) {
        int64_t left = n - 16 * i;
        __m512 part = left > 0 ? load_fp32(t, x + 16 * i * int64_t(sizeof(typename X::Storage)), left) : _mm512_setzero_ps();
        q[i] = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(part, _mm512_set1_ps(inverse))));
      }
      bytes = _mm512_inserti32x4(_mm512_inserti32x4(_mm512_inserti32x4(_mm512_castsi128_si512(q[0]), q[1], 1), q[2], 2), q[3], 3);
    }
    return _mm512_xor_si512(bytes, _mm512_set1_epi8(char(0x80)));
  }
};

struct Int8Panel : IntegerPanel {
  static constexpr int kColumns = 512;
  static constexpr bool kGroups = false;
  static constexpr int kPieceBytes = kColumns / 2;
  static inline const uint8_t* place(const uint8_t* values, int64_t at) { return values + at; }
  static inline void spread(const uint8_t* values, int64_t& at, uint64_t bits, uint8_t* tile) {
    _mm512_store_si512(tile, _mm512_maskz_expand_epi8(bits, _mm512_loadu_si512(values + at)));
    at += count(bits);
  }
  static inline float scale(const uint8_t* scales, int64_t) { return Fp32::load(scales); }
};

struct Int4Panel : IntegerPanel {
  static constexpr int kColumns = kScaleColumns;
  static constexpr bool kGroups = true;
  static constexpr int kPieceBytes = kColumns / 4;
  static inline const uint8_t* place(const uint8_t* values, int64_t at) { return values + at / 2; }
  static inline void spread(const uint8_t* values, int64_t& at, uint64_t bits, uint8_t* tile) {
    const __m512i neighbours = _mm512_setr_epi32(0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8);
    __m512i lanes = _mm512_permutexvar_epi32(neighbours, _mm512_loadu_si512(place(values, at)));
    __m512i from = _mm512_add_epi8(_mm512_set1_epi64(0x1c1814100c080400), _mm512_set1_epi8(char(at % 2 * 4)));
    __m512i nibbles = _mm512_multishift_epi64_epi8(from, lanes);
    __m512i bytes = _mm512_gf2p8affine_epi64_epi8(nibbles, _mm512_set1_epi64(0x0102040808080808), 0); // copies the sign upwards
    _mm512_store_si512(tile, _mm512_maskz_expand_epi8(bits, bytes));
    at += count(bits);
  }
  static inline float scale(const uint8_t* scales, int64_t group) {
    uint16_t half;
    memcpy(&half, scales + 2 * group, sizeof half);
    return _cvtsh_ss(half);
  }
};

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

// The next tile of the rows that a micro-kernel multiplies, spread while it does: multiply-adds leave the other units idle.
template <class P>
struct Ahead {
  const PanelRow* rows;
  int64_t* taken;
  uint8_t* tile;
  int64_t n, columns; // rows, and columns of the whole weight
  int64_t first_word, words;
  int64_t row = 0, word = 0;

  inline void some(int count) {
    for (int i = 0; i < count && row < n; ++i) {
      uint8_t* target = tile + row * (P::kColumns / P::kPerDword * 4) + word * 64 / P::kPerDword * 4;
      P::spread(rows[row].values, taken[row], word_bits(rows[row].bitmask, first_word + word, columns), target);
      if (word == 0) {
        for (int64_t piece = P::kPieceBytes; piece <= 2 * P::kPieceBytes; piece += 64)
          prefetch(P::place(rows[row].values, taken[row]) + piece);
        prefetch(rows[row].bitmask + (8 * first_word + P::kColumns / 8));
      }
      if (++word == words) {
        word = 0;
        ++row;
      }
    }
  }
};

// Sums of `Rows` rows of the tile by V registers of activations over `dwords` steps, added to what `sums` holds.
template <class P, int V, int Rows>
inline void micro(const uint8_t* tile, const uint8_t* x, int64_t dwords, float* sums, int64_t stride, const int32_t* start,
                  const float* scale, Ahead<P>* ahead) {
  constexpr int64_t kRowBytes = P::kColumns / P::kPerDword * 4;
  typename P::Sum sum[Rows][V];
  unrolled<Rows>([&](auto r) __attribute__((always_inline)) {
    unrolled<V>([&](auto v) __attribute__((always_inline)) {
      const float* at = sums + r * stride + v * kLanes;
      if constexpr (P::kGroups)
        sum[r][v] = Int32x16(_mm512_set1_epi32(start[r]));
      else if constexpr (P::kInteger)
        sum[r][v] = Int32x16(_mm512_load_si512(at));
      else
        sum[r][v] = _mm512_load_ps(at);
    });
  });
  auto step = [&](auto at) __attribute__((always_inline)) {
    __m512i xs[V];
    unrolled<V>([&](auto v) __attribute__((always_inline)) { xs[v] = _mm512_load_si512(x + 64 * (V * at + v)); });
    unrolled<Rows>([&](auto r) __attribute__((always_inline)) {
      int32_t dword;
      memcpy(&dword, tile + r * kRowBytes + 4 * at, sizeof dword);
      __m512i w = _mm512_set1_epi32(dword);
      unrolled<V>([&](auto v) __attribute__((always_inline)) { sum[r][v] = P::multiply(sum[r][v], xs[v], w); });
    });
  };
  if (ahead) {
    for (int64_t k = 0; k < dwords; k += 8) { // a multiple of 16, as columns are of 64
      unrolled<8>(step);
      tile += 4 * 8;
      x += 64 * V * 8;
      ahead->some(kWordsAhead);
    }
    ahead->some(kStep * P::kColumns / 64);
  } else {
    for (int64_t k = 0; k < dwords; ++k) {
      step(std::integral_constant<int, 0>{});
      tile += 4;
      x += 64 * V;
    }
  }
  unrolled<Rows>([&](auto r) __attribute__((always_inline)) {
    unrolled<V>([&](auto v) __attribute__((always_inline)) {
      float* at = sums + r * stride + v * kLanes;
      if constexpr (P::kGroups)
        _mm512_store_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(__m512i(sum[r][v])), _mm512_set1_ps(scale[r]), _mm512_load_ps(at)));
      else if constexpr (P::kInteger)
        _mm512_store_si512(at, __m512i(sum[r][v]));
      else
        _mm512_store_ps(at, sum[r][v]);
    });
  });
}

// Sums (n, padded m) to y, transposed, with the rows' and activations' scales and the bias.
template <class P>
void finish(const PanelRow* rows, int64_t n, float* sums, int64_t m, const float* x_scales, const int32_t* row_sums, const Output& y,
            int64_t first_row) {
  int64_t stride = padded_rows(m);
  const __m512i index =
      _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(int(stride)));
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
    for (int64_t j = 0; j < m; ++j) {
      __m512i raw = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), lanes, index, sums + r * stride + j, 4);
      __m512 v = __m512(raw);
      if constexpr (P::kInteger) {
        if constexpr (!P::kGroups) v = _mm512_cvtepi32_ps(_mm512_sub_epi32(raw, offset));
        v = _mm512_mul_ps(v, _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[j])));
      }
      v = _mm512_add_ps(v, bias);
      int64_t at = j * y.stride + first_row + r;
      switch (y.dtype) {
      case SPARSE_ENGINE_BF16: {
        // By hand: vcvtneps2bf16 would flush subnormals.
        __m512i bits = _mm512_castps_si512(v);
        __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
        rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
        _mm512_mask_cvtepi32_storeu_epi16(static_cast<uint16_t*>(y.data) + at, lanes, rounded);
        break;
      }
      case SPARSE_ENGINE_FP16:
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y.data) + at, lanes, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
        break;
      default: _mm512_mask_storeu_ps(static_cast<float*>(y.data) + at, lanes, v);
      }
    }
  }
}

// Scratch: sums (rows, padded m), then two tiles, the one in use and the next.
inline int64_t sums_bytes(int64_t m) { return kPanelRows * padded_rows(m) * 4; }

template <class P>
constexpr int64_t kTileBytes = kPanelRows * (P::kColumns / P::kPerDword) * 4;

template <class P>
size_t scratch_bytes(int64_t m, int64_t) {
  return size_t(sums_bytes(m) + 2 * kTileBytes<P>);
}

// One tile of `columns` columns by a block of activations; `ahead` says what to spread meanwhile, if anything.
template <class P, int V>
void multiply_tile(const uint8_t* tile, const uint8_t* x, int64_t columns, int64_t n, float* sums, int64_t stride, const int32_t* start,
                   const float* scale, const Ahead<P>* ahead) {
  constexpr int64_t kRowBytes = P::kColumns / P::kPerDword * 4;
  int64_t dwords = columns / P::kPerDword, r = 0;
  auto part = [&](int64_t rows) {
    Ahead<P> mine = *ahead;
    mine.rows += r;
    mine.taken += r;
    mine.tile += r * kRowBytes;
    mine.n = rows;
    return mine;
  };
  for (; r + kStep <= n; r += kStep) {
    if (ahead) {
      Ahead<P> mine = part(kStep);
      micro<P, V, kStep>(tile + r * kRowBytes, x, dwords, sums + r * stride, stride, start + r, scale + r, &mine);
    } else {
      micro<P, V, kStep>(tile + r * kRowBytes, x, dwords, sums + r * stride, stride, start + r, scale + r, static_cast<Ahead<P>*>(nullptr));
    }
  }
  if (ahead && r < n) part(n - r).some(kStep * P::kColumns / 64);
  for (; r + 4 <= n; r += 4)
    micro<P, V, 4>(tile + r * kRowBytes, x, dwords, sums + r * stride, stride, start + r, scale + r, static_cast<Ahead<P>*>(nullptr));
  for (; r < n; ++r)
    micro<P, V, 1>(tile + r * kRowBytes, x, dwords, sums + r * stride, stride, start + r, scale + r, static_cast<Ahead<P>*>(nullptr));
}

constexpr int kRowsAhead = 8;

template <class P>
void panel(const PanelRow* rows, int64_t n, const void* packed, int64_t m, int64_t columns, const Output& y, int64_t first_row,
           void* scratch) {
  constexpr int64_t kRowBytes = P::kColumns / P::kPerDword * 4;
  // Sums of integers need each row's sum of weights, which is taken from the spread tile.
  constexpr bool kSpreadAhead = !P::kInteger;
  auto sums = static_cast<float*>(scratch);
  uint8_t* tile = static_cast<uint8_t*>(scratch) + sums_bytes(m);
  uint8_t* next = tile + kTileBytes<P>;
  auto blocks = static_cast<const uint8_t*>(packed) + header_bytes(m);
  int64_t stride = padded_rows(m), row_bytes = bytes_per_row<P>(padded(columns));
  int64_t taken[kPanelRows] = {};
  int32_t row_sums[kPanelRows] = {}; // 128 times the sum of the weights: of the whole row, or for int4 the last group's, negated
  float scale[kPanelRows] = {};
  memset(sums, 0, size_t(n * stride * 4));
  auto width_at = [&](int64_t c) { return padded(columns - c < P::kColumns ? columns - c : P::kColumns); };
  for (int64_t c = 0; c < columns; c += P::kColumns) {
    int64_t here = width_at(c);
    for (int64_t r = 0; r < n && (c == 0 || !kSpreadAhead); ++r) {
      __m512i sum = _mm512_setzero_si512();
      if (c == 0 && r + kRowsAhead < n) {
        for (int64_t ahead = 0; ahead <= P::kPieceBytes; ahead += 64)
          prefetch(rows[r + kRowsAhead].values + ahead);
        prefetch(rows[r + kRowsAhead].bitmask);
      }
      // The row's next piece is wanted after a whole tile's work; it lies too far from its neighbours' for the hardware to foresee.
      for (int64_t ahead = P::kPieceBytes; ahead <= 2 * P::kPieceBytes; ahead += 64)
        prefetch(P::place(rows[r].values, taken[r]) + ahead);
      prefetch(rows[r].bitmask + (c + P::kColumns) / 8);
      for (int64_t k = 0; k < here; k += 64) {
        uint8_t* target = tile + r * kRowBytes + k / P::kPerDword * 4;
        P::spread(rows[r].values, taken[r], word_bits(rows[r].bitmask, (c + k) / 64, columns), target);
        if constexpr (P::kInteger) sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(char(0x80)), _mm512_load_si512(target));
      }
      if constexpr (P::kGroups) {
        row_sums[r] = -_mm512_reduce_add_epi32(sum);
        scale[r] = P::scale(rows[r].scales, c / kScaleColumns);
      } else if constexpr (P::kInteger) {
        row_sums[r] += _mm512_reduce_add_epi32(sum);
      }
    }
    Ahead<P> following{rows, taken, next, n, columns, (c + P::kColumns) / 64, 0};
    bool more = kSpreadAhead && c + P::kColumns < columns;
    if (more) following.words = width_at(c + P::kColumns) / 64;
    for (int64_t row = 0; row < m; row += kBlock) {
      const uint8_t* x = blocks + row * row_bytes + c / P::kPerDword * 4 * width(m - row);
      const Ahead<P>* ahead = more && row == 0 ? &following : nullptr;
      if (width(m - row) == kBlock)
        multiply_tile<P, 2>(tile, x, here, n, sums + row, stride, row_sums, scale, ahead);
      else
        multiply_tile<P, 1>(tile, x, here, n, sums + row, stride, row_sums, scale, ahead);
    }
    if (kSpreadAhead) {
      uint8_t* done = tile;
      tile = next;
      next = done;
    }
  }
  finish<P>(rows, n, sums, m, static_cast<const float*>(packed), row_sums, y, first_row);
}

template <class P>
PanelKernels kernels_for(int least_m, PanelProducts products) {
  PanelKernels set{};
  set.least_m = least_m;
  set.activation_bytes = activation_bytes<P>;
  set.scratch_bytes = scratch_bytes<P>;
  set.pack[SPARSE_ENGINE_BF16] = pack<P, Bf16>;
  set.pack[SPARSE_ENGINE_FP16] = pack<P, Fp16>;
  set.pack[SPARSE_ENGINE_FP32] = pack<P, Fp32>;
  set.products = products;
  return set;
}

} // namespace

void add_avx512_panels(ValueKernels (&values)[kValueTypes]) {
  values[SPARSE_ENGINE_BF16].panel = kernels_for<Bf16Panel>(17, panel<Bf16Panel>);
  values[SPARSE_ENGINE_FP16].panel = kernels_for<Fp32Panel<Fp16>>(17, panel<Fp32Panel<Fp16>>);
  values[SPARSE_ENGINE_FP32].panel = kernels_for<Fp32Panel<Fp32>>(17, panel<Fp32Panel<Fp32>>);
  values[SPARSE_ENGINE_INT8].panel = kernels_for<Int8Panel>(17, panel<Int8Panel>);
  values[SPARSE_ENGINE_INT4].panel = kernels_for<Int4Panel>(17, panel<Int4Panel>);
}

} // namespace sparse_engine
