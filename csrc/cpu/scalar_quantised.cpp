// int8 and int4 weights in portable C++: the oracle of the other levels, which quantise activations to the same integers.

#include <math.h>

#include "kernels.h"
#include "numeric.h"
#include "sparse_engine.h"

namespace sparse_engine {
namespace {

// Value i of a row, as an integer.
struct Int8 {
  static inline int value(const uint8_t* row, int64_t i) { return int8_t(row[i]); }
  static inline float scale(const uint8_t* scales, int64_t) { return Fp32::load(scales); }
};

struct Int4 {
  static inline int value(const uint8_t* row, int64_t i) { return ((row[i / 2] >> (i % 2 ? 4 : 0) & 0xf) ^ 8) - 8; }
  static inline float scale(const uint8_t* scales, int64_t column) { return Fp16::load(scales + column / kScaleColumns * 2); }
};

// Activations become int8 (columns, m): the m values that meet one weight lie side by side.
template <class X>
void pack_x(const void* x, int m, int64_t columns, int64_t, void* packed) {
  constexpr int64_t kBytes = sizeof(typename X::Storage);
  auto source = static_cast<const uint8_t*>(x);
  auto scales = static_cast<float*>(packed);
  auto target = static_cast<int8_t*>(packed) + kActivationHeader;
  for (int i = 0; i < m; ++i) {
    const uint8_t* row = source + i * columns * kBytes;
    uint32_t most = 0; // of the magnitudes as integers, which order as they do and put NaN on top, so that it reaches the result
    for (int64_t c = 0; c < columns; ++c) {
      uint32_t bits = bits_from_float(X::load(row + c * kBytes)) & 0x7fffffffu;
      most = bits > most ? bits : most;
    }
    float magnitude = float_from_bits(most);
    float inverse = magnitude > 0x1p-120f && magnitude < 0x1p127f ? 127.0f / magnitude : 0.0f;
    scales[i] = magnitude / 127.0f;
    for (int64_t c = 0; c < columns; ++c)
      target[c * m + i] = inverse == 0.0f ? int8_t(0) : int8_t(nearbyintf(X::load(row + c * kBytes) * inverse));
  }
}

// Weights [begin, end) of a row by all activations; `kept` counts the values before them and moves on.
template <class V, int M, bool Dense>
void add_products(const Rows& rows, const int8_t* x, int64_t begin, int64_t end, int64_t& kept, int64_t (&sum)[M]) {
  for (int64_t c = begin; c < end; ++c) {
    if (!Dense && !(rows.bitmask[0][c >> 3] >> (c & 7) & 1)) continue;
    int w = V::value(rows.values[0], kept++);
    for (int m = 0; m < M; ++m)
      sum[m] += w * x[c * M + m];
  }
}

template <class V, int M, bool Dense>
void row(const Rows& rows, const void* x, int64_t columns, float* out) {
  auto scales = static_cast<const float*>(x);
  auto activations = static_cast<const int8_t*>(x) + kActivationHeader;
  double total[M] = {};
  int64_t kept = 0;
  for (int64_t c = 0; c < columns; c += kScaleColumns) {
    int64_t sum[M] = {};
    add_products<V, M, Dense>(rows, activations, c, c + kScaleColumns < columns ? c + kScaleColumns : columns, kept, sum);
    for (int m = 0; m < M; ++m)
      total[m] += double(sum[m]) * double(V::scale(rows.scales[0], c));
  }
  for (int m = 0; m < M; ++m)
    out[m] = float(total[m]) * scales[m];
}

template <class V, class Out>
void expand_row(const Rows& rows, int64_t columns, void* out) {
  auto target = static_cast<typename Out::Storage*>(out);
  for (int64_t c = 0, kept = 0; c < columns; ++c) {
    bool keep = rows.bitmask[0][c >> 3] >> (c & 7) & 1;
    target[c] = Out::round(keep ? float(V::value(rows.values[0], kept)) * V::scale(rows.scales[0], c) : 0.0f);
    kept += keep;
  }
}

template <class V, int M>
void fill(ValueKernels& set, bool dense) {
  set.packed[0][M] = set.packed[1][M] = set.packed_one[M] = row<V, M, false>;
  if (dense) set.dense[M] = set.dense_one[M] = row<V, M, true>;
  if constexpr (M > 1) fill<V, M - 1>(set, dense);
}

template <class V>
ValueKernels kernels_for(bool dense) {
  ValueKernels set{};
  set.x_bytes = 1;
  set.max_m = kMaxActivations;
  set.rows_one = set.rows_many = 1;
  set.pack[SPARSE_ENGINE_BF16] = pack_x<Bf16>;
  set.pack[SPARSE_ENGINE_FP16] = pack_x<Fp16>;
  set.pack[SPARSE_ENGINE_FP32] = pack_x<Fp32>;
  set.expand[SPARSE_ENGINE_BF16] = expand_row<V, Bf16>;
  set.expand[SPARSE_ENGINE_FP16] = expand_row<V, Fp16>;
  set.expand[SPARSE_ENGINE_FP32] = expand_row<V, Fp32>;
  fill<V, kMaxActivations>(set, dense);
  return set;
}

} // namespace

ValueKernels scalar_int8() { return kernels_for<Int8>(true); }
ValueKernels scalar_int4() { return kernels_for<Int4>(false); }

} // namespace sparse_engine
