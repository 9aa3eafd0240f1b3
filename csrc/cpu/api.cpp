// The C ABI: checks arguments, then calls the driver.

#include "sparse_engine.h"

#include "driver.h"
#include "isa.h"

using namespace sparse_engine;

namespace {

bool known(int32_t dtype) { return dtype >= 0 && dtype < kDtypes; }

Weight packed_weight(int32_t type, int64_t rows, int64_t columns, const void* values, int64_t values_count, const void* scales,
                     const uint8_t* bitmask, const int64_t* row_offsets, int64_t row_values, int64_t group) {
  return {type,
          rows,
          columns,
          static_cast<const uint8_t*>(values),
          type == SPARSE_ENGINE_INT4 ? values_count / 2 : values_count,
          static_cast<const uint8_t*>(scales),
          bitmask,
          row_offsets,
          row_values,
          row_offsets ? 0 : group};
}

// Whether the arrays of a weight can be what the header says, without reading the bitmask.
bool valid(const Weight& w) {
  if (w.type < 0 || w.type >= kValueTypes || w.rows < 0 || w.columns < 0 || w.values_count < 0) return false;
  if (w.values_count > 0 && !w.values) return false;
  if (w.quantised() && w.rows > 0 && w.columns > 0 && !w.scales) return false;
  if (w.row_offsets) return w.row_offsets[0] == 0 && w.start(w.rows) <= w.values_count;
  return w.group >= 0 && w.row_values >= 0 && w.row_values <= w.columns && w.start(w.rows) <= w.values_count;
}

} // namespace

int32_t sparse_engine_abi_version(void) { return SPARSE_ENGINE_ABI_VERSION; }

const char* sparse_engine_status_message(int32_t status) {
  switch (status) {
  case SPARSE_ENGINE_OK: return "no error";
  case SPARSE_ENGINE_BAD_ARGUMENT: return "an argument is out of range or a pointer is missing";
  case SPARSE_ENGINE_OUT_OF_MEMORY: return "scratch memory could not be allocated";
  case SPARSE_ENGINE_UNKNOWN_ISA: return "no instruction-set level has that name";
  case SPARSE_ENGINE_UNSUPPORTED_ISA: return "this processor, operating system or build lacks that instruction-set level";
  default: return "unknown status";
  }
}

const char* sparse_engine_supported_isas(void) { return supported_levels(); }

int32_t sparse_engine_isa(const char** name) {
  const KernelSet* set;
  int32_t status = current_kernels(&set);
  if (name) *name = set ? set->name : "";
  return status;
}

int32_t sparse_engine_set_isa(const char* name) { return choose_kernels(name); }

int32_t sparse_engine_has_amx_bf16(void) { return has_amx_bf16(); }

int32_t sparse_engine_linear(int32_t dtype, const void* x, int32_t values_dtype, const void* values, int64_t values_count,
                             const void* scales, const uint8_t* bitmask, const int64_t* row_offsets, int64_t row_values, int64_t group,
                             const void* bias, void* y, int64_t m, int64_t rows, int64_t columns, int32_t threads) {
  const KernelSet* set;
  if (int32_t status = current_kernels(&set)) return status;
  Weight w = packed_weight(values_dtype, rows, columns, values, values_count, scales, bitmask, row_offsets, row_values, group);
  if (!known(dtype) || m < 0 || threads < 1 || !valid(w) || (!bitmask && rows > 0 && columns > 0)) return SPARSE_ENGINE_BAD_ARGUMENT;
  if (m == 0 || rows == 0) return SPARSE_ENGINE_OK;
  if (!y || (!x && columns > 0)) return SPARSE_ENGINE_BAD_ARGUMENT;
  return linear(*set, w, dtype, x, m, {dtype, y, rows, bias, dtype}, threads);
}

int32_t sparse_engine_dense_linear(int32_t dtype, const void* x, int32_t weight_dtype, const void* weight, const void* scales,
                                   const void* bias, void* y, int64_t m, int64_t rows, int64_t columns, int32_t threads) {
  const KernelSet* set;
  if (int32_t status = current_kernels(&set)) return status;
  if (!known(dtype) || weight_dtype == SPARSE_ENGINE_INT4 || m < 0 || rows < 0 || columns < 0 || threads < 1)
    return SPARSE_ENGINE_BAD_ARGUMENT;
  Weight w = Weight::dense(weight_dtype, rows, columns, weight, scales);
  if (!valid(w)) return SPARSE_ENGINE_BAD_ARGUMENT;
  if (m == 0 || rows == 0) return SPARSE_ENGINE_OK;
  if (!y || (!x && columns > 0)) return SPARSE_ENGINE_BAD_ARGUMENT;
  return linear(*set, w, dtype, x, m, {dtype, y, rows, bias, dtype}, threads);
}

int32_t sparse_engine_expand_tile(int32_t values_dtype, int32_t out_dtype, const void* values, int64_t values_count, const void* scales,
                                  const uint8_t* bitmask, const int64_t* row_offsets, int64_t row_values, int64_t group, int64_t row_begin,
                                  int64_t row_end, int64_t columns, void* out, int32_t threads) {
  const KernelSet* set;
  if (int32_t status = current_kernels(&set)) return status;
  Weight w = packed_weight(values_dtype, row_end, columns, values, values_count, scales, bitmask, row_offsets, row_values, group);
  if (row_begin < 0 || row_end < row_begin || threads < 1 || !valid(w)) return SPARSE_ENGINE_BAD_ARGUMENT;
  if (!known(out_dtype) || !set->values[values_dtype].expand[out_dtype]) return SPARSE_ENGINE_BAD_ARGUMENT;
  if (row_begin == row_end || columns == 0) return SPARSE_ENGINE_OK;
  if (!out || !bitmask) return SPARSE_ENGINE_BAD_ARGUMENT;
  return expand_tile(*set, w, out_dtype, row_begin, row_end, out, threads);
}

int32_t sparse_engine_read(const void* data, int64_t bytes, int32_t threads, uint64_t* sum) {
  if (bytes < 0 || (bytes > 0 && !data) || !sum || threads < 1) return SPARSE_ENGINE_BAD_ARGUMENT;
  *sum = read_bytes(data, bytes, threads);
  return SPARSE_ENGINE_OK;
}

int32_t sparse_engine_touch(const void* data, int64_t bytes, int32_t threads) {
  if (bytes < 0 || (bytes > 0 && !data) || threads < 1) return SPARSE_ENGINE_BAD_ARGUMENT;
  touch_bytes(data, bytes, threads);
  return SPARSE_ENGINE_OK;
}
