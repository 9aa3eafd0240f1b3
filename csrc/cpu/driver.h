// Products over the kernels of one level. Arguments are those of sparse_engine.h, already checked.
//
// `Linear` is one product whose threads are the caller's: it starts none, so it can be called from inside a parallel region
// that already runs. A step of several products prepares a Linear for each weight once and then, in every thread:
//
//   Linear linear(set, weight);                             set: current_kernels() of isa.h; nothing large is copied
//   linear.place_tail(memory);                              memory of tail_bytes(), which must outlive the Linear
//
//   #pragma omp parallel
//     linear.pack(x, dtype, m, packed, thread, threads);    packed: activation_bytes(m), shared and aligned to 64 bytes
//     #pragma omp barrier
//     linear.rows(packed, m, begin, end, y, scratch);       [begin, end) = share(rows, linear.granule(m), thread, threads);
//                                                           scratch: scratch_bytes(m) of this thread's own, aligned to 64
//
// For one activation row it is as good to let every thread pack into memory of its own and save the barrier.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels.h"
#include "sparse_engine.h"

namespace sparse_engine {

constexpr int64_t kAlignment = 64;

// Bytes of an element as it is stored: of int4, whose elements are bytes of two values, one.
constexpr int64_t element_bytes(int32_t dtype) {
  return dtype == SPARSE_ENGINE_FP32 ? 4 : dtype == SPARSE_ENGINE_INT8 || dtype == SPARSE_ENGINE_INT4 ? 1 : 2;
}

// A (rows, columns) weight in the neutral form of sparse_engine.h, or dense and row-major.
struct Weight {
  int32_t type; // sparse_engine_dtype of the values
  int64_t rows;
  int64_t columns;
  const uint8_t* values;
  int64_t values_count;       // elements as they are stored: of int4 bytes
  const uint8_t* scales;      // of int8 and int4
  const uint8_t* bitmask;     // NULL: dense
  const int64_t* row_offsets; // NULL: every row has row_values
  int64_t row_values;
  int64_t group; // M of N:M, or 0

  static Weight dense(int32_t type, int64_t rows, int64_t columns, const void* values, const void* scales = nullptr) {
    return {type,    rows,    columns, static_cast<const uint8_t*>(values), rows * columns, static_cast<const uint8_t*>(scales), nullptr,
            nullptr, columns, 0};
  }

  bool quantised() const { return type == SPARSE_ENGINE_INT8 || type == SPARSE_ENGINE_INT4; }
  // First element of a row, in elements as they are stored.
  int64_t start(int64_t row) const {
    int two = type == SPARSE_ENGINE_INT4; // shifts, as this is done for every row and divisions take long
    return row_offsets ? row_offsets[row] >> two : row * ((row_values + two) >> two);
  }
  int64_t row_scales() const { return type == SPARSE_ENGINE_INT4 ? (columns + kScaleColumns - 1) / kScaleColumns * 2 : 4; } // bytes
  int64_t bytes() const {
    return values_count * element_bytes(type) + (bitmask ? rows * ((columns + 7) / 8) : 0) + (quantised() ? rows * row_scales() : 0);
  }
};

struct Range {
  int64_t begin, end;
};

// The part-th of `parts` nearly equal runs of 0 .. count - 1, each but the last a multiple of `granule` long.
inline Range share(int64_t count, int64_t granule, int64_t part, int64_t parts) {
  int64_t granules = (count + granule - 1) / granule;
  int64_t begin = granules * part / parts * granule, end = granules * (part + 1) / parts * granule;
  return {begin < count ? begin : count, end < count ? end : count};
}

// y = x Wᵀ + bias. Immutable once its tail is placed, and then used by any number of threads at once.
class Linear {
public:
  Linear(const KernelSet& set, const Weight& weight);

  const Weight& weight() const { return w_; }

  // The last rows, behind which a kernel must not read, are copied to memory that is padded.
  size_t tail_bytes() const;
  void place_tail(void* memory);

  // Bytes of m packed activation rows, and of one thread's scratch for rows() with m of them (may be 0).
  size_t activation_bytes(int64_t m) const;
  size_t scratch_bytes(int64_t m) const;

  // Rows per step; ranges that are multiples of it keep every step full.
  int64_t granule(int64_t m) const;

  // Ranges should not be shorter than this.
  int64_t chunk_rows(int64_t m) const;

  // x (m, columns) of type x_dtype, contiguous, into the kernels' layout: the part-th of `parts` shares of that work.
  void pack(const void* x, int32_t x_dtype, int64_t m, void* packed, int64_t part = 0, int64_t parts = 1) const;

  // Whether m activation rows packed for `other`, a product of as many columns, are what this one reads.
  bool packs_like(const Linear& other, int64_t m) const;

  // Weight rows [begin, end) by all m activation rows.
  void rows(const void* packed, int64_t m, int64_t begin, int64_t end, const Output& y, void* scratch) const;

  // Row `row` as dense elements of out_dtype: the values' type or fp32; any for int8 and int4.
  void expand(int64_t row, int32_t out_dtype, void* out) const;

private:
  struct Groups;

  Rows at(const int64_t* rows, int64_t n) const;
  int64_t packed_row_bytes() const; // of one activation row that is packed in a group

  const PanelKernels* panel_for(int64_t m) const; // NULL: products of m activation rows go in groups

  const ValueKernels& kernels_;
  Weight w_;
  bool half_;  // every mask byte keeps 4 values
  bool pairs_; // every run of 4 columns keeps 2
  int64_t padded_columns_;
  int64_t tail_row_; // first row of the copy
  const uint8_t* tail_ = nullptr;
};

// The same with threads started for the call; at most `threads` of them.
int32_t linear(const KernelSet& set, const Weight& weight, int32_t x_dtype, const void* x, int64_t m, const Output& y, int32_t threads);
int32_t expand_tile(const KernelSet& set, const Weight& weight, int32_t out_dtype, int64_t row_begin, int64_t row_end, void* out,
                    int32_t threads);
void touch_bytes(const void* data, int64_t bytes, int32_t threads);
uint64_t read_bytes(const void* data, int64_t bytes, int32_t threads);

} // namespace sparse_engine
