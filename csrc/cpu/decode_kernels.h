// What the decode step needs beside products, one set per instruction-set level: each level's file compiles the same source,
// decode_kernels.inc, with its own flags.
#pragma once

#include <stdint.h>

#include "sparse_engine.h"

namespace sparse_engine {

struct KernelSet;

// y = (x - mean) / sqrt(variance + epsilon) * weight + bias over n elements; weight or bias may be NULL.
using Normalise = void (*)(const float* x, const float* weight, const float* bias, float epsilon, int64_t n, float* y);

// n elements of the function's type to or from fp32.
using Widen = void (*)(const void* x, int64_t n, float* y);
using Narrow = void (*)(const float* x, int64_t n, void* y);

// Softmax attention of one query with n cached keys and values (n, head_dim) of the function's type.
//   next    what the caller will read then, of which the first bytes are fetched into cache; never read
//   scores  n floats of scratch
//   out     (head_dim,)
using Attend = void (*)(const float* q, const void* keys, const void* values, const void* next, int64_t n, int64_t head_dim, float scale,
                        float* scores, float* out);

struct DecodeKernels {
  Normalise normalise;
  Widen widen[3]; // [sparse_engine_dtype]
  Narrow narrow[3];
  Attend attend[3];
};

const DecodeKernels& decode_scalar();
const DecodeKernels& decode_avx2();
const DecodeKernels& decode_avx512();

const DecodeKernels& decode_kernels(const KernelSet& set);

} // namespace sparse_engine
