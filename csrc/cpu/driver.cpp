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
constexpr int kMostThreads = 1024;
// Rows of a panel come in multiples of this, the steps of its kernels.
constexpr int64_t kPanelGranule = 24;
// Rows that a panel has at least in a chunk: what it does once for all of them should not be felt.
constexpr int64_t kPanelChunk = 192;
// A panel sums int8 products of whole rows in int32: 127 · 127 times this stays below 2^31.
constexpr int64_t kMostPanelColumns = 1 << 17;
// Fewer activation rows than this are packed by the calling thread: a parallel region costs more.
constexpr int64_t kPackedByOne = 16;

// Memory that grows to the largest product seen by the calling thread and is kept for its next one.
struct Scratch {
  uint8_t* data = nullptr;
  size_t size = 0;
  ~Scratch() { free(data); }
  uint8_t* get(size_t bytes) {
    if (bytes > size) {
      free(data);
      size_t rounded = (bytes + size_t(kAlignment) - 1) / size_t(kAlignment) * size_t(kAlignment);
      data = static_cast<uint8_t*>(aligned_alloc(kAlignment, rounded));
      size = data ? rounded : 0;
    }
    return data;
  }
};

thread_local Scratch scratch;

int threads_for(int64_t bytes, int32_t threads) {
#if defined(_OPENMP)
  return int(std::clamp<int64_t>(bytes / kBytesPerThread, 1, std::min(threads, kMostThreads)));
#else
  (void)bytes;
  (void)threads;
  return 1;
#endif
}

int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

constexpr size_t aligned(size_t bytes) { return (bytes + size_t(kAlignment) - 1) / size_t(kAlignment) * size_t(kAlignment); }

// Calls work(begin, end) for chunks that cover 0 .. rows - 1, of at least `least` rows each where there is as much for every thread.
// A thread takes the chunks of its own share first, whose memory is near it where the shares were touched first by their threads
// (touch_bytes), and then what is left of the others'.
template <class Work>
void for_chunks(int64_t rows, int64_t granule, int threads, Work work, int64_t least = 1) {
  if (threads <= 1) {
    if (rows > 0) work(int64_t(0), rows);
    return;
  }
  int64_t chunks = std::clamp<int64_t>(rows / threads / least, 1, kChunksPerThread); // of a share
  std::atomic<int32_t> taken[kMostThreads] = {};
#pragma omp parallel num_threads(threads)
  for (int i = 0, thread = thread_number(); i < threads; ++i) {
    int owner = (thread + i) % threads;
    Range run = share(rows, granule, owner, threads);
    for (int64_t chunk; (chunk = taken[owner].fetch_add(1, std::memory_order_relaxed)) < chunks;) {
      Range part = share(run.end - run.begin, granule, chunk, chunks);
      if (part.begin < part.end) work(run.begin + part.begin, run.begin + part.end);
    }
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

// Sums (n weight rows, m activation rows) to y, of activation rows from `first` on.
template <class T>
void store_as(const float* sums, const int64_t* rows, int64_t n, int64_t first, int64_t m, const Output& y) {
  auto target = static_cast<typename T::Storage*>(y.data) + first * y.stride;
  for (int64_t i = 0; i < n; ++i) {
    float bias = y.bias ? load(y.bias_dtype, y.bias, rows[i]) : 0.0f;
    for (int64_t j = 0; j < m; ++j)
      target[j * y.stride + rows[i]] = T::round(*sums++ + bias);
  }
}

void store(const float* sums, const int64_t* rows, int64_t n, int64_t first, int64_t m, const Output& y) {
  switch (y.dtype) {
  case SPARSE_ENGINE_BF16: return store_as<Bf16>(sums, rows, n, first, m, y);
  case SPARSE_ENGINE_FP16: return store_as<Fp16>(sums, rows, n, first, m, y);
  default: return store_as<Fp32>(sums, rows, n, first, m, y);
  }
}

} // namespace

// Activation rows in groups of at most max_m, of as equal size as possible.
struct Linear::Groups {
  int64_t m, row_bytes, count;

  Groups(const Linear& linear, int64_t m)
      : m(m), row_bytes(linear.packed_row_bytes()), count((m + linear.kernels_.max_m - 1) / linear.kernels_.max_m) {}

  int64_t first(int64_t group) const { return m * group / count; }
  int64_t size(int64_t group) const { return first(group + 1) - first(group); }
  int64_t offset(int64_t group) const { return first(group) * row_bytes + group * kActivationHeader; }
};

Linear::Linear(const KernelSet& set, const Weight& weight)
    : kernels_(set.values[weight.type]), w_(weight),
      half_(weight.bitmask && !weight.row_offsets && weight.group > 0 && 8 % weight.group == 0 && 2 * weight.row_values == weight.columns),
      pairs_(half_ && weight.group <= 4 && weight.columns % 4 == 0),
      padded_columns_((weight.columns + kColumnPad - 1) / kColumnPad * kColumnPad), tail_row_(weight.rows) {
  if (!w_.bitmask) return;
  while (tail_row_ > 0 && (w_.values_count - w_.start(tail_row_)) * element_bytes(w_.type) < kOverread)
    --tail_row_;
}

size_t Linear::tail_bytes() const {
  if (!w_.bitmask || w_.rows == 0) return 0;
  return size_t((w_.values_count - w_.start(tail_row_)) * element_bytes(w_.type)) + kOverread;
}

void Linear::place_tail(void* memory) {
  if (tail_bytes() == 0) return;
  size_t bytes = tail_bytes() - kOverread;
  auto target = static_cast<uint8_t*>(memory);
  if (bytes) memcpy(target, w_.values + w_.start(tail_row_) * element_bytes(w_.type), bytes);
  memset(target + bytes, 0, kOverread);
  tail_ = target;
}

int64_t Linear::packed_row_bytes() const {
  int64_t span = kernels_.start_columns, starts = span ? (padded_columns_ + span - 1) / span : 0;
  return padded_columns_ * kernels_.x_bytes + starts * 64;
}

const PanelKernels* Linear::panel_for(int64_t m) const {
  if (!w_.bitmask || (w_.type == SPARSE_ENGINE_INT8 && w_.columns > kMostPanelColumns)) return nullptr;
  const PanelKernels& panel = pairs_ && kernels_.pairs.products ? kernels_.pairs : kernels_.panel;
  return panel.products && m >= panel.least_m ? &panel : nullptr;
}

size_t Linear::activation_bytes(int64_t m) const {
  if (const PanelKernels* panel = panel_for(m)) return panel->activation_bytes(m, w_.columns);
  return size_t(Groups(*this, m).offset(Groups(*this, m).count));
}

size_t Linear::scratch_bytes(int64_t m) const {
  const PanelKernels* panel = panel_for(m);
  return panel ? panel->scratch_bytes(std::min(m, kPassActivations)) : 0;
}

int64_t Linear::granule(int64_t m) const { return panel_for(m) ? kPanelGranule : m == 1 ? kernels_.rows_one : kernels_.rows_many; }

int64_t Linear::chunk_rows(int64_t m) const { return panel_for(m) ? kPanelChunk : 1; }

void Linear::pack(const void* x, int32_t x_dtype, int64_t m, void* packed, int64_t part, int64_t parts) const {
  if (const PanelKernels* panel = panel_for(m)) return panel->pack[x_dtype](x, m, w_.columns, packed, part, parts);
  Groups groups(*this, m);
  Range range = share(groups.count, 1, part, parts);
  for (int64_t g = range.begin; g < range.end; ++g)
    kernels_.pack[x_dtype](static_cast<const uint8_t*>(x) + groups.first(g) * w_.columns * element_bytes(x_dtype), int(groups.size(g)),
                           w_.columns, padded_columns_, static_cast<uint8_t*>(packed) + groups.offset(g));
}

bool Linear::packs_like(const Linear& other, int64_t m) const { return w_.type == other.w_.type && panel_for(m) == other.panel_for(m); }

Rows Linear::at(const int64_t* rows, int64_t n) const {
  Rows r{};
  int64_t element = element_bytes(w_.type), tail = w_.bitmask ? w_.start(tail_row_) * element : 0;
  for (int64_t i = 0; i < n; ++i) {
    int64_t row = rows[i];
    if (w_.bitmask) {
      int64_t start = w_.start(row) * element;
      r.values[i] = row >= tail_row_ ? tail_ + (start - tail) : w_.values + start;
      r.bitmask[i] = w_.bitmask + row * ((w_.columns + 7) / 8);
    } else {
      r.values[i] = w_.values + row * w_.columns * element;
    }
    if (w_.quantised()) r.scales[i] = w_.scales + row * w_.row_scales();
  }
  return r;
}

// The range is cut into R runs of consecutive rows; step t takes row t of each, so that every run is one long sequential
// stream, across row ends.
void Linear::rows(const void* packed, int64_t m, int64_t begin, int64_t end, const Output& y, void* scratch) const {
  if (const PanelKernels* panel = panel_for(m)) {
    for (int64_t first = begin; first < end; first += panel->rows) {
      PanelRow rows[kMostPanelRows + kRowsBehind];
      int64_t n = std::min<int64_t>(panel->rows, end - first);
      int64_t known = std::min<int64_t>(n + kRowsBehind, w_.rows - first);
      for (int64_t i = 0; i < known; ++i) {
        int64_t row = first + i;
        Rows where = at(&row, 1);
        rows[i] = {where.values[0], where.bitmask[0], where.scales[0]};
      }
      for (int64_t x = 0; x < m; x += kPassActivations)
        panel->products(rows, n, known, packed, m, x, std::min(kPassActivations, m - x), w_.columns, y, first, scratch);
    }
    return;
  }
  Groups groups(*this, m);
  const RowsByActivations* many = w_.bitmask ? kernels_.packed[half_] : kernels_.dense;
  const RowsByActivations* one = w_.bitmask ? kernels_.packed_one : kernels_.dense_one;
  auto step = [&](const int64_t* rows, int64_t n, const RowsByActivations* kernels) {
    Rows where = at(rows, n);
    for (int64_t g = 0; g < groups.count; ++g) {
      float out[kMaxRows * kMaxActivations];
      int64_t size = groups.size(g);
      kernels[size](where, static_cast<const uint8_t*>(packed) + groups.offset(g), w_.columns, out);
      store(out, rows, n, groups.first(g), size, y);
    }
  };
  int64_t width = granule(m), steps = (end - begin) / width;
  for (int64_t t = 0; t < steps; ++t) {
    int64_t rows[kMaxRows];
    for (int64_t i = 0; i < width; ++i)
      rows[i] = begin + i * steps + t;
    step(rows, width, many);
  }
  for (int64_t row = begin + steps * width; row < end; ++row)
    step(&row, 1, one);
}

void Linear::expand(int64_t row, int32_t out_dtype, void* out) const { kernels_.expand[out_dtype](at(&row, 1), w_.columns, out); }

int32_t linear(const KernelSet& set, const Weight& weight, int32_t x_dtype, const void* x, int64_t m, const Output& y, int32_t threads) {
  Linear product(set, weight);
  int used = threads_for(weight.bytes() * std::max<int64_t>(1, m / 8), threads);
  size_t x_bytes = aligned(product.activation_bytes(m)), tail_bytes = aligned(product.tail_bytes());
  size_t scratch_bytes = aligned(product.scratch_bytes(m));
  uint8_t* memory = scratch.get(x_bytes + tail_bytes + size_t(used) * scratch_bytes + kAlignment);
  if (!memory) return SPARSE_ENGINE_OUT_OF_MEMORY;
  product.place_tail(memory + x_bytes);
  if (m < kPackedByOne) {
    product.pack(x, x_dtype, m, memory);
  } else {
    for_chunks(used, 1, used, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part)
        product.pack(x, x_dtype, m, memory, part, used);
    });
  }
  for_chunks(
      weight.rows, product.granule(m), used,
      [&](int64_t begin, int64_t end) {
        product.rows(memory, m, begin, end, y, memory + x_bytes + tail_bytes + size_t(thread_number()) * scratch_bytes);
      },
      product.chunk_rows(m));
  return SPARSE_ENGINE_OK;
}

int32_t expand_tile(const KernelSet& set, const Weight& weight, int32_t out_dtype, int64_t row_begin, int64_t row_end, void* out,
                    int32_t threads) {
  Linear product(set, weight);
  uint8_t* memory = scratch.get(product.tail_bytes() + kAlignment);
  if (!memory) return SPARSE_ENGINE_OUT_OF_MEMORY;
  product.place_tail(memory);
  int64_t rows = row_end - row_begin, row_bytes = weight.columns * element_bytes(out_dtype);
  for_chunks(rows, 1, threads_for(rows * row_bytes, threads), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      product.expand(row_begin + i, out_dtype, static_cast<uint8_t*>(out) + i * row_bytes);
  });
  return SPARSE_ENGINE_OK;
}

void touch_bytes(const void* data, int64_t bytes, int32_t threads) {
  constexpr int64_t kPage = 4096;
  threads = std::min(threads, kMostThreads);
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int32_t part = 0; part < threads; ++part) {
    Range range = share(bytes, kPage, part, threads);
    for (int64_t at = range.begin; at < range.end; at += kPage)
      static_cast<void>(*(static_cast<const volatile uint8_t*>(data) + at));
  }
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
