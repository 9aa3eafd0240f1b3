// Whole products over the kernels of one level. Arguments are those of sparse_engine.h, already checked.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels.h"
#include "sparse_engine.h"

namespace sparse_engine {

constexpr int64_t element_bytes(int32_t dtype) { return dtype == SPARSE_ENGINE_FP32 ? 4 : 2; }

struct PackedWeight {
  const uint8_t* values;
  int64_t values_count;
  int64_t element_bytes;
  const uint8_t* bitmask;
  const int64_t* row_offsets; // NULL: every row has row_values
  int64_t row_values;
  int64_t group; // M of N:M, or 0
  int64_t columns;

  int64_t start(int64_t row) const { return row_offsets ? row_offsets[row] : row * row_values; }
};

struct Output {
  int32_t dtype;
  const void* bias; // or NULL
  void* data;       // (m, rows)
  int64_t rows;
};

int32_t packed_linear(const KernelSet& set, const PackedWeight& w, const void* x, int64_t m, const Output& y, int32_t threads);
int32_t dense_linear(const KernelSet& set, const void* weight, int64_t columns, const void* x, int64_t m, const Output& y, int32_t threads);
int32_t expand_tile(const KernelSet& set, const PackedWeight& w, int32_t dtype, int32_t out_dtype, int64_t row_begin, int64_t row_end,
                    void* out, int32_t threads);
uint64_t read_bytes(const void* data, int64_t bytes, int32_t threads);

} // namespace sparse_engine
