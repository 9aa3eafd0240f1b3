// AVX2 + FMA + F16C + BMI: a mask byte at a time, expanded in registers and multiplied at once.
//
//   bf16   values  a b c d ........   16 bytes from the row's pointer, in both 128-bit halves
//          mask    0x69                picks one 32-byte shuffle out of 256
//          vpshufb 0a 00 00 0b 00 0c 0d 00   each kept value in the upper half of its fp32 slot
//
// Since a bf16 is the upper half of an fp32, that one shuffle both expands and converts. fp16 is expanded to 8 half-words
// and converted by vcvtph2ps; fp32 is permuted across the register and its dropped slots are cleared. The pointer moves by
// the byte's number of set bits, so one kernel serves every pattern. Several rows share each load of the activations.
//
// bf16 activations by a weight that keeps 4 values in every mask byte (2:4, 4:8) go the other way: the shuffle picks the 4
// activations that meet the stored values, which halves the multiply-adds.
//
//   x       p q r s t u v w     bf16, 8 columns; two mask bytes side by side in the register's halves
//   mask    0x69                picks one 16-byte shuffle out of 256
//   vpshufb 0p 0s 0u 0v         times 0a 0b 0c 0d, the values in stored order

#include <immintrin.h>

#include "kernels.h"
#include "numeric.h"
#include "sparse_engine.h"

namespace sparse_engine {
namespace {

constexpr uint8_t kZero = 0x80; // vpshufb writes 0 for an index with the top bit set

struct ShuffleBf16 {
  alignas(64) uint8_t index[256][32];
};
struct ShuffleHalf {
  alignas(64) uint8_t index[256][16];
};
struct PermuteFp32 {
  alignas(64) uint32_t index[256][8];
};

constexpr ShuffleBf16 make_bf16() {
  ShuffleBf16 t{};
  for (int mask = 0; mask < 256; ++mask)
    for (int slot = 0, kept = 0; slot < 8; ++slot) {
      bool keep = mask >> slot & 1;
      uint8_t* bytes = t.index[mask] + 4 * slot;
      bytes[0] = bytes[1] = kZero;
      bytes[2] = keep ? uint8_t(2 * kept) : kZero;
      bytes[3] = keep ? uint8_t(2 * kept + 1) : kZero;
      kept += keep;
    }
  return t;
}

constexpr ShuffleHalf make_half() {
  ShuffleHalf t{};
  for (int mask = 0; mask < 256; ++mask)
    for (int slot = 0, kept = 0; slot < 8; ++slot) {
      bool keep = mask >> slot & 1;
      t.index[mask][2 * slot] = keep ? uint8_t(2 * kept) : kZero;
      t.index[mask][2 * slot + 1] = keep ? uint8_t(2 * kept + 1) : kZero;
      kept += keep;
    }
  return t;
}

// The activations that a byte's first 4 kept columns meet, each in the upper half of its fp32 slot.
constexpr ShuffleHalf make_compress() {
  ShuffleHalf t{};
  for (int mask = 0; mask < 256; ++mask) {
    for (uint8_t& byte : t.index[mask])
      byte = kZero;
    for (int column = 0, kept = 0; column < 8 && kept < 4; ++column) {
      if (!(mask >> column & 1)) continue;
      t.index[mask][4 * kept + 2] = uint8_t(2 * column);
      t.index[mask][4 * kept + 3] = uint8_t(2 * column + 1);
      ++kept;
    }
  }
  return t;
}

// vpermps looks at the low 3 bits only, so the sign bit is free to mark the dropped slots for vblendvps.
constexpr PermuteFp32 make_fp32() {
  PermuteFp32 t{};
  for (int mask = 0; mask < 256; ++mask)
    for (int slot = 0, kept = 0; slot < 8; ++slot) {
      bool keep = mask >> slot & 1;
      t.index[mask][slot] = keep ? uint32_t(kept) : 0x80000000u;
      kept += keep;
    }
  return t;
}

constexpr ShuffleBf16 kBf16 = make_bf16();
constexpr ShuffleHalf kHalf = make_half();
constexpr ShuffleHalf kCompress = make_compress();
constexpr PermuteFp32 kFp32 = make_fp32();

// Each type also expands two mask bytes of 4 values each, `next` being the second one: for the 16-bit types with one load.

struct Bf16Lanes : Bf16 {
  static constexpr int kEntryBytes = sizeof(kBf16.index[0]);
  static constexpr bool kCompresses = true;
  static inline __m256i entry(uint64_t offset) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(kBf16.index[0] + offset)); }
  static inline __m256 expand_pair(const uint8_t* values, uint64_t offset, uint64_t next_offset, __m256& next) {
    __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
    next = _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_srli_si256(both, 8), entry(next_offset)));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, entry(offset)));
  }
  static inline __m256 expand(const uint8_t* values, uint64_t offset) {
    __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, entry(offset)));
  }
  static inline __m256 widen(const uint8_t* p) {
    __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
};

inline __m128i half_entry(uint64_t offset) { return _mm_load_si128(reinterpret_cast<const __m128i*>(kHalf.index[0] + offset)); }

inline __m128i expand_half(const uint8_t* values, uint64_t offset) {
  return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)), half_entry(offset));
}

struct Fp16Lanes : Fp16 {
  static constexpr bool kCompresses = false;
  static constexpr int kEntryBytes = sizeof(kHalf.index[0]);
  static inline __m256 expand_pair(const uint8_t* values, uint64_t offset, uint64_t next_offset, __m256& next) {
    __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    next = _mm256_cvtph_ps(_mm_shuffle_epi8(_mm_srli_si128(both, 8), half_entry(next_offset)));
    return _mm256_cvtph_ps(_mm_shuffle_epi8(both, half_entry(offset)));
  }
  static inline __m256 expand(const uint8_t* values, uint64_t offset) { return _mm256_cvtph_ps(expand_half(values, offset)); }
  static inline __m256 widen(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
};

struct Fp32Lanes : Fp32 {
  static constexpr bool kCompresses = false;
  static constexpr int kEntryBytes = sizeof(kFp32.index[0]);
  static inline __m256 expand_pair(const uint8_t* values, uint64_t offset, uint64_t next_offset, __m256& next) {
    next = expand(values + 16, next_offset);
    return expand(values, offset);
  }
  static inline __m256 expand(const uint8_t* values, uint64_t offset) {
    __m256i index = _mm256_load_si256(reinterpret_cast<const __m256i*>(kFp32.index[0] + offset / 4));
    __m256 spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(values)), index);
    return _mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(index));
  }
  static inline __m256 widen(const uint8_t* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
};

inline float sum_of(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

constexpr int64_t padded(int64_t columns) { return (columns + kColumnPad - 1) / kColumnPad * kColumnPad; }

// bf16 activations are packed twice: as fp32, and behind that as they are, (padded_columns / 16, m, 16).
inline const uint8_t* second_layout(const void* packed, int m, int64_t columns) {
  return static_cast<const uint8_t*>(packed) + kActivationHeader + sizeof(float) * size_t(m) * padded(columns);
}

inline __m256 load_fp32(Bf16, const uint8_t* p) { return Bf16Lanes::widen(p); }
inline __m256 load_fp32(Fp16, const uint8_t* p) { return Fp16Lanes::widen(p); }
inline __m256 load_fp32(Fp32, const uint8_t* p) { return Fp32Lanes::widen(p); }

// Activations become fp32 (padded_columns / 8, m, 8): one running pointer with constant offsets.
template <class T, class X>
void pack_x(const void* x, int m, int64_t columns, int64_t padded_columns, void* packed) {
  constexpr int64_t kBytes = sizeof(typename X::Storage);
  auto source = static_cast<const uint8_t*>(x);
  auto target = reinterpret_cast<float*>(static_cast<uint8_t*>(packed) + kActivationHeader);
  const float* whole = target;
  for (int64_t c = 0; c < padded_columns; c += 8)
    for (int i = 0; i < m; ++i, target += 8) {
      const uint8_t* from = source + (i * columns + c) * kBytes;
      if (c + 8 <= columns) {
        _mm256_storeu_ps(target, load_fp32(X{}, from));
        continue;
      }
      for (int j = 0; j < 8; ++j)
        target[j] = c + j < columns ? X::load(from + j * kBytes) : 0.0f;
    }
  if (!T::kCompresses) return;
  auto half = reinterpret_cast<uint16_t*>(target);
  for (int64_t c = 0; c < padded_columns; c += 16)
    for (int i = 0; i < m; ++i, half += 16)
      for (int j = 0; j < 16; ++j)
        half[j] = Bf16::round(whole[(c + j) / 8 * 8 * m + 8 * i + j % 8]);
}

inline uint64_t load_bits(const uint8_t* bitmask) {
  uint64_t bits;
  memcpy(&bits, bitmask, sizeof bits);
  return bits;
}

// Byte b of a mask word times the size of a table entry. From a register, since the loop is short of load slots.
template <int EntryBytes>
inline uint64_t entry_offset(uint64_t bits, int b) {
  const int rotation = (8 * b - (EntryBytes == 32 ? 5 : 4)) & 63;
#if defined(__GNUC__) && !defined(__clang__) && !defined(SPARSE_ENGINE_SANITIZED)
  // Left to itself GCC copies the word and shifts the copy. The constant is one only where loops are unrolled, from -O2 on.
  uint64_t rotated;
  __asm__("rorx %2, %1, %0" : "=r"(rotated) : "r"(bits), "i"(rotation));
#else
  uint64_t rotated = bits >> rotation | bits << (64 - rotation);
#endif
  return rotated & (0xff * EntryBytes);
}

// F values are kept by every mask byte (N:M with M dividing 8); 0 when their number must be counted.
template <class T, int M, int R, int F>
struct Block {
  static constexpr int kBytes = sizeof(typename T::Storage);
  // One activation row leaves registers for two sums per weight row, which halves the wait for the previous addition.
  static constexpr int kSums = M == 1 ? 2 : M;
  const uint8_t* values[R];
  const uint8_t* bitmask[R];
  const float* x;
  __m256 sum[R][kSums];

  // The 8 columns of a mask byte of row r, the b-th from its pointer. A table offset has as many bits set as its byte has.
  inline __m256 take(int r, int b, uint64_t offset) {
    if constexpr (F > 0) return T::expand(values[r] + b * F * kBytes, offset);
    __m256 w = T::expand(values[r], offset);
    values[r] += kBytes * __builtin_popcountll(offset);
    return w;
  }

  // Mask byte b of every row. The rows go side by side and share each load of the activations.
  inline void byte(int b, unsigned valid = 0xff) {
    __m256 w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      w[r] = take(r, b, uint64_t(bitmask[r][b] & valid) * T::kEntryBytes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      __m256 xm = _mm256_loadu_ps(x + 8 * (b * M + m));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        sum[r][m] = _mm256_fmadd_ps(w[r], xm, sum[r][m]);
    }
  }

  // 8 mask bytes of every row: 64 columns.
  inline void word() {
    if constexpr (M == 1)
      alternating_word();
    else {
#pragma GCC unroll 8
      for (int b = 0; b < 8; ++b)
        byte(b);
    }
    advance(8);
  }

  // 32 columns of the one activation row stay in registers while the weight rows take turns.
  inline void alternating_word() {
#pragma GCC unroll 2
    for (int half = 0; half < 8; half += 4) {
      __m256 xs[4];
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b)
        xs[b] = _mm256_loadu_ps(x + 8 * (half + b));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        uint64_t bits = load_bits(bitmask[r]);
#pragma GCC unroll 2
        for (int b = half; b < half + 4; b += 2) {
          __m256 w, next;
          uint64_t offset = entry_offset<T::kEntryBytes>(bits, b), next_offset = entry_offset<T::kEntryBytes>(bits, b + 1);
          if constexpr (F == 4) {
            w = T::expand_pair(values[r] + b * F * kBytes, offset, next_offset, next);
          } else {
            w = take(r, b, offset);
            next = take(r, b + 1, next_offset);
          }
          sum[r][0] = _mm256_fmadd_ps(w, xs[b - half], sum[r][0]);
          sum[r][1] = _mm256_fmadd_ps(next, xs[b - half + 1], sum[r][1]);
        }
      }
    }
  }

  // 16 columns of row r, the p-th from its pointer: which activations the 8 stored values meet, and the values as fp32.
  inline __m256i picks(uint64_t bits, int p) const {
    auto pick = [&](int b) { return _mm_load_si128(reinterpret_cast<const __m128i*>(kCompress.index[0] + entry_offset<16>(bits, b))); };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(pick(2 * p)), pick(2 * p + 1), 1);
  }

  inline __m256 stored(int r, int p) const {
    const __m256i widen = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, //
                                           -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
    __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values[r] + 16 * p));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(eight), widen));
  }

  static inline __m256i load_half(const uint8_t* half_x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(half_x)); }

  static inline __m256 kept(__m256i half_x, __m256i picks) { return _mm256_castsi256_ps(_mm256_shuffle_epi8(half_x, picks)); }

  // The product of word() by compressing bf16 activations; half_x points at the word's 64 · M of them.
  inline void compressing_word(const uint8_t* half_x) {
    if constexpr (M == 1) {
      __m256i xs[4];
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p)
        xs[p] = load_half(half_x + 32 * p);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        uint64_t bits = load_bits(bitmask[r]);
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p)
          sum[r][p & 1] = _mm256_fmadd_ps(stored(r, p), kept(xs[p], picks(bits, p)), sum[r][p & 1]);
      }
    } else {
      uint64_t bits[R];
      for (int r = 0; r < R; ++r)
        bits[r] = load_bits(bitmask[r]);
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        __m256 w[R];
        __m256i at[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          w[r] = stored(r, p);
          at[r] = picks(bits[r], p);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          __m256i xm = load_half(half_x + 32 * (p * M + m));
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r)
            sum[r][m] = _mm256_fmadd_ps(w[r], kept(xm, at[r]), sum[r][m]);
        }
      }
    }
    advance(8);
  }

  inline void advance(int bytes) {
    for (int r = 0; r < R; ++r) {
      values[r] += bytes * F * kBytes;
      bitmask[r] += bytes;
    }
    x += bytes * 8 * M;
  }
};

template <class T, int M, int R, int F>
void packed_rows(const Rows& rows, const void* x, int64_t columns, float* out) {
  Block<T, M, R, F> block;
  block.x = reinterpret_cast<const float*>(static_cast<const uint8_t*>(x) + kActivationHeader);
  for (int r = 0; r < R; ++r) {
    block.values[r] = rows.values[r];
    block.bitmask[r] = rows.bitmask[r];
    for (int i = 0; i < block.kSums; ++i)
      block.sum[r][i] = _mm256_setzero_ps();
  }
  int64_t words = columns / 64;
  if constexpr (F == 4 && T::kCompresses) {
    const uint8_t* half_x = second_layout(x, M, columns);
    for (; words > 0; --words, half_x += 128 * M)
      block.compressing_word(half_x);
  }
  for (; words > 0; --words)
    block.word();
  for (int64_t byte = columns % 64 / 8; byte > 0; --byte) {
    block.byte(0);
    block.advance(1);
  }
  if (int left = int(columns % 8); left != 0) block.byte(0, (1u << left) - 1);
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m)
      out[r * M + m] = sum_of(M == 1 ? _mm256_add_ps(block.sum[r][0], block.sum[r][1]) : block.sum[r][m]);
}

// Bytes ahead of its row's pointer that a dense row is prefetched. Packed rows gain nothing from it: their loop is busy with loads.
constexpr int kPrefetch = 1024;

template <class T, int M, int R>
void dense_rows(const Rows& rows, const void* x, int64_t columns, float* out) {
  constexpr int64_t kBytes = sizeof(typename T::Storage);
  auto activations = reinterpret_cast<const float*>(static_cast<const uint8_t*>(x) + kActivationHeader);
  __m256 sum[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m)
      sum[r][m] = _mm256_setzero_ps();
  const uint8_t* row[R];
  for (int r = 0; r < R; ++r)
    row[r] = rows.values[r];
  auto step = [&](const uint8_t* const(&from)[R], const float* xs) {
    __m256 w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      w[r] = T::widen(from[r]);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      __m256 xm = _mm256_loadu_ps(xs + 8 * m);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        sum[r][m] = _mm256_fmadd_ps(w[r], xm, sum[r][m]);
    }
  };
  int64_t whole = columns / 8;
  for (int64_t i = 0; i < whole; ++i) {
    if (i % (64 / (8 * kBytes)) == 0)
      for (int r = 0; r < R; ++r)
        _mm_prefetch(reinterpret_cast<const char*>(row[r] + kPrefetch), _MM_HINT_T0);
    step(row, activations);
    for (int r = 0; r < R; ++r)
      row[r] += 8 * kBytes;
    activations += 8 * M;
  }
  if (int64_t left = columns - 8 * whole; left != 0) {
    uint8_t padded[R][32] = {};
    const uint8_t* from[R];
    for (int r = 0; r < R; ++r) {
      memcpy(padded[r], row[r], size_t(left * kBytes));
      from[r] = padded[r];
    }
    step(from, activations);
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m)
      out[r * M + m] = sum_of(sum[r][m]);
}

// Writes one mask byte's 8 elements at a time; the last, shorter group goes through a buffer.
template <int ValueBytes, int OutBytes, int EntryBytes, class Expand>
inline void expand_row(const Rows& rows, int64_t columns, void* out, Expand expand) {
  const uint8_t* values = rows.values[0];
  const uint8_t* bitmask = rows.bitmask[0];
  auto target = static_cast<uint8_t*>(out);
  int64_t whole = columns / 8;
  for (int64_t b = 0; b < whole; ++b) {
    expand(values, uint64_t(bitmask[b]) * EntryBytes, target);
    values += ValueBytes * __builtin_popcount(bitmask[b]);
    target += 8 * OutBytes;
  }
  if (int64_t left = columns - 8 * whole; left != 0) {
    uint8_t group[8 * OutBytes];
    expand(values, uint64_t(bitmask[whole] & ((1u << left) - 1)) * EntryBytes, group);
    memcpy(target, group, size_t(left * OutBytes));
  }
}

void expand_to_half(const Rows& rows, int64_t columns, void* out) {
  expand_row<2, 2, sizeof(kHalf.index[0])>(rows, columns, out, [](const uint8_t* from, uint64_t offset, uint8_t* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), expand_half(from, offset));
  });
}

template <class T>
void expand_to_fp32(const Rows& rows, int64_t columns, void* out) {
  expand_row<sizeof(typename T::Storage), 4, T::kEntryBytes>(rows, columns, out, [](const uint8_t* from, uint64_t offset, uint8_t* to) {
    _mm256_storeu_ps(reinterpret_cast<float*>(to), T::expand(from, offset));
  });
}

// 16 registers hold R·M sums, R weights and one activation.
constexpr int rows_for(int m) { return m == 1 ? 4 : 2; }

template <class T, int M>
void fill(ValueKernels& set) {
  set.packed[0][M] = packed_rows<T, M, rows_for(M), 0>;
  set.packed[1][M] = packed_rows<T, M, rows_for(M), 4>;
  set.packed_one[M] = packed_rows<T, M, 1, 0>;
  set.dense[M] = dense_rows<T, M, rows_for(M)>;
  set.dense_one[M] = dense_rows<T, M, 1>;
  if constexpr (M > 1) fill<T, M - 1>(set);
}

template <class T>
ValueKernels kernels_for(int dtype, ExpandRow expand) {
  constexpr int kMostActivations = 4;
  ValueKernels set{};
  set.x_bytes = sizeof(float) + (T::kCompresses ? sizeof(typename T::Storage) : 0);
  set.max_m = kMostActivations;
  set.rows_one = rows_for(1);
  set.rows_many = rows_for(2);
  set.pack[SPARSE_ENGINE_BF16] = pack_x<T, Bf16>;
  set.pack[SPARSE_ENGINE_FP16] = pack_x<T, Fp16>;
  set.pack[SPARSE_ENGINE_FP32] = pack_x<T, Fp32>;
  set.expand[dtype] = expand;
  set.expand[SPARSE_ENGINE_FP32] = expand_to_fp32<T>;
  fill<T, kMostActivations>(set);
  return set;
}

} // namespace

const KernelSet& avx2_kernels() {
  static const KernelSet set{"avx2",
                             {kernels_for<Bf16Lanes>(SPARSE_ENGINE_BF16, expand_to_half),
                              kernels_for<Fp16Lanes>(SPARSE_ENGINE_FP16, expand_to_half),
                              kernels_for<Fp32Lanes>(SPARSE_ENGINE_FP32, expand_to_fp32<Fp32Lanes>), avx2_int8(), avx2_int4()}};
  return set;
}

} // namespace sparse_engine
