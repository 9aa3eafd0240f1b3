// Products with many activation rows on AVX-512: bound by multiply-adds, so weights are spread into a tile in cache and each
// of them, broadcast, meets 16 activation rows at once.
//
//              activations of a block: k0 k1 of row 0, of row 1, ..  .. of row 15 | 16 .. 31         one dword per row and lane
//   tile row r    w k0 k1      broadcast  x  the two registers   ->  sums of row r, 2 x 16 lanes
//        ...      w k0 k1                                            12 rows x 2 registers = 24 sums, no reduction at the end
//
// A dword holds 1 fp32, 2 bf16 or 4 int8 columns, multiplied by vfmadd, vdpbf16ps or vpdpbusd.

#include <immintrin.h>

#include "avx512_panel.h"

namespace sparse_engine {
namespace {

constexpr int kStep = 12; // weight rows of a micro-kernel

// The values of one row, taken 64 columns at a time. `at` counts what was taken: values, or nibbles of int4.

struct Bf16Panel : Bf16Columns {
  static constexpr int kColumns = 256;
  static constexpr int kWordBytes = 64; // of the values of 64 columns, where half of them are kept
  static inline const uint8_t* place(const uint8_t* values, int64_t at) { return values + 2 * at; }
  static inline void spread(const uint8_t* values, int64_t& at, uint64_t bits, uint8_t* tile) {
    const uint8_t* from = place(values, at);
    int low = count(uint32_t(bits));
    _mm512_store_si512(tile, _mm512_maskz_expand_epi16(uint32_t(bits), _mm512_loadu_si512(from)));
    _mm512_store_si512(tile + kStep * 64, _mm512_maskz_expand_epi16(uint32_t(bits >> 32), _mm512_loadu_si512(from + 2 * low)));
    at += low + count(bits >> 32);
  }
  using Sum = __m512;
  static inline Sum multiply(Sum sum, __m512i x, __m512i w) { return _mm512_dpbf16_ps(sum, __m512bh(w), __m512bh(x)); }
};

inline __m512 widen(Fp16, __m256i halves) { return _mm512_cvtph_ps(halves); }

// fp32 and fp16 values, both multiplied as fp32.
template <class T>
struct Fp32Panel {
  static constexpr int kPerDword = 1, kColumns = 128;
  static constexpr bool kInteger = false, kGroups = false;
  static constexpr int kWordBytes = 32 * int(sizeof(typename T::Storage));
  static inline const uint8_t* place(const uint8_t* values, int64_t at) { return values + at * int64_t(sizeof(typename T::Storage)); }
  static inline void spread(const uint8_t* values, int64_t& at, uint64_t bits, uint8_t* tile) {
    for (int i = 0; i < 4; ++i, bits >>= 16, tile += kStep * 64) {
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
  static constexpr int kColumns = 2048;
  static constexpr bool kGroups = false;
  static constexpr int kWordBytes = 32;
  static inline const uint8_t* place(const uint8_t* values, int64_t at) { return values + at; }
  static inline void spread(const uint8_t* values, int64_t& at, uint64_t bits, uint8_t* tile) {
    _mm512_store_si512(tile, _mm512_maskz_expand_epi8(bits, _mm512_loadu_si512(values + at)));
    at += count(bits);
  }
  static inline float scale(const uint8_t* scales, int64_t) { return Fp32::load(scales); }
};

struct Int4Panel : IntegerPanel {
  static constexpr int kColumns = 8 * kScaleColumns;
  static constexpr bool kGroups = true;
  static constexpr int kWordBytes = 16;
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

constexpr int64_t kPanelRows = 384;                        // weight rows of a panel
constexpr int64_t kActivationsAtOnce = int64_t(512) << 10; // bytes of them that stay in the second-level cache while a panel's rows pass
constexpr int64_t kMostDwords = 1024;                      // of a tile's row
constexpr int64_t kRowsAhead = kRowsBehind;                // rows behind the one being spread whose bytes are fetched
constexpr int64_t kChunkBytes = kStep * 64;

// Columns of a tile: kStep rows of (columns / 64 bytes, kStep, 64 bytes), so that a micro-kernel's addresses are constants.
template <class P>
int64_t tile_columns(int64_t m) {
  if (P::kInteger) return P::kColumns;
  int64_t dwords = kActivationsAtOnce / (padded_rows(m) * 4);
  int64_t columns = (dwords < kMostDwords ? dwords : kMostDwords) * P::kPerDword;
  return columns < P::kColumns ? P::kColumns : columns / P::kColumns * P::kColumns;
}

// `n` rows from `row` on whose columns from `first_word` on are spread, all at once or while other rows are multiplied.
template <class P>
struct Spread {
  const PanelRow* rows; // `panel_rows` of them in the panel, `known` at all
  int64_t* taken;
  int64_t panel_rows, known, row, end, columns, first_word, words;
  uint8_t* tile;
  int64_t word = 0, begun = 0;

  inline void some(int count) {
    for (int i = 0; i < count && row < end; ++i) {
      if (word == 0) begun = taken[row];
      // Rows come one after another, but only their pieces in this tile: out of reach of the processor's own prefetching.
      int64_t later = row + kRowsAhead;
      bool wraps = later >= panel_rows && first_word + words < (columns + 63) / 64;
      if (wraps) later -= panel_rows;
      if (later < known) {
        const uint8_t* from = P::place(rows[later].values, taken[later] + taken[row] - begun);
        if (P::kWordBytes >= 64 || word % (64 / P::kWordBytes) == 0)
          for (int b = 0; b < P::kWordBytes; b += 64)
            prefetch(from + b);
        if (word % 8 == 0) prefetch(rows[later].bitmask + 8 * ((later < panel_rows ? first_word + (wraps ? words : 0) : 0) + word));
      }
      uint64_t bits = word_bits(rows[row].bitmask, first_word + word, columns);
      P::spread(rows[row].values, taken[row], bits, tile + word * (64 / P::kPerDword / kLanes) * kChunkBytes);
      if (++word == words) {
        word = 0;
        ++row;
        tile += 64;
      }
    }
  }
  inline void all() { some(int(kStep * words)); }
};

// Sums of `Rows` rows of the tile by V registers of activations over `dwords` steps, added to what `sums` holds.
template <class P, int V, int Rows, bool kAhead>
inline void micro(const uint8_t* tile, const uint8_t* x, int64_t dwords, float* sums, const int32_t* start, const float* scale,
                  Spread<P>* ahead) {
  typename P::Sum sum[Rows][V];
  unrolled<Rows>([&](auto r) __attribute__((always_inline)) {
    unrolled<V>([&](auto v) __attribute__((always_inline)) {
      const float* at = sums + (r * V + v) * kLanes;
      if constexpr (P::kGroups)
        sum[r][v] = Int32x16(_mm512_set1_epi32(start[r]));
      else if constexpr (P::kInteger)
        sum[r][v] = Int32x16(_mm512_load_si512(at));
      else
        sum[r][v] = _mm512_load_ps(at);
    });
  });
  for (int64_t k = 0; k < dwords; k += 8) { // a multiple of 16, as columns are of 64
    unrolled<8>([&](auto at) __attribute__((always_inline)) {
      __m512i xs[V];
      unrolled<V>([&](auto v) __attribute__((always_inline)) { xs[v] = _mm512_load_si512(x + 64 * (V * at + v)); });
      unrolled<Rows>([&](auto r) __attribute__((always_inline)) {
        int32_t dword;
        memcpy(&dword, tile + r * 64 + 4 * at, sizeof dword);
        __m512i w = _mm512_set1_epi32(dword);
        unrolled<V>([&](auto v) __attribute__((always_inline)) { sum[r][v] = P::multiply(sum[r][v], xs[v], w); });
      });
    });
    tile += k % 16 == 0 ? 32 : kChunkBytes - 32;
    x += 64 * V * 8;
    if constexpr (kAhead) ahead->some((kStep * P::kPerDword * 8 + 63) / 64); // a tile's share of 8 dwords
  }
  unrolled<Rows>([&](auto r) __attribute__((always_inline)) {
    unrolled<V>([&](auto v) __attribute__((always_inline)) {
      float* at = sums + (r * V + v) * kLanes;
      if constexpr (P::kGroups)
        _mm512_store_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(__m512i(sum[r][v])), _mm512_set1_ps(scale[r]), _mm512_load_ps(at)));
      else if constexpr (P::kInteger)
        _mm512_store_si512(at, __m512i(sum[r][v]));
      else
        _mm512_store_ps(at, sum[r][v]);
    });
  });
}

// Up to kStep rows of a tile by a block of activations; `ahead`, if anything, is spread meanwhile.
template <class P, int V>
void multiply_tile(const uint8_t* tile, const uint8_t* x, int64_t columns, int64_t n, float* sums, const int32_t* start, const float* scale,
                   Spread<P>* ahead) {
  int64_t dwords = columns / P::kPerDword, r = 0;
  if (n == kStep) {
    if (ahead)
      micro<P, V, kStep, true>(tile, x, dwords, sums, start, scale, ahead);
    else
      micro<P, V, kStep, false>(tile, x, dwords, sums, start, scale, ahead);
  } else {
    for (; r + 4 <= n; r += 4)
      micro<P, V, 4, false>(tile + r * 64, x, dwords, sums + r * V * kLanes, start + r, scale + r, ahead);
    for (; r < n; ++r)
      micro<P, V, 1, false>(tile + r * 64, x, dwords, sums + r * V * kLanes, start + r, scale + r, ahead);
  }
}

template <class P>
int64_t tile_bytes(int64_t m) {
  return tile_columns<P>(m) / P::kPerDword / kLanes * kChunkBytes;
}

// Scratch: the sums, then two tiles, the one in use and the next.
template <class P>
size_t scratch_bytes(int64_t m) {
  return size_t(sums_bytes(kPanelRows, m) + 2 * tile_bytes<P>(m));
}

template <class P>
void panel(const PanelRow* rows, int64_t n, int64_t known, const void* packed, int64_t all, int64_t first, int64_t m, int64_t columns,
           const Output& y, int64_t first_row, void* scratch) {
  auto sums = static_cast<float*>(scratch);
  uint8_t* tile = static_cast<uint8_t*>(scratch) + sums_bytes(kPanelRows, m);
  uint8_t* next = tile + tile_bytes<P>(m);
  int64_t row_bytes = bytes_per_row<P>(padded(columns));
  auto blocks = static_cast<const uint8_t*>(packed) + header_bytes(all) + first * row_bytes;
  int64_t width_of_tile = tile_columns<P>(m);
  int64_t taken[kPanelRows + kRowsBehind] = {};
  // Columns that are summed in int32 before they meet a scale: of int4 a group, of which a tile has several.
  constexpr int64_t kSpan = P::kGroups ? kScaleColumns : int64_t(1) << 60;
  constexpr int kSpans = P::kGroups ? P::kColumns / kScaleColumns : 1;
  // 128 times the sums of the weights, which came in with the activations' offset: of a tile's groups, negated, and of whole rows.
  int32_t start[kSpans][kStep] = {}, row_sums[kPanelRows] = {};
  float scale[kSpans][kStep] = {};
  memset(sums, 0, size_t(sums_bytes(n, m)));
  auto columns_at = [&](int64_t c) { return padded(columns - c < width_of_tile ? columns - c : width_of_tile); };
  auto spread = [&](int64_t r, int64_t c, uint8_t* target) {
    return Spread<P>{rows, taken, n, known, r, r + kStep < n ? r + kStep : n, columns, c / 64, columns_at(c) / 64, target};
  };
  for (int64_t c = 0; c < columns; c += width_of_tile) {
    int64_t here = columns_at(c);
    for (int64_t r = 0; r < n; r += kStep) {
      int64_t some = r + kStep < n ? kStep : n - r;
      if (c == 0 && r == 0) spread(r, c, tile).all();
      if constexpr (P::kInteger) {
        for (int64_t g = 0; g < here; g += kSpan)
          for (int64_t i = 0; i < some; ++i) {
            __m512i sum = _mm512_setzero_si512();
            for (int64_t k = g / 64; k < here / 64 && k < (g + kSpan) / 64; ++k)
              sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(char(0x80)), _mm512_load_si512(tile + k * kChunkBytes + i * 64));
            if constexpr (P::kGroups) {
              start[g / kSpan][i] = -_mm512_reduce_add_epi32(sum);
              scale[g / kSpan][i] = P::scale(rows[r + i].scales, (c + g) / kScaleColumns);
            } else {
              row_sums[r + i] += _mm512_reduce_add_epi32(sum);
            }
          }
      }
      bool last = r + kStep >= n;
      int64_t next_c = last ? c + width_of_tile : c;
      bool more = next_c < columns;
      Spread<P> following = spread(last ? 0 : r + kStep, more ? next_c : c, next);
      for (int64_t row = 0; row < m; row += kBlock) {
        const uint8_t* x = blocks + row * row_bytes + c / P::kPerDword * 4 * width(m - row);
        Spread<P>* ahead = more && row == 0 ? &following : nullptr;
        float* at = sums + row * n + r * width(m - row);
        for (int64_t g = 0; g < here; g += kSpan) {
          int64_t span = here - g < kSpan ? here - g : kSpan;
          const uint8_t *w = tile + g / P::kPerDword / kLanes * kChunkBytes, *from = x + g / P::kPerDword * 4 * width(m - row);
          if (width(m - row) == kBlock)
            multiply_tile<P, 2>(w, from, span, some, at, start[g / kSpan], scale[g / kSpan], ahead);
          else
            multiply_tile<P, 1>(w, from, span, some, at, start[g / kSpan], scale[g / kSpan], ahead);
        }
        if (ahead) ahead->all();
      }
      uint8_t* done = tile;
      tile = next;
      next = done;
    }
  }
  finish<P>(rows, n, sums, first, m, static_cast<const float*>(packed), row_sums, y, first_row);
}

template <class P>
PanelKernels kernels_for(int least_m, PanelProducts products) {
  PanelKernels set{};
  set.least_m = least_m;
  set.rows = kPanelRows;
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
  values[SPARSE_ENGINE_BF16].pairs = avx512_pairs();
  values[SPARSE_ENGINE_FP16].panel = kernels_for<Fp32Panel<Fp16>>(17, panel<Fp32Panel<Fp16>>);
  values[SPARSE_ENGINE_FP32].panel = kernels_for<Fp32Panel<Fp32>>(17, panel<Fp32Panel<Fp32>>);
  values[SPARSE_ENGINE_INT8].panel = kernels_for<Int8Panel>(17, panel<Int8Panel>);
  values[SPARSE_ENGINE_INT4].panel = kernels_for<Int4Panel>(17, panel<Int4Panel>);
}

} // namespace sparse_engine
