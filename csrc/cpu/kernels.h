// What one instruction-set level offers to the driver: plain functions on a few rows of a weight, by pointer.
//
// Files of different levels are compiled with different flags, so nothing with external linkage may be inline here: the
// linker could keep the copy with the newer instructions and run it on an older processor.
#pragma once

#include <stdint.h>

namespace sparse_engine {

constexpr int kMaxRows = 4;        // weight rows that one kernel call takes
constexpr int kMaxActivations = 8; // activation rows that one kernel call takes
constexpr int kDtypes = 3;         // bf16, fp16, fp32, in the order of sparse_engine_dtype: types of activations and outputs
constexpr int kValueTypes = 3;     // the same: types of weights

// A kernel may read this many bytes behind the last value of each packed row that it is given.
constexpr int kOverread = 64;

// Columns of packed activations are padded with zeros to a multiple of this.
constexpr int kColumnPad = 64;

// Where up to kMaxRows rows of a weight lie.
struct Rows {
  const uint8_t* values[kMaxRows];  // first value; of a dense weight all `columns` of them, and nothing behind is read
  const uint8_t* bitmask[kMaxRows]; // first mask byte of ceil(columns / 8); nothing behind is read; unused for a dense weight
};

// Products of the kernel's R rows with M activations, summed in fp32.
//   x        activations as the level's pack wrote them
//   out      (R, M) fp32
using RowsByActivations = void (*)(const Rows& rows, const void* x, int64_t columns, float* out);

// One packed row to `columns` dense elements, in the values' type or as fp32.
using ExpandRow = void (*)(const uint8_t* values, const uint8_t* bitmask, int64_t columns, void* out);

// Activations (m, columns) of row stride `columns` to the level's own layout of m * padded_columns * x_bytes bytes.
using PackActivations = void (*)(const void* x, int m, int64_t columns, int64_t padded_columns, void* packed);

// The kernels for weights of one type.
struct ValueKernels {
  int x_bytes;                                       // bytes of one packed activation
  int max_m;                                         // activations per call, >= 3; more are done in several calls over the same rows
  int rows_one;                                      // R of packed[.][1] and dense[1]
  int rows_many;                                     // R of packed[.][M] and dense[M] for M > 1
  PackActivations pack[kDtypes];                     // [type of x]
  RowsByActivations packed[2][kMaxActivations + 1];  // [every mask byte keeps 4 values][M], for R rows
  RowsByActivations packed_one[kMaxActivations + 1]; // [M], for one row
  RowsByActivations dense[kMaxActivations + 1];
  RowsByActivations dense_one[kMaxActivations + 1];
  ExpandRow expand;
  ExpandRow expand_fp32;
};

struct KernelSet {
  const char* name;
  ValueKernels values[kValueTypes]; // [type of the weight]
};

const KernelSet& scalar_kernels();
const KernelSet& avx2_kernels();
const KernelSet& avx512_kernels();

} // namespace sparse_engine
