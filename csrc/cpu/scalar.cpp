// The portable form of every kernel: plain C++ for processors without a level of their own, and the oracle of the others.

#include "kernels.h"
#include "numeric.h"
#include "sparse_engine.h"

namespace sparse_engine {
namespace {

// Activations become fp32 (columns, m): the m values that meet one weight lie side by side.
template <class X>
void pack_x(const void* x, int m, int64_t columns, int64_t padded_columns, void* packed) {
  auto source = static_cast<const uint8_t*>(x);
  auto target = reinterpret_cast<float*>(static_cast<uint8_t*>(packed) + kActivationHeader);
  for (int64_t c = 0; c < padded_columns; ++c)
    for (int i = 0; i < m; ++i)
      *target++ = c < columns ? X::load(source + (i * columns + c) * int64_t(sizeof(typename X::Storage))) : 0.0f;
}

template <class T, int M>
void packed_row(const Rows& rows, const void* x, int64_t columns, float* out) {
  auto activations = reinterpret_cast<const float*>(static_cast<const uint8_t*>(x) + kActivationHeader);
  const uint8_t* value = rows.values[0];
  float sum[M] = {};
  for (int64_t word = 0; 64 * word < columns; ++word) {
    uint64_t bits = tail_bits(rows.bitmask[0], word, columns - 64 * word < 64 ? columns : 64 * word + 64);
    for (int j = 0; bits != 0; ++j, bits >>= 1) {
      if (!(bits & 1)) continue;
      float w = T::load(value);
      value += sizeof(typename T::Storage);
      const float* xs = activations + (64 * word + j) * M;
      for (int m = 0; m < M; ++m)
        sum[m] += w * xs[m];
    }
  }
  for (int m = 0; m < M; ++m)
    out[m] = sum[m];
}

template <class T, int M>
void dense_row(const Rows& rows, const void* x, int64_t columns, float* out) {
  auto activations = reinterpret_cast<const float*>(static_cast<const uint8_t*>(x) + kActivationHeader);
  float sum[M] = {};
  for (int64_t c = 0; c < columns; ++c) {
    float w = T::load(rows.values[0] + c * int64_t(sizeof(typename T::Storage)));
    for (int m = 0; m < M; ++m)
      sum[m] += w * activations[c * M + m];
  }
  for (int m = 0; m < M; ++m)
    out[m] = sum[m];
}

template <class T, class Out>
void expand_row(const Rows& rows, int64_t columns, void* out) {
  const uint8_t* values = rows.values[0];
  const uint8_t* bitmask = rows.bitmask[0];
  auto target = static_cast<typename Out::Storage*>(out);
  for (int64_t c = 0; c < columns; ++c) {
    bool kept = (bitmask[c >> 3] >> (c & 7)) & 1;
    target[c] = Out::round(kept ? T::load(values) : 0.0f);
    if (kept) values += sizeof(typename T::Storage);
  }
}

template <class T, int M>
void fill(ValueKernels& set) {
  set.packed[0][M] = set.packed[1][M] = set.packed_one[M] = packed_row<T, M>;
  set.dense[M] = set.dense_one[M] = dense_row<T, M>;
  if constexpr (M > 1) fill<T, M - 1>(set);
}

template <class T>
ValueKernels kernels_for(int dtype) {
  ValueKernels set{};
  set.x_bytes = sizeof(float);
  set.max_m = kMaxActivations;
  set.rows_one = set.rows_many = 1;
  set.pack[SPARSE_ENGINE_BF16] = pack_x<Bf16>;
  set.pack[SPARSE_ENGINE_FP16] = pack_x<Fp16>;
  set.pack[SPARSE_ENGINE_FP32] = pack_x<Fp32>;
  set.expand[dtype] = expand_row<T, T>;
  set.expand[SPARSE_ENGINE_FP32] = expand_row<T, Fp32>;
  fill<T, kMaxActivations>(set);
  return set;
}

} // namespace

const KernelSet& scalar_kernels() {
  static const KernelSet set{"scalar",
                             {kernels_for<Bf16>(SPARSE_ENGINE_BF16), kernels_for<Fp16>(SPARSE_ENGINE_FP16),
                              kernels_for<Fp32>(SPARSE_ENGINE_FP32), scalar_int8(), scalar_int4()}};
  return set;
}

} // namespace sparse_engine
