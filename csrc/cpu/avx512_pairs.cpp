// bf16 products of many activation rows on AVX-512 that skip the zeros of 2:4 weights. The 6 pairs of columns that a group of 4 may
// keep are laid out beforehand, so that a group's two stored values, one dword, broadcast, meet the right pair of 16 or 32 activation
// rows by one load at an address that the bitmask gives: half the multiply-adds of a dense product, and no expansion.
//
//   x of a group  ab ac bc ad bd cd        64 or 128 bytes each
//   mask nibble    3  5  6  9 10 12        half of it, rounded down, counts the pairs from 1
//
// The layout is 3 times as large as the activations: it is made for as many columns at a time as stay in the first-level cache, and
// used for all rows of the panel.

#include "avx512_panel.h"

namespace sparse_engine {
namespace {

constexpr int64_t kPairRows = 384;    // weight rows of a panel
constexpr int64_t kPairColumns = 128; // columns laid out at a time: 24 KiB of a full block
constexpr int kPairStep = 4;          // weight rows of a step
constexpr int kGroup = 4, kPairs = 6;

// Columns [begin, end) of a block of packed activations, V registers wide.
template <int V>
void lay_out(const uint8_t* x, int64_t begin, int64_t end, uint8_t* target) {
  const __m512i low = _mm512_set1_epi32(0xffff), high = _mm512_set1_epi32(int(0xffff0000));
  for (int64_t c = begin; c < end; c += kGroup, target += kPairs * 64 * V)
    for (int v = 0; v < V; ++v) {
      const uint8_t* from = x + c / 2 * 64 * V + 64 * v;
      uint8_t* to = target + 64 * v;
      __m512i ab = _mm512_load_si512(from), cd = _mm512_load_si512(from + 64 * V);
      __m512i a = _mm512_and_si512(ab, low), b = _mm512_srli_epi32(ab, 16), c2 = _mm512_slli_epi32(cd, 16), d = _mm512_and_si512(cd, high);
      _mm512_store_si512(to, ab);
      _mm512_store_si512(to + 64 * V, _mm512_or_si512(a, c2));
      _mm512_store_si512(to + 2 * 64 * V, _mm512_or_si512(b, c2));
      _mm512_store_si512(to + 3 * 64 * V, _mm512_or_si512(a, d));
      _mm512_store_si512(to + 4 * 64 * V, _mm512_or_si512(b, d));
      _mm512_store_si512(to + 5 * 64 * V, cd);
    }
}

// A group's two values by the pair at `x`.
template <int V>
[[gnu::always_inline]] inline void meet(const uint8_t* values, const uint8_t* x, __m512 (&sum)[V]) {
  int32_t two;
  memcpy(&two, values, sizeof two);
  auto w = __m512bh(_mm512_set1_epi32(two));
  unrolled<V>([&](auto v)
                  __attribute__((always_inline)) { sum[v] = _mm512_dpbf16_ps(sum[v], w, __m512bh(_mm512_load_si512(x + 64 * v))); });
}

// 64 columns of R rows from column c on.
template <int V, int R>
[[gnu::always_inline]] inline void pairs_word(const uint8_t* const (&values)[R], const uint8_t* const (&bitmask)[R], int64_t c,
                                              const uint8_t* x, __m512 (&sum)[R][V]) {
  constexpr int kPair = 64 * V, kShift = V == 2 ? 7 : 6;
  uint64_t bits[R];
  unrolled<R>([&](auto r) __attribute__((always_inline)) { memcpy(&bits[r], bitmask[r] + c / 8, 8); });
  unrolled<16>([&](auto g) __attribute__((always_inline)) {
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
      constexpr int kRight = (4 * g + 1 - kShift) & 63;
      uint64_t offset = (bits[r] >> kRight | bits[r] << ((64 - kRight) & 63)) & uint64_t(7) << kShift;
      meet<V>(values[r] + c + 4 * g, x + (kPairs * g - 1) * kPair + offset, sum[r]);
    });
  });
}

// `ahead`: as many rows that come some steps later at column `ahead_begin`, or NULL. Each of their pieces is short and far from the
// last one, out of reach of the processor's own prefetching; to the second-level cache, as pieces a power of two apart would fight
// for the same few lines of the first.
template <int V, int R>
inline void pairs_rows(const PanelRow* rows, const PanelRow* ahead, int64_t ahead_begin, const uint8_t* x, int64_t begin, int64_t end,
                       float* sums) {
  __m512 sum[R][V];
  const uint8_t *values[R], *bitmask[R];
  unrolled<R>([&](auto r) __attribute__((always_inline)) {
    values[r] = rows[r].values;
    bitmask[r] = rows[r].bitmask;
    unrolled<V>([&](auto v) __attribute__((always_inline)) { sum[r][v] = _mm512_load_ps(sums + (r * V + v) * kLanes); });
    if (ahead) _mm_prefetch(reinterpret_cast<const char*>(ahead[r].bitmask + ahead_begin / 8), _MM_HINT_T1);
  });
  for (int64_t c = begin; c < end; c += 64, x += 64 / kGroup * kPairs * 64 * V) {
    if (ahead)
      unrolled<R>([&](auto r) __attribute__((always_inline)) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead[r].values + ahead_begin + (c - begin)), _MM_HINT_T1);
      });
    pairs_word<V, R>(values, bitmask, c, x, sum);
  }
  unrolled<R>([&](auto r) __attribute__((always_inline)) {
    unrolled<V>([&](auto v) __attribute__((always_inline)) { _mm512_store_ps(sums + (r * V + v) * kLanes, sum[r][v]); });
  });
}

// The groups behind the last whole word of 64 columns, one row at a time.
template <int V>
void pairs_rest(const PanelRow& row, const uint8_t* x, int64_t begin, int64_t columns, float* sums) {
  __m512 sum[V];
  for (int v = 0; v < V; ++v)
    sum[v] = _mm512_load_ps(sums + v * kLanes);
  for (int64_t c = begin; c < columns; c += kGroup, x += kPairs * 64 * V)
    meet<V>(row.values + c, x + ((row.bitmask[c / 8] >> (c % 8) & 0xf) / 2 - 1) * 64 * V, sum);
  for (int v = 0; v < V; ++v)
    _mm512_store_ps(sums + v * kLanes, sum[v]);
}

// Columns [begin, end) of all rows by one block of activations.
template <int V>
void pairs_block(const PanelRow* rows, int64_t n, int64_t known, const uint8_t* x, int64_t begin, int64_t end, int64_t columns, float* sums,
                 uint8_t* pairs) {
  constexpr int R = kPairStep;
  int64_t whole = end - (end - begin) % 64, r = 0;
  lay_out<V>(x, begin, end, pairs);
  for (; r + R <= n && begin < whole; r += R) {
    // The rows some steps later, from this panel's end on its first rows' next columns, and from its last columns on the next panel.
    int64_t ahead = r + kRowsBehind, ahead_begin = begin;
    if (ahead + R > n && end < columns) {
      ahead -= n / R * R;
      ahead_begin = end;
    } else if (ahead >= n) {
      ahead_begin = 0;
    }
    pairs_rows<V, R>(rows + r, ahead >= 0 && ahead + R <= known ? rows + ahead : nullptr, ahead_begin, pairs, begin, whole,
                     sums + r * V * kLanes);
  }
  for (; r < n; ++r)
    pairs_rows<V, 1>(rows + r, nullptr, 0, pairs, begin, whole, sums + r * V * kLanes);
  for (r = 0; r < n && whole < end; ++r)
    pairs_rest<V>(rows[r], pairs + (whole - begin) / kGroup * kPairs * 64 * V, whole, end, sums + r * V * kLanes);
}

void pairs_panel(const PanelRow* rows, int64_t n, int64_t known, const void* packed, int64_t all, int64_t first, int64_t m, int64_t columns,
                 const Output& y, int64_t first_row, void* scratch) {
  auto sums = static_cast<float*>(scratch);
  auto pairs = static_cast<uint8_t*>(scratch) + sums_bytes(kPairRows, m);
  int64_t row_bytes = bytes_per_row<Bf16Columns>(padded(columns));
  auto blocks = static_cast<const uint8_t*>(packed) + header_bytes(all) + first * row_bytes;
  memset(sums, 0, size_t(sums_bytes(n, m)));
  for (int64_t c = 0; c < columns; c += kPairColumns) {
    int64_t end = c + kPairColumns < columns ? c + kPairColumns : columns;
    for (int64_t row = 0; row < m; row += kBlock) {
      const uint8_t* x = blocks + row * row_bytes;
      if (width(m - row) == kBlock)
        pairs_block<2>(rows, n, known, x, c, end, columns, sums + row * n, pairs);
      else
        pairs_block<1>(rows, n, known, x, c, end, columns, sums + row * n, pairs);
    }
  }
  finish<Bf16Columns>(rows, n, sums, first, m, nullptr, nullptr, y, first_row);
}

// Sums, then the pairs, with one of them to spare.
size_t scratch_bytes(int64_t m) { return size_t(sums_bytes(kPairRows, m) + (kPairColumns / kGroup * kPairs + 1) * kBlock * 4); }

} // namespace

PanelKernels avx512_pairs() {
  PanelKernels set{};
  set.least_m = 13;
  set.rows = kPairRows;
  set.activation_bytes = activation_bytes<Bf16Columns>;
  set.scratch_bytes = scratch_bytes;
  set.pack[SPARSE_ENGINE_BF16] = pack<Bf16Columns, Bf16>;
  set.pack[SPARSE_ENGINE_FP16] = pack<Bf16Columns, Fp16>;
  set.pack[SPARSE_ENGINE_FP32] = pack<Bf16Columns, Fp32>;
  set.products = pairs_panel;
  return set;
}

} // namespace sparse_engine
