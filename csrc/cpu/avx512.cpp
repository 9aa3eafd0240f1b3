// AVX-512 with VBMI2 and BF16: vpexpandw spreads kept half-words over the mask's set bits, 32 columns at a time.
//
//   bf16   values  a b c d ....   64 bytes from the row's pointer
//          mask    32 bits        vpexpandw  a 0 0 b 0 c d 0 ..   then vdpbf16ps with bf16 activations, summed in fp32
//
// fp16 is expanded the same way and converted by vcvtph2ps; fp32 uses vexpandps. Loads are whole registers with the
// expansion done from a register, because the masked memory forms are microcoded on some processors; the rows that the
// driver passes may be over-read by one register.

#include "avx512_common.h"

namespace sparse_engine {
namespace {

// The same where at most half of the mask's bits are set: a load of half a register crosses a cache line half as often.
inline __m512i expand_half_words(const uint8_t* values, uint32_t mask) {
  return _mm512_maskz_expand_epi16(mask, _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values))));
}

inline __m512i expand_words(const uint8_t* values, uint32_t mask) { return _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values)); }

// Each type says how many columns one step takes, and how a step's weights meet the activations.
struct Bf16Step : Bf16 {
  static constexpr int kColumns = 32;
  static constexpr int kXBytes = 2;
  using Weights = __m512i;
  static inline Weights expand(const uint8_t* values, uint32_t mask) { return expand_words(values, mask); }
  static inline Weights expand_half(const uint8_t* values, uint32_t mask) { return expand_half_words(values, mask); }
  static inline Weights widen(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static inline Weights widen(const uint8_t* p, int64_t n) { return _mm512_maskz_loadu_epi16(__mmask32(first(n)), p); }
  using Activations = __m512i;
  static inline Activations load(const uint8_t* x) { return held(_mm512_loadu_si512(x)); }
  static inline __m512 multiply(const Weights& w, const Activations& x, __m512 sum) {
    return _mm512_dpbf16_ps(sum, __m512bh(w), __m512bh(x));
  }
  static inline void pack(Bf16, const uint8_t* from, int64_t n, uint8_t* to) { _mm512_storeu_si512(to, widen(from, n)); }
  template <class X>
  static inline void pack(X x, const uint8_t* from, int64_t n, uint8_t* to) {
    __m512 low = load_fp32(x, from, n), high = n > 16 ? load_fp32(x, from + 16 * sizeof(typename X::Storage), n - 16) : _mm512_setzero_ps();
    _mm512_storeu_si512(to, __m512i(_mm512_cvtne2ps_pbh(high, low)));
  }
};

struct Fp16Step : Fp16 {
  static constexpr int kColumns = 32;
  static constexpr int kXBytes = 4;
  struct Weights {
    __m512 low, high;
  };
  static inline Weights convert(__m512i halves) {
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(halves)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))};
  }
  static inline Weights expand(const uint8_t* values, uint32_t mask) { return convert(expand_words(values, mask)); }
  static inline Weights expand_half(const uint8_t* values, uint32_t mask) { return convert(expand_half_words(values, mask)); }
  static inline Weights widen(const uint8_t* p) { return convert(_mm512_loadu_si512(p)); }
  static inline Weights widen(const uint8_t* p, int64_t n) { return convert(_mm512_maskz_loadu_epi16(__mmask32(first(n)), p)); }
  using Activations = Weights;
  static inline Activations load(const uint8_t* x) { return {held(_mm512_loadu_ps(x)), held(_mm512_loadu_ps(x + 64))}; }
  static inline __m512 multiply(const Weights& w, const Activations& x, __m512 sum) {
    return _mm512_fmadd_ps(w.high, x.high, _mm512_fmadd_ps(w.low, x.low, sum));
  }
  template <class X>
  static inline void pack(X x, const uint8_t* from, int64_t n, uint8_t* to) {
    _mm512_storeu_ps(to, load_fp32(x, from, n));
    _mm512_storeu_ps(to + 64, n > 16 ? load_fp32(x, from + 16 * sizeof(typename X::Storage), n - 16) : _mm512_setzero_ps());
  }
};

struct Fp32Step : Fp32 {
  static constexpr int kColumns = 16;
  static constexpr int kXBytes = 4;
  using Weights = __m512;
  static inline Weights expand(const uint8_t* values, uint32_t mask) {
    return _mm512_maskz_expand_ps(__mmask16(mask), _mm512_loadu_ps(values));
  }
  static inline Weights expand_half(const uint8_t* values, uint32_t mask) {
    return _mm512_maskz_expand_ps(__mmask16(mask), _mm512_castps256_ps512(_mm256_loadu_ps(reinterpret_cast<const float*>(values))));
  }
  static inline Weights widen(const uint8_t* p) { return _mm512_loadu_ps(p); }
  static inline Weights widen(const uint8_t* p, int64_t n) { return _mm512_maskz_loadu_ps(__mmask16(first(n)), p); }
  using Activations = __m512;
  static inline Activations load(const uint8_t* x) { return held(_mm512_loadu_ps(x)); }
  static inline __m512 multiply(const Weights& w, const Activations& x, __m512 sum) { return _mm512_fmadd_ps(w, x, sum); }
  template <class X>
  static inline void pack(X x, const uint8_t* from, int64_t n, uint8_t* to) {
    _mm512_storeu_ps(to, load_fp32(x, from, n));
  }
};

// Activations become (padded_columns / kColumns, m, kColumns) of bf16 or fp32: one running pointer with constant offsets.
template <class T, class X>
void pack_x(const void* x, int m, int64_t columns, int64_t padded_columns, void* packed) {
  constexpr int64_t kBytes = sizeof(typename X::Storage);
  auto source = static_cast<const uint8_t*>(x);
  auto target = static_cast<uint8_t*>(packed) + kActivationHeader;
  for (int64_t c = 0; c < padded_columns; c += T::kColumns)
    for (int i = 0; i < m; ++i, target += T::kColumns * T::kXBytes) {
      int64_t left = columns - c;
      // No lane is loaded when nothing is left, so the address past the row is never touched.
      T::pack(X{}, source + (i * columns + (left > 0 ? c : 0)) * kBytes, left < 0 ? 0 : left < T::kColumns ? left : T::kColumns, target);
    }
}

// Bytes ahead of its row's pointer that a prefetch touches. Rows of one stream lie end to end, so it runs on into the next.
// The bitmasks are left to the hardware: its prefetchers follow them, and fewer instructions compete with the expansion.
constexpr int kPrefetch = 512;
constexpr int kPrefetchDense = 1024;

template <class T, int M, int R>
struct Block {
  static constexpr int kBytes = sizeof(typename T::Storage);
  static constexpr uint64_t kStepMask = (uint64_t(1) << T::kColumns) - 1;
  const uint8_t* values[R];
  const uint8_t* x;
  __m512 sum[R][M];

  inline void step(uint64_t (&bits)[R]) {
    typename T::Weights w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      uint32_t mask = uint32_t(bits[r] & kStepMask);
      bits[r] >>= T::kColumns;
      w[r] = T::expand(values[r], mask);
      values[r] += kBytes * count(mask);
    }
    multiply(w);
  }

  // The c-th columns of a word that keeps half of them. Its mask goes from memory to a mask register once and is shifted there,
  // which costs no slot of the pipes that expand and multiply.
  template <int c>
  inline void half_step(const __mmask64 (&bits)[R]) {
    typename T::Weights w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      w[r] = T::expand_half(values[r] + c / 2 * kBytes, uint32_t(_kshiftri_mask64(bits[r], c)));
    multiply(w);
  }

  inline void multiply(const typename T::Weights (&w)[R]) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      typename T::Activations xm = T::load(x + m * T::kColumns * T::kXBytes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        sum[r][m] = T::multiply(w[r], xm, sum[r][m]);
    }
    x += M * T::kColumns * T::kXBytes;
  }

  explicit Block(const uint8_t* const* rows, const void* activations) : x(static_cast<const uint8_t*>(activations) + kActivationHeader) {
    for (int r = 0; r < R; ++r) {
      values[r] = rows[r];
      for (int m = 0; m < M; ++m)
        sum[r][m] = _mm512_setzero_ps();
    }
  }

  inline void finish(float* out) const {
    add_all<R, M>(sum, out, [](int) { return _mm256_set1_ps(1.0f); });
  }
};

template <class T, int M, int R, int... step>
inline void half_word(Block<T, M, R>& block, const __mmask64 (&masks)[R], std::integer_sequence<int, step...>) {
  (block.template half_step<step * T::kColumns>(masks), ...);
}

// Half: every mask byte keeps 4 values.
template <class T, int M, int R, bool Half>
void packed_rows(const Rows& rows, const void* x, int64_t columns, float* out) {
  Block<T, M, R> block(rows.values, x);
  const uint8_t* bitmask[R];
  for (int r = 0; r < R; ++r)
    bitmask[r] = rows.bitmask[r];
  uint64_t bits[R];
  int64_t words = columns / 64;
  for (int64_t word = 0; word < words; ++word) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      prefetch(block.values[r] + kPrefetch);
      if (block.kBytes == 4) prefetch(block.values[r] + kPrefetch + 64);
      if (!Half) memcpy(&bits[r], bitmask[r], 8);
    }
    if constexpr (Half) {
      __mmask64 masks[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        memcpy(&masks[r], bitmask[r], sizeof masks[r]);
      half_word(block, masks, std::make_integer_sequence<int, 64 / T::kColumns>{});
    } else {
#pragma GCC unroll 4
      for (int c = 0; c < 64; c += T::kColumns)
        block.step(bits);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if (Half) block.values[r] += 32 * block.kBytes;
      bitmask[r] += 8;
    }
  }
  if (int64_t left = columns - 64 * words; left != 0) {
    for (int r = 0; r < R; ++r)
      bits[r] = tail_bits(rows.bitmask[r], words, columns);
    for (int64_t c = 0; c < left; c += T::kColumns)
      block.step(bits);
  }
  block.finish(out);
}

template <class T, int M, int R>
void dense_rows(const Rows& rows, const void* x, int64_t columns, float* out) {
  constexpr int kStepBytes = T::kColumns * Block<T, M, R>::kBytes;
  Block<T, M, R> block(rows.values, x);
  typename T::Weights w[R];
  for (int64_t i = 0; i < columns / T::kColumns; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      prefetch(block.values[r] + kPrefetchDense);
      w[r] = T::widen(block.values[r]);
      block.values[r] += kStepBytes;
    }
    block.multiply(w);
  }
  if (int64_t left = columns % T::kColumns; left != 0) {
    for (int r = 0; r < R; ++r)
      w[r] = T::widen(block.values[r], left);
    block.multiply(w);
  }
  block.finish(out);
}

void expand_to_half(const Rows& rows, int64_t columns, void* out) {
  const uint8_t* values = rows.values[0];
  const uint8_t* bitmask = rows.bitmask[0];
  auto target = static_cast<uint8_t*>(out);
  for (int64_t c = 0; c < columns; c += 64) {
    uint64_t bits = word_bits(bitmask, c / 64, columns);
    for (int64_t h = c; h < columns && h < c + 64; h += 32, bits >>= 32) {
      _mm512_mask_storeu_epi16(target + 2 * h, __mmask32(first(columns - h)), expand_words(values, uint32_t(bits)));
      values += 2 * count(uint32_t(bits));
    }
  }
}

inline __m512 expand_16(const Bf16&, const uint8_t* values, __mmask16 mask) {
  __m256i halves = _mm256_maskz_expand_epi16(mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline __m512 expand_16(const Fp16&, const uint8_t* values, __mmask16 mask) {
  return _mm512_cvtph_ps(_mm256_maskz_expand_epi16(mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values))));
}

inline __m512 expand_16(const Fp32&, const uint8_t* values, __mmask16 mask) { return Fp32Step::expand(values, mask); }

template <class T>
void expand_to_fp32(const Rows& rows, int64_t columns, void* out) {
  const uint8_t* values = rows.values[0];
  const uint8_t* bitmask = rows.bitmask[0];
  auto target = static_cast<float*>(out);
  for (int64_t c = 0; c < columns; c += 64) {
    uint64_t bits = word_bits(bitmask, c / 64, columns);
    for (int64_t h = c; h < columns && h < c + 64; h += 16, bits >>= 16) {
      auto mask = __mmask16(bits);
      _mm512_mask_storeu_ps(target + h, __mmask16(first(columns - h)), expand_16(T{}, values, mask));
      values += int(sizeof(typename T::Storage)) * count(mask);
    }
  }
}

// 32 registers hold R·M sums, R weights (twice as many in fp16) and one activation.
constexpr int rows_for(int m) { return m == 1 ? 4 : 3; }

template <class T, int M>
void fill(ValueKernels& set) {
  set.packed[0][M] = packed_rows<T, M, rows_for(M), false>;
  set.packed[1][M] = packed_rows<T, M, rows_for(M), true>;
  set.packed_one[M] = packed_rows<T, M, 1, false>;
  set.dense[M] = dense_rows<T, M, rows_for(M)>;
  set.dense_one[M] = dense_rows<T, M, 1>;
  if constexpr (M > 1) fill<T, M - 1>(set);
}

template <class T>
ValueKernels kernels_for(int dtype, ExpandRow expand, ExpandRow expand_fp32) {
  ValueKernels set{};
  set.x_bytes = T::kXBytes;
  set.max_m = kMaxActivations;
  set.rows_one = rows_for(1);
  set.rows_many = rows_for(2);
  set.pack[SPARSE_ENGINE_BF16] = pack_x<T, Bf16>;
  set.pack[SPARSE_ENGINE_FP16] = pack_x<T, Fp16>;
  set.pack[SPARSE_ENGINE_FP32] = pack_x<T, Fp32>;
  set.expand[dtype] = expand;
  set.expand[SPARSE_ENGINE_FP32] = expand_fp32;
  fill<T, kMaxActivations>(set);
  return set;
}

} // namespace

const KernelSet& avx512_kernels() {
  static const KernelSet set = [] {
    KernelSet all{"avx512",
                  {kernels_for<Bf16Step>(SPARSE_ENGINE_BF16, expand_to_half, expand_to_fp32<Bf16>),
                   kernels_for<Fp16Step>(SPARSE_ENGINE_FP16, expand_to_half, expand_to_fp32<Fp16>),
                   kernels_for<Fp32Step>(SPARSE_ENGINE_FP32, expand_to_fp32<Fp32>, expand_to_fp32<Fp32>), avx512_int8(), avx512_int4()}};
    add_avx512_panels(all.values);
    return all;
  }();
  return set;
}

} // namespace sparse_engine
