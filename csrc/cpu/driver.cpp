// Splits a product over threads and rows, and hands a few rows at a time to the kernels of the level in use.
//
//        W          thread 0                 thread 1
//      rows   [ stream 0 | stream 1 | .. ][ stream 0 | .. ]      a chunk of rows is cut into R runs of consecutive rows;
//               row t      row t            step t takes row t   each step takes one row of each, so that every run is
//                                           of every stream      read as one long sequential stream, across row ends

#include "driver.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>

#include "numeric.h"
#include "sparse_engine.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace sparse_engine {
namespace {

// Below this many bytes of weight per thread, starting another thread costs more than it saves.
constexpr int64_t kBytesPerThread = 32 << 10;
// Chunks per thread, so that a thread that loses its core for a while holds the others up by one chunk only.
constexpr int64_t kChunksPerThread = 4;
constexpr size_t kAlignment = 64;

// Memory that grows to the largest product seen by the calling thread and is kept for its next one.
struct Scratch {
  uint8_t* data = nullptr;
  size_t size = 0;
  ~Scratch() { free(data); }
  uint8_t* get(size_t bytes) {
    if (bytes > size) {
      free(data);
      size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
      data = static_cast<uint8_t*>(aligned_alloc(kAlignment, rounded));
      size = data ? rounded : 0;
    }
    return data;
  }
};

thread_local Scratch scratch;

int threads_for(int64_t bytes, int32_t threads) {
#if defined(_OPENMP)
  return int(std::clamp<int64_t>(bytes / kBytesPerThread, 1, threads));
#else
  (void)bytes;
  (void)threads;
  return 1;
#endif
}

// Calls work(begin, end) for chunks that cover 0 .. rows - 1.
template <class Work>
void for_chunks(int64_t rows, int64_t granule, int threads, Work work) {
  if (threads <= 1) {
    if (rows > 0) work(int64_t(0), rows);
    return;
  }
  int64_t granules = (rows + granule - 1) / granule;
  int64_t chunks = std::min<int64_t>(granules, threads * kChunksPerThread);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < chunks; ++i)
    work(std::min(rows, granules * i / chunks * granule), std::min(rows, granules * (i + 1) / chunks * granule));
}

void store(float value, int32_t dtype, void* y, int64_t index) {
  switch (dtype) {
  case SPARSE_ENGINE_BF16: static_cast<uint16_t*>(y)[index] = Bf16::round(value); break;
  case SPARSE_ENGINE_FP16: static_cast<uint16_t*>(y)[index] = Fp16::round(value); break;
  default: static_cast<float*>(y)[index] = value;
  }
}

float load(int32_t dtype, const void* p, int64_t index) {
  auto bytes = static_cast<const uint8_t*>(p);
  switch (dtype) {
  case SPARSE_ENGINE_BF16: return Bf16::load(bytes + 2 * index);
  case SPARSE_ENGINE_FP16: return Fp16::load(bytes + 2 * index);
  default: return Fp32::load(bytes + 4 * index);
  }
}

// Activations in the level's layout, in groups of at most max_m rows of as equal size as possible.
struct Activations {
  const DtypeKernels& kernels;
  int64_t m, columns, padded_columns, groups;

  Activations(const DtypeKernels& kernels, int64_t m, int64_t columns)
      : kernels(kernels), m(m), columns(columns), padded_columns((columns + kColumnPad - 1) / kColumnPad * kColumnPad),
        groups((m + kernels.max_m - 1) / kernels.max_m) {}

  int64_t width() const { return m == 1 ? kernels.rows_one : kernels.rows_many; }
  int64_t row_bytes() const { return padded_columns * kernels.x_bytes; }
  size_t bytes() const { return size_t(m * row_bytes()); }
  int64_t first(int64_t group) const { return m * group / groups; }
  int64_t count(int64_t group) const { return first(group + 1) - first(group); }

  void pack(const void* x, int64_t element_bytes, uint8_t* target) const {
    for (int64_t g = 0; g < groups; ++g)
      kernels.pack_x(static_cast<const uint8_t*>(x) + first(g) * columns * element_bytes, int(count(g)), columns, padded_columns,
                     target + first(g) * row_bytes());
  }
};

// Where the rows of a packed weight lie. The last rows, behind which a kernel must not read, are copied to padded memory.
struct PackedSource {
  const PackedWeight& w;
  int64_t guarded_row; // first row of the copy
  int64_t guarded_start;
  const uint8_t* guard = nullptr;

  explicit PackedSource(const PackedWeight& w, int64_t row_end) : w(w), guarded_row(row_end) {
    while (guarded_row > 0 && (w.values_count - w.start(guarded_row)) * w.element_bytes < kOverread)
      --guarded_row;
    guarded_start = guarded_row < row_end ? w.start(guarded_row) : w.values_count;
  }

  size_t guard_bytes() const { return size_t((w.values_count - guarded_start) * w.element_bytes) + kOverread; }

  void copy_guard(uint8_t* target) {
    size_t bytes = guard_bytes() - kOverread;
    if (bytes) memcpy(target, w.values + guarded_start * w.element_bytes, bytes);
    memset(target + bytes, 0, kOverread);
    guard = target;
  }

  const uint8_t* values(int64_t row) const {
    int64_t start = w.start(row);
    return row >= guarded_row ? guard + (start - guarded_start) * w.element_bytes : w.values + start * w.element_bytes;
  }

  const uint8_t* bitmask(int64_t row) const { return w.bitmask + row * ((w.columns + 7) / 8); }
};

// Rows [begin, end) by all activations; compute(rows, n, m, x, out) gives the (n, m) sums of n rows by m activations.
template <class Compute>
void run_rows(const Activations& a, const uint8_t* packed_x, int64_t begin, int64_t end, const Output& y, const Compute& compute) {
  int64_t width = a.width();
  auto block = [&](const int64_t* rows, int64_t n) {
    for (int64_t g = 0; g < a.groups; ++g) {
      float out[kMaxRows * kMaxActivations];
      int64_t m = a.count(g);
      compute(rows, n, m, packed_x + a.first(g) * a.row_bytes(), out);
      for (int64_t i = 0; i < n; ++i) {
        float bias = y.bias ? load(y.dtype, y.bias, rows[i]) : 0.0f;
        for (int64_t j = 0; j < m; ++j)
          store(out[i * m + j] + bias, y.dtype, y.data, (a.first(g) + j) * y.rows + rows[i]);
      }
    }
  };
  int64_t steps = (end - begin) / width;
  for (int64_t t = 0; t < steps; ++t) {
    int64_t rows[kMaxRows];
    for (int64_t i = 0; i < width; ++i)
      rows[i] = begin + i * steps + t;
    block(rows, width);
  }
  for (int64_t row = begin + steps * width; row < end; ++row)
    block(&row, 1);
}

} // namespace

int32_t packed_linear(const KernelSet& set, const PackedWeight& w, const void* x, int64_t m, const Output& y, int32_t threads) {
  const DtypeKernels& kernels = set.dtype[y.dtype];
  Activations a(kernels, m, w.columns);
  PackedSource source(w, y.rows);
  bool half = w.group > 0 && 8 % w.group == 0 && 2 * w.row_values == w.columns;
  uint8_t* memory = scratch.get(a.bytes() + source.guard_bytes());
  if (!memory) return SPARSE_ENGINE_OUT_OF_MEMORY;
  a.pack(x, w.element_bytes, memory);
  source.copy_guard(memory + a.bytes());
  auto compute = [&](const int64_t* rows, int64_t n, int64_t m_here, const uint8_t* packed_x, float* out) {
    const uint8_t* values[kMaxRows];
    const uint8_t* bitmask[kMaxRows];
    for (int64_t i = 0; i < n; ++i) {
      values[i] = source.values(rows[i]);
      bitmask[i] = source.bitmask(rows[i]);
    }
    (n == 1 ? kernels.packed_one : kernels.packed[half])[m_here](values, bitmask, packed_x, w.columns, out);
  };
  int64_t bytes = w.values_count * w.element_bytes + y.rows * w.columns / 8;
  for_chunks(y.rows, a.width(), threads_for(bytes, threads),
             [&](int64_t begin, int64_t end) { run_rows(a, memory, begin, end, y, compute); });
  return SPARSE_ENGINE_OK;
}

int32_t dense_linear(const KernelSet& set, const void* weight, int64_t columns, const void* x, int64_t m, const Output& y,
                     int32_t threads) {
  const DtypeKernels& kernels = set.dtype[y.dtype];
  int64_t row_bytes = columns * element_bytes(y.dtype);
  Activations a(kernels, m, columns);
  uint8_t* memory = scratch.get(a.bytes());
  if (!memory && a.bytes()) return SPARSE_ENGINE_OUT_OF_MEMORY;
  a.pack(x, element_bytes(y.dtype), memory);
  auto compute = [&](const int64_t* rows, int64_t n, int64_t m_here, const uint8_t* packed_x, float* out) {
    const uint8_t* at[kMaxRows];
    for (int64_t i = 0; i < n; ++i)
      at[i] = static_cast<const uint8_t*>(weight) + rows[i] * row_bytes;
    (n == 1 ? kernels.dense_one : kernels.dense)[m_here](at, packed_x, columns, out);
  };
  for_chunks(y.rows, a.width(), threads_for(y.rows * row_bytes, threads),
             [&](int64_t begin, int64_t end) { run_rows(a, memory, begin, end, y, compute); });
  return SPARSE_ENGINE_OK;
}

int32_t expand_tile(const KernelSet& set, const PackedWeight& w, int32_t dtype, int32_t out_dtype, int64_t row_begin, int64_t row_end,
                    void* out, int32_t threads) {
  const DtypeKernels& kernels = set.dtype[dtype];
  ExpandRow expand = out_dtype == dtype ? kernels.expand : kernels.expand_fp32;
  int64_t row_bytes = w.columns * element_bytes(out_dtype);
  PackedSource source(w, row_end);
  uint8_t* memory = scratch.get(source.guard_bytes());
  if (!memory) return SPARSE_ENGINE_OUT_OF_MEMORY;
  source.copy_guard(memory);
  int64_t rows = row_end - row_begin;
  for_chunks(rows, 1, threads_for(rows * row_bytes, threads), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      expand(source.values(row_begin + i), source.bitmask(row_begin + i), w.columns, static_cast<uint8_t*>(out) + i * row_bytes);
  });
  return SPARSE_ENGINE_OK;
}

uint64_t read_bytes(const void* data, int64_t bytes, int32_t threads) {
  // Four streams per chunk with the products' prefetch distance: the access pattern of the kernels, without their arithmetic.
  typedef uint64_t Line __attribute__((vector_size(64), aligned(1)));
  constexpr int kStreams = 4, kPrefetch = 1024;
  int64_t lines = bytes / 64;
  std::atomic<uint64_t> sum{0};
  for_chunks(lines, kStreams, threads_for(bytes, threads), [&](int64_t begin, int64_t end) {
    auto first = static_cast<const Line*>(data) + begin;
    int64_t steps = (end - begin) / kStreams;
    Line part{};
    for (int64_t t = 0; t < steps; ++t)
      for (int i = 0; i < kStreams; ++i) {
        const Line* line = first + i * steps + t;
        __builtin_prefetch(reinterpret_cast<const uint8_t*>(line) + kPrefetch);
        part += *line;
      }
    for (const Line* line = first + kStreams * steps; line < first + (end - begin); ++line)
      part += *line;
    uint64_t total = 0;
    for (int i = 0; i < 8; ++i)
      total += part[i];
    sum += total;
  });
  uint64_t rest = sum;
  for (int64_t i = lines * 8; i < bytes / 8; ++i) {
    uint64_t word;
    memcpy(&word, static_cast<const uint8_t*>(data) + 8 * i, 8);
    rest += word;
  }
  return rest;
}

} // namespace sparse_engine
