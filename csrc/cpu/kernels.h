// What one instruction-set level offers to the driver: plain functions on a few rows of a weight, by pointer.
//
// Files of different levels are compiled with different flags, so nothing with external linkage may be inline here: the
// linker could keep the copy with the newer instructions and run it on an older processor.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace sparse_engine {

constexpr int kMaxRows = 4;        // weight rows that one kernel call takes
constexpr int kMaxActivations = 8; // activation rows that one kernel call takes
constexpr int kDtypes = 3;         // types of activations and outputs: bf16, fp16, fp32, in the order of sparse_engine_dtype
constexpr int kValueTypes = 5;     // types of weights: the same, int8, int4

// Columns of one int4 scale.
constexpr int kScaleColumns = 128;

// A kernel may read this many bytes behind the last value of each packed row that it is given.
constexpr int kOverread = 64;

// Columns of packed activations are padded with zeros to a multiple of this.
constexpr int kColumnPad = 64;

// Packed activations begin with this many bytes for a number per row: the fp32 scale of a row of int8 ones.
constexpr int kActivationHeader = 64;

// Where up to kMaxRows rows of a weight lie.
struct Rows {
  const uint8_t* values[kMaxRows];  // first value; of a dense weight all `columns` of them, and nothing behind is read
  const uint8_t* bitmask[kMaxRows]; // first mask byte of ceil(columns / 8); nothing behind is read; unused for a dense weight
  const uint8_t* scales[kMaxRows];  // int8: the row's fp32; int4: ceil(columns / kScaleColumns) fp16; else unused
};

// Products of the kernel's R rows with M activations, summed in fp32, or in int32 for int8 activations, and scaled.
//   x        activations as the level's pack wrote them
//   out      (R, M) fp32
using RowsByActivations = void (*)(const Rows& rows, const void* x, int64_t columns, float* out);

// The first packed row of `rows`, scaled, to `columns` dense elements.
using ExpandRow = void (*)(const Rows& rows, int64_t columns, void* out);

// Activations (m, columns) of row stride `columns` to the level's own layout of kActivationHeader bytes and for each row
// padded_columns * x_bytes, and 64 for every start_columns columns. For int8 and int4 weights they are quantised row by row: scale = max
// |x| / 127, rounded to nearest.
using PackActivations = void (*)(const void* x, int m, int64_t columns, int64_t padded_columns, void* packed);

// Where a product's results go: y[j * stride + row] for activation row j and weight row `row`.
struct Output {
  int32_t dtype; // of data
  void* data;
  int64_t stride;
  const void* bias; // (rows,), or NULL
  int32_t bias_dtype;
};

constexpr int kMostPanelRows = 512; // weight rows that one call for a panel takes at most

struct PanelRow {
  const uint8_t* values;
  const uint8_t* bitmask;
  const uint8_t* scales;
};

// Activation rows that meet a panel's weights while these are in cache; more come in several passes.
constexpr int64_t kPassActivations = 128;

// A panel also gets the places of up to so many rows behind its own, to fetch them ahead.
constexpr int kRowsBehind = 24;

// `n` packed weight rows (of the `known` in `rows`), the first of them row `first_row` of y, by m (<= kPassActivations) of the `all`
// activation rows that pack wrote, from row `first` (a multiple of kPassActivations) on.
using PanelProducts = void (*)(const PanelRow* rows, int64_t n, int64_t known, const void* packed, int64_t all, int64_t first, int64_t m,
                               int64_t columns, const Output& y, int64_t first_row, void* scratch);

// Products of many activation rows, which are bound by multiply-adds: a level without a kernel for them has no `products`.
struct PanelKernels {
  int64_t least_m; // activation rows from which this is the faster way
  int64_t rows;    // weight rows of one call, at most kMostPanelRows
  size_t (*activation_bytes)(int64_t m, int64_t columns);
  size_t (*scratch_bytes)(int64_t m); // of m <= kPassActivations
  // The part-th of `parts` shares of packing (m, columns) activations.
  void (*pack[kDtypes])(const void* x, int64_t m, int64_t columns, void* packed, int64_t part, int64_t parts);
  PanelProducts products;
};

// The kernels for weights of one type.
struct ValueKernels {
  int x_bytes;                                       // bytes of one packed activation
  int64_t start_columns;                             // packed activations also have 64 bytes a row for so many columns; 0: none
  int max_m;                                         // activations per call, >= 3; more are done in several calls over the same rows
  int rows_one;                                      // R of packed[.][1] and dense[1]
  int rows_many;                                     // R of packed[.][M] and dense[M] for M > 1
  PackActivations pack[kDtypes];                     // [type of x]
  RowsByActivations packed[2][kMaxActivations + 1];  // [every mask byte keeps 4 values][M], for R rows
  RowsByActivations packed_one[kMaxActivations + 1]; // [M], for one row
  RowsByActivations dense[kMaxActivations + 1];      // int4: none
  RowsByActivations dense_one[kMaxActivations + 1];
  ExpandRow expand[kDtypes]; // [type of out]; NULL where a type of weight cannot be expanded to it
  PanelKernels panel;
  PanelKernels pairs; // of weights that keep 2 of every 4; without it, panel serves
};

struct KernelSet {
  const char* name;
  ValueKernels values[kValueTypes]; // [type of the weight]
};

const KernelSet& scalar_kernels();
const KernelSet& neon_kernels();
const KernelSet& avx2_kernels();
const KernelSet& avx512_kernels();

// Parts of those sets that have files of their own.
ValueKernels scalar_int8(), scalar_int4();
ValueKernels avx2_int8(), avx2_int4();
ValueKernels avx512_int8(), avx512_int4();
void add_avx512_panels(ValueKernels (&values)[kValueTypes]);
PanelKernels avx512_pairs();

} // namespace sparse_engine
