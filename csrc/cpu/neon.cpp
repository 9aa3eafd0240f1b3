// ARM NEON, which every 64-bit ARM processor has: a mask byte at a time, expanded by a table look-up over bytes.
//
//   bf16   values  a b c d ........   16 bytes from the row's pointer
//          mask    0x69                picks 32 byte indices out of 256 entries
//          tbl     0a 00 00 0b 00 0c 0d 00   each kept value in the upper half of its fp32 slot
//
// A look-up gives 0 for an index out of range, which marks the dropped slots. fp16 is expanded to 8 half-words and converted; fp32
// is looked up over two registers. The pointer moves by the byte's number of set bits, so one kernel serves every pattern.

#include <arm_neon.h>

#include "kernels.h"
#include "numeric.h"
#include "sparse_engine.h"

namespace sparse_engine {
namespace {

constexpr uint8_t kZero = 0xff;

// Byte indices of a mask byte's 8 slots of SlotBytes each, of which the kept value fills the last ValueBytes.
template <int SlotBytes, int ValueBytes>
struct Table {
  alignas(64) uint8_t index[256][8 * SlotBytes];

  constexpr Table() : index() {
    for (int mask = 0; mask < 256; ++mask)
      for (int slot = 0, kept = 0; slot < 8; ++slot) {
        bool keep = mask >> slot & 1;
        for (int byte = 0; byte < SlotBytes; ++byte) {
          int from = byte - (SlotBytes - ValueBytes);
          index[mask][SlotBytes * slot + byte] = keep && from >= 0 ? uint8_t(ValueBytes * kept + from) : kZero;
        }
        kept += keep;
      }
  }
};

constexpr Table<4, 2> kBf16;
constexpr Table<2, 2> kHalf;
constexpr Table<4, 4> kFp32;

struct Eight {
  float32x4_t low, high;
};

// Each type: the 8 columns of a mask byte whose kept values begin at `values`, and 8 elements that lie side by side.
struct Bf16Lanes : Bf16 {
  static inline Eight expand(const uint8_t* values, uint8_t mask) {
    uint8x16_t from = vld1q_u8(values);
    const uint8_t* index = kBf16.index[mask];
    return {vreinterpretq_f32_u8(vqtbl1q_u8(from, vld1q_u8(index))), vreinterpretq_f32_u8(vqtbl1q_u8(from, vld1q_u8(index + 16)))};
  }
  static inline Eight widen(const uint8_t* p) {
    uint16x8_t half = vreinterpretq_u16_u8(vld1q_u8(p));
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(half), 16)), vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(half), 16))};
  }
};

inline Eight convert(uint8x16_t halves) {
  float16x8_t half = vreinterpretq_f16_u8(halves);
  return {vcvt_f32_f16(vget_low_f16(half)), vcvt_f32_f16(vget_high_f16(half))};
}

struct Fp16Lanes : Fp16 {
  static inline Eight expand(const uint8_t* values, uint8_t mask) {
    return convert(vqtbl1q_u8(vld1q_u8(values), vld1q_u8(kHalf.index[mask])));
  }
  static inline Eight widen(const uint8_t* p) { return convert(vld1q_u8(p)); }
};

struct Fp32Lanes : Fp32 {
  static inline Eight expand(const uint8_t* values, uint8_t mask) {
    uint8x16x2_t from{{vld1q_u8(values), vld1q_u8(values + 16)}};
    const uint8_t* index = kFp32.index[mask];
    return {vreinterpretq_f32_u8(vqtbl2q_u8(from, vld1q_u8(index))), vreinterpretq_f32_u8(vqtbl2q_u8(from, vld1q_u8(index + 16)))};
  }
  static inline Eight widen(const uint8_t* p) { return {vreinterpretq_f32_u8(vld1q_u8(p)), vreinterpretq_f32_u8(vld1q_u8(p + 16))}; }
};

template <class T>
inline Eight load(const uint8_t* p, int64_t n) {
  constexpr int kBytes = sizeof(typename T::Storage);
  if (n >= 8) return T::widen(p);
  alignas(16) float values[8] = {};
  for (int64_t i = 0; i < n; ++i)
    values[i] = T::load(p + i * kBytes);
  return {vld1q_f32(values), vld1q_f32(values + 4)};
}

// Activations become fp32 (padded_columns / 8, m, 8).
template <class X>
void pack_x(const void* x, int m, int64_t columns, int64_t padded_columns, void* packed) {
  constexpr int64_t kBytes = sizeof(typename X::Storage);
  auto source = static_cast<const uint8_t*>(x);
  auto target = reinterpret_cast<float*>(static_cast<uint8_t*>(packed) + kActivationHeader);
  for (int64_t c = 0; c < padded_columns; c += 8)
    for (int i = 0; i < m; ++i, target += 8) {
      Eight eight = c < columns ? load<X>(source + (i * columns + c) * kBytes, columns - c) : Eight{vdupq_n_f32(0), vdupq_n_f32(0)};
      vst1q_f32(target, eight.low);
      vst1q_f32(target + 4, eight.high);
    }
}

// Two sums for each product, of the columns' halves.
template <int M, int R>
struct Block {
  Eight sum[R][M];
  const float* x;

  explicit Block(const void* activations)
      : x(reinterpret_cast<const float*>(static_cast<const uint8_t*>(activations) + kActivationHeader)) {
    for (auto& row : sum)
      for (Eight& s : row)
        s = {vdupq_n_f32(0), vdupq_n_f32(0)};
  }

  inline void multiply(const Eight (&w)[R]) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m, x += 8) {
      float32x4_t low = vld1q_f32(x), high = vld1q_f32(x + 4);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        sum[r][m].low = vfmaq_f32(sum[r][m].low, w[r].low, low);
        sum[r][m].high = vfmaq_f32(sum[r][m].high, w[r].high, high);
      }
    }
  }

  inline void finish(float* out) const {
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m)
        out[r * M + m] = vaddvq_f32(vaddq_f32(sum[r][m].low, sum[r][m].high));
  }
};

template <class T, int M, int R>
void packed_rows(const Rows& rows, const void* x, int64_t columns, float* out) {
  constexpr int kBytes = sizeof(typename T::Storage);
  Block<M, R> block(x);
  const uint8_t* values[R];
  for (int r = 0; r < R; ++r)
    values[r] = rows.values[r];
  for (int64_t byte = 0; 8 * byte < columns; ++byte) {
    Eight w[R];
    uint8_t valid = columns - 8 * byte >= 8 ? 0xff : uint8_t((1u << (columns - 8 * byte)) - 1);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      uint8_t mask = rows.bitmask[r][byte] & valid;
      w[r] = T::expand(values[r], mask);
      values[r] += kBytes * __builtin_popcount(mask);
    }
    block.multiply(w);
  }
  block.finish(out);
}

template <class T, int M, int R>
void dense_rows(const Rows& rows, const void* x, int64_t columns, float* out) {
  constexpr int kBytes = sizeof(typename T::Storage);
  Block<M, R> block(x);
  for (int64_t c = 0; c < columns; c += 8) {
    Eight w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      w[r] = load<T>(rows.values[r] + c * kBytes, columns - c);
    block.multiply(w);
  }
  block.finish(out);
}

template <class T>
void expand_to_fp32(const Rows& rows, int64_t columns, void* out) {
  auto target = static_cast<float*>(out);
  const uint8_t* values = rows.values[0];
  for (int64_t c = 0; c < columns; c += 8) {
    int64_t left = columns - c;
    uint8_t mask = rows.bitmask[0][c / 8] & (left >= 8 ? 0xff : uint8_t((1u << left) - 1));
    Eight w = T::expand(values, mask);
    values += int(sizeof(typename T::Storage)) * __builtin_popcount(mask);
    float eight[8];
    vst1q_f32(eight, w.low);
    vst1q_f32(eight + 4, w.high);
    memcpy(target + c, eight, size_t(left < 8 ? left : 8) * sizeof(float));
  }
}

void expand_to_half(const Rows& rows, int64_t columns, void* out) {
  auto target = static_cast<uint8_t*>(out);
  const uint8_t* values = rows.values[0];
  for (int64_t c = 0; c < columns; c += 8) {
    int64_t left = columns - c;
    uint8_t mask = rows.bitmask[0][c / 8] & (left >= 8 ? 0xff : uint8_t((1u << left) - 1));
    uint8_t eight[16];
    vst1q_u8(eight, vqtbl1q_u8(vld1q_u8(values), vld1q_u8(kHalf.index[mask])));
    values += 2 * __builtin_popcount(mask);
    memcpy(target + 2 * c, eight, size_t(left < 8 ? left : 8) * 2);
  }
}

// 32 registers hold 2 · R · M sums, 2 · R halves of weights and 2 of activations.
constexpr int rows_for(int m) { return m == 1 ? 4 : 2; }

template <class T, int M>
void fill(ValueKernels& set) {
  set.packed[0][M] = set.packed[1][M] = packed_rows<T, M, rows_for(M)>;
  set.packed_one[M] = packed_rows<T, M, 1>;
  set.dense[M] = dense_rows<T, M, rows_for(M)>;
  set.dense_one[M] = dense_rows<T, M, 1>;
  if constexpr (M > 1) fill<T, M - 1>(set);
}

template <class T>
ValueKernels kernels_for(int dtype, ExpandRow expand) {
  constexpr int kMostActivations = 5;
  ValueKernels set{};
  set.x_bytes = sizeof(float);
  set.max_m = kMostActivations;
  set.rows_one = rows_for(1);
  set.rows_many = rows_for(2);
  set.pack[SPARSE_ENGINE_BF16] = pack_x<Bf16Lanes>;
  set.pack[SPARSE_ENGINE_FP16] = pack_x<Fp16Lanes>;
  set.pack[SPARSE_ENGINE_FP32] = pack_x<Fp32Lanes>;
  set.expand[dtype] = expand;
  set.expand[SPARSE_ENGINE_FP32] = expand_to_fp32<T>;
  fill<T, kMostActivations>(set);
  return set;
}

} // namespace

const KernelSet& neon_kernels() {
  static const KernelSet set{"neon",
                             {kernels_for<Bf16Lanes>(SPARSE_ENGINE_BF16, expand_to_half),
                              kernels_for<Fp16Lanes>(SPARSE_ENGINE_FP16, expand_to_half),
                              kernels_for<Fp32Lanes>(SPARSE_ENGINE_FP32, expand_to_fp32<Fp32Lanes>), scalar_int8(), scalar_int4()}};
  return set;
}

} // namespace sparse_engine
