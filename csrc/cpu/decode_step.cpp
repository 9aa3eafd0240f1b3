// The decode step: the products of driver.h and the kernels of decode_kernels.h in one parallel region. Layout and order are
// those of sparse_engine_decode.h.
//
// Each phase (a product's rows, the heads of attention, the sequences of a norm) is cut into a run of pieces per thread. A thread
// that is done with its own run takes pieces of the others', and a phase is over when its pieces are done, not when every thread has
// come to its end: one that loses its core holds the others up only while it has a piece in hand. It then runs through the phases
// that went by without it, and finds no piece left in them; what it reads there may be overwritten already and is used for nothing.
//
// With one sequence and norms before the products, every thread computes a norm and packs a product's input for itself, into memory
// of its own, which costs less than waiting for another thread to do it. A piece that it still gets shows that this input was whole:
// nobody writes what a phase reads before that phase is over. (Behind OPT-350m's norms the product is added to the normed input, which
// a late thread would take into the next phase, so there the norms are shared out, as they are with several sequences.)

#include "sparse_engine_decode.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <new>

#include "decode_kernels.h"
#include "driver.h"
#include "isa.h"
#include "team.h"

namespace sparse_engine {

const DecodeKernels& decode_kernels(const KernelSet& set) {
  (void)set;
#if defined(SPARSE_ENGINE_HAVE_AVX512)
  if (strcmp(set.name, "avx512") == 0) return decode_avx512();
#endif
#if defined(SPARSE_ENGINE_HAVE_AVX2)
  if (strcmp(set.name, "avx2") == 0) return decode_avx2();
#endif
  return decode_scalar();
}

namespace {

using LinearSpec = sparse_engine_decode_linear;
using NormSpec = sparse_engine_decode_norm;

constexpr int64_t kMaxLayers = 1 << 16;
// Pieces of a thread's run: at most so many, and none below this many bytes of weights.
constexpr int64_t kMostPieces = 8;
constexpr int64_t kPieceBytes = 256 << 10;
constexpr int64_t kPhasesPerLayer = 16, kOtherPhases = 12;

size_t aligned(size_t bytes) { return (bytes + size_t(kAlignment) - 1) / size_t(kAlignment) * size_t(kAlignment); }

Weight weight_of(const LinearSpec& spec) {
  return {spec.type,         spec.rows,
          spec.columns,      static_cast<const uint8_t*>(spec.values),
          spec.values_count, static_cast<const uint8_t*>(spec.scales),
          spec.bitmask,      spec.row_offsets,
          spec.row_values,   spec.row_offsets ? 0 : spec.group};
}

// Whether a product of the model is there, of that shape, and its arrays can be what they should.
bool valid(const LinearSpec& spec, int64_t rows, int64_t columns) {
  if (spec.type < 0 || spec.type >= kValueTypes || spec.rows != rows || spec.columns != columns || !spec.values) return false;
  Weight w = weight_of(spec);
  if (w.quantised() && !w.scales) return false;
  if (!w.bitmask) return w.type != SPARSE_ENGINE_INT4 && w.values_count >= rows * columns;
  if (w.row_offsets) return w.row_offsets[0] == 0 && w.start(rows) <= w.values_count;
  return w.group >= 0 && w.row_values >= 0 && w.row_values <= columns && w.start(rows) <= w.values_count;
}

struct Product {
  Linear linear;
  const float* bias;
};

struct Layer {
  NormSpec attention_norm, ffn_norm;
  Product *q, *k, *v, *out, *fc1, *fc2;
};

} // namespace
} // namespace sparse_engine

using namespace sparse_engine;

struct sparse_engine_decoder {
  const KernelSet& set;
  const DecodeKernels& kernels;
  sparse_engine_decode_model model;
  int64_t ffn, head_dim, max_batch, max_slots;
  int threads;
  std::atomic<int32_t>* pieces; // (phases, 1 + threads): of a phase, its pieces that are done and, of each run, those given out

  Layer* layers = nullptr;
  Product *project_in = nullptr, *project_out = nullptr, *head = nullptr;

  // Shared by the threads, fp32 (max_batch, ...).
  float *stream, *normed, *q, *k, *v, *attended, *inner, *narrow;
  uint8_t* packed;
  // Of each thread: its own normed row and packed input where it needs them, scores, and the products' scratch.
  uint8_t* own;
  size_t own_bytes, own_packed, own_scores, own_scratch;
  uint8_t* memory = nullptr;

  sparse_engine_decoder(const KernelSet& set, const sparse_engine_decode_model& model, int64_t max_batch, int64_t max_slots, int threads)
      : set(set), kernels(decode_kernels(set)), model(model), ffn(model.layer[0].fc1.rows), head_dim(model.hidden / model.heads),
        max_batch(max_batch), max_slots(max_slots), threads(threads) {}

  int64_t phases() const { return model.layers * kPhasesPerLayer + kOtherPhases; }
  int64_t counters() const { return phases() * (1 + threads); }

  ~sparse_engine_decoder() {
    free(memory);
    free(layers);
  }

  template <class Visit>
  void each_product(Visit visit) {
    if (model.project_in.values) visit(model.project_in, project_in);
    for (int64_t i = 0; i < model.layers; ++i) {
      const sparse_engine_decode_layer& spec = model.layer[i];
      Layer& layer = layers[i];
      visit(spec.q, layer.q);
      visit(spec.k, layer.k);
      visit(spec.v, layer.v);
      visit(spec.out, layer.out);
      visit(spec.fc1, layer.fc1);
      visit(spec.fc2, layer.fc2);
    }
    if (model.project_out.values) visit(model.project_out, project_out);
    visit(model.head, head);
  }

  // Lays all memory out and prepares the products; false where there is too little of it.
  bool prepare() {
    layers = static_cast<Layer*>(calloc(size_t(model.layers), sizeof(Layer)));
    if (!layers) return false;
    size_t packed_bytes = 0, scratch_bytes = 0, fixed = 0;
    each_product([&](const LinearSpec& spec, Product*&) {
      Linear linear(set, weight_of(spec));
      fixed += aligned(sizeof(Product)) + aligned(linear.tail_bytes());
      for (int64_t batch = 1; batch <= max_batch; ++batch) {
        packed_bytes = std::max(packed_bytes, aligned(linear.activation_bytes(batch)));
        scratch_bytes = std::max(scratch_bytes, aligned(linear.scratch_bytes(batch)));
      }
    });
    size_t wide = aligned(size_t(max_batch * model.hidden) * 4), inner_bytes = aligned(size_t(max_batch * ffn) * 4),
           narrow_bytes = aligned(size_t(max_batch * model.embedding) * 4);
    own_packed = aligned(size_t(model.hidden) * 4);
    own_scores = own_packed + packed_bytes;
    own_scratch = own_scores + aligned(size_t(max_slots) * 4);
    own_bytes = own_scratch + scratch_bytes;
    size_t counter_bytes = aligned(size_t(counters()) * sizeof *pieces);
    size_t total = fixed + counter_bytes + 6 * wide + inner_bytes + narrow_bytes + packed_bytes + size_t(threads) * own_bytes;
    memory = static_cast<uint8_t*>(aligned_alloc(size_t(kAlignment), total));
    if (!memory) return false;
    uint8_t* next = memory;
    auto take = [&next](size_t bytes) {
      uint8_t* here = next;
      next += aligned(bytes);
      return here;
    };
    each_product([&](const LinearSpec& spec, Product*& product) {
      product = new (take(sizeof(Product))) Product{Linear(set, weight_of(spec)), spec.bias};
      product->linear.place_tail(take(product->linear.tail_bytes()));
    });
    pieces = new (take(counter_bytes)) std::atomic<int32_t>[size_t(counters())];
    for (float** buffer : {&stream, &normed, &q, &k, &v, &attended})
      *buffer = reinterpret_cast<float*>(take(wide));
    inner = reinterpret_cast<float*>(take(inner_bytes));
    narrow = reinterpret_cast<float*>(take(narrow_bytes));
    packed = take(packed_bytes);
    own = take(size_t(threads) * own_bytes);
    for (int64_t i = 0; i < model.layers; ++i) {
      layers[i].attention_norm = model.layer[i].attention_norm;
      layers[i].ffn_norm = model.layer[i].ffn_norm;
    }
    return true;
  }
};

namespace sparse_engine {
namespace {

// One thread's part of one step.
class Step {
public:
  Step(sparse_engine_decoder& d, int64_t batch, const int64_t* tokens, const int64_t* starts, const int64_t* lengths, void* keys,
       void* values, int64_t slots, float* logits, int thread, int threads)
      : d_(d), batch_(batch), tokens_(tokens), starts_(starts), lengths_(lengths), keys_(static_cast<uint8_t*>(keys)),
        values_(static_cast<uint8_t*>(values)), slots_(slots), logits_(logits), thread_(thread), threads_(threads),
        own_(d.own + size_t(thread) * d.own_bytes), state_(d.stream) {}

  void run() {
    embed();
    for (int64_t i = 0; i < d_.model.layers; ++i)
      layer(d_.layers[i], i);
    output();
  }

private:
  bool alone() const { return batch_ == 1 && d_.model.norm_first; }

  // Returns when all phases before are over.
  void wait() {
    for (; waited_ < phase_; ++waited_)
      wait_until(counters(waited_)[0], totals_[waited_ % kOpenPhases]);
  }

  std::atomic<int32_t>* counters(int64_t phase) const { return d_.pieces + phase * (1 + d_.threads); }

  int64_t hidden() const { return d_.model.hidden; }

  void embed() {
    const sparse_engine_decode_model& m = d_.model;
    auto tokens = static_cast<const uint8_t*>(m.token_embedding);
    auto positions = static_cast<const uint8_t*>(m.position_embedding);
    int64_t element = element_bytes(m.embedding_dtype);
    Widen widen = d_.kernels.widen[m.embedding_dtype];
    each_sequence([&](int64_t b) {
      widen(tokens + tokens_[b] * m.embedding * element, m.embedding, (d_.project_in ? d_.narrow : d_.stream) + b * m.embedding);
    });
    wait();
    if (d_.project_in) {
      multiply(*d_.project_in, pack(*d_.project_in, d_.narrow), d_.stream);
      wait();
    }
    auto place = reinterpret_cast<float*>(own_);
    each_sequence([&](int64_t b) {
      widen(positions + (lengths_[b] - starts_[b] + m.position_offset) * m.hidden * element, m.hidden, place);
      for (int64_t i = 0; i < m.hidden; ++i)
        d_.stream[b * m.hidden + i] += place[i];
    });
    wait();
  }

  void layer(Layer& layer, int64_t index) {
    bool first = d_.model.norm_first != 0;
    const float* input = first ? norm(layer.attention_norm) : state_;
    const void* packed = pack(*layer.q, input);
    multiply(*layer.q, packed, d_.q);
    packed = pack_again(*layer.k, *layer.q, packed, input);
    multiply(*layer.k, packed, d_.k);
    packed = pack_again(*layer.v, *layer.k, packed, input);
    multiply(*layer.v, packed, d_.v);
    wait();
    attend(index);
    wait();
    multiply_onto_stream(*layer.out, pack(*layer.out, d_.attended));
    wait();
    if (!first) state_ = norm(layer.attention_norm);
    input = first ? norm(layer.ffn_norm) : state_;
    multiply(*layer.fc1, pack(*layer.fc1, input), d_.inner, [&](Range rows) {
      for (int64_t b = 0; b < batch_; ++b)
        for (int64_t i = b * d_.ffn + rows.begin; i < b * d_.ffn + rows.end; ++i)
          d_.inner[i] = std::max(d_.inner[i], 0.0f);
    });
    wait();
    multiply_onto_stream(*layer.fc2, pack(*layer.fc2, d_.inner));
    wait();
    if (!first) state_ = norm(layer.ffn_norm);
  }

  void output() {
    const float* input = d_.model.final_norm.present ? norm(d_.model.final_norm) : state_;
    if (d_.project_out) {
      multiply(*d_.project_out, pack(*d_.project_out, input), d_.narrow);
      wait();
      input = d_.narrow;
    }
    multiply(*d_.head, pack(*d_.head, input), logits_);
  }

  // The stream's rows normalised: this thread's own copy of the only one, or shared out and complete on return.
  const float* norm(const NormSpec& spec) {
    if (alone()) {
      auto row = reinterpret_cast<float*>(own_);
      d_.kernels.normalise(d_.stream, spec.weight, spec.bias, d_.model.epsilon, hidden(), row);
      return row;
    }
    each_sequence([&](int64_t b) {
      d_.kernels.normalise(d_.stream + b * hidden(), spec.weight, spec.bias, d_.model.epsilon, hidden(), d_.normed + b * hidden());
    });
    wait();
    return d_.normed;
  }

  // The input of a product in its kernels' layout, complete on return. No thread may still read the one before.
  const void* pack(const Product& product, const float* input) {
    if (alone()) {
      product.linear.pack(input, SPARSE_ENGINE_FP32, 1, own_ + d_.own_packed);
      return own_ + d_.own_packed;
    }
    divide(threads_, 1, 0, [&](Range parts) {
      for (int64_t part = parts.begin; part < parts.end; ++part)
        product.linear.pack(input, SPARSE_ENGINE_FP32, batch_, d_.packed, part, threads_);
    });
    wait();
    return d_.packed;
  }

  // The same for another product of an input that `last` has packed already: mostly nothing to do.
  const void* pack_again(const Product& product, const Product& last, const void* packed, const float* input) {
    if (product.linear.packs_like(last.linear, batch_)) return packed;
    if (!alone()) wait();
    return pack(product, input);
  }

  // Calls work(range) for pieces of 0 .. count - 1, of which all threads together do each once: a phase, over when wait() returns.
  // All threads come here in the same order.
  template <class Work>
  void divide(int64_t count, int64_t granule, int64_t bytes, Work work) {
    std::atomic<int32_t>*done = counters(phase_), *taken = done + 1;
    int64_t pieces = std::clamp<int64_t>(bytes / threads_ / kPieceBytes, 1, kMostPieces);
    totals_[phase_++ % kOpenPhases] = int32_t(pieces * threads_);
    for (int i = 0; i < threads_; ++i) {
      int owner = (thread_ + i) % threads_;
      Range run = share(count, granule, owner, threads_);
      for (int64_t piece; (piece = taken[owner].fetch_add(1, std::memory_order_relaxed)) < pieces;) {
        Range part = share(run.end - run.begin, granule, piece, pieces);
        if (part.begin < part.end) work(Range{run.begin + part.begin, run.begin + part.end});
        done->fetch_add(1, std::memory_order_release);
      }
    }
  }

  // A phase of work(sequence) for each of them.
  template <class Work>
  void each_sequence(Work work) {
    divide(batch_, 1, 0, [&](Range range) {
      for (int64_t b = range.begin; b < range.end; ++b)
        work(b);
    });
  }

  // A product to y (batch, rows), and then after(rows) for each range of rows that this thread has done.
  template <class After>
  void multiply(const Product& product, const void* packed, float* y, After after) {
    const Weight& w = product.linear.weight();
    Output output{SPARSE_ENGINE_FP32, y, w.rows, product.bias, SPARSE_ENGINE_FP32};
    divide(w.rows, product.linear.granule(batch_), w.bytes(), [&](Range rows) {
      product.linear.rows(packed, batch_, rows.begin, rows.end, output, own_ + d_.own_scratch);
      after(rows);
    });
  }

  void multiply(const Product& product, const void* packed, float* y) {
    multiply(product, packed, y, [](Range) {});
  }

  // stream = state + product. The queries are over by then and lend their memory.
  void multiply_onto_stream(const Product& product, const void* packed) {
    multiply(product, packed, d_.q, [&](Range rows) {
      for (int64_t b = 0; b < batch_; ++b)
        for (int64_t i = b * hidden() + rows.begin; i < b * hidden() + rows.end; ++i)
          d_.stream[i] = state_[i] + d_.q[i];
    });
  }

  void attend(int64_t index) {
    int64_t heads = d_.model.heads, dim = d_.head_dim;
    int32_t dtype = d_.model.cache_dtype;
    int64_t row_bytes = dim * element_bytes(dtype);
    float scale = 1.0f / sqrtf(float(dim));
    auto place = [&](int64_t i) { return ((index * batch_ * heads + i) * slots_ + starts_[i / heads]) * row_bytes; };
    auto one = [&](int64_t i) {
      int64_t start = starts_[i / heads], length = lengths_[i / heads];
      uint8_t *keys = keys_ + place(i), *values = values_ + place(i);
      const uint8_t* next = i + 1 < batch_ * heads ? keys_ + place(i + 1) : keys;
      d_.kernels.narrow[dtype](d_.k + i * dim, dim, keys + (length - start) * row_bytes);
      d_.kernels.narrow[dtype](d_.v + i * dim, dim, values + (length - start) * row_bytes);
      d_.kernels.attend[dtype](d_.q + i * dim, keys, values, next, length - start + 1, dim, scale,
                               reinterpret_cast<float*>(own_ + d_.own_scores), d_.attended + i * dim);
    };
    divide(batch_ * heads, 1, kMostPieces * kPieceBytes * threads_, [&](Range range) {
      for (int64_t i = range.begin; i < range.end; ++i)
        one(i);
    });
  }

  sparse_engine_decoder& d_;
  int64_t batch_;
  const int64_t *tokens_, *starts_, *lengths_;
  uint8_t *keys_, *values_;
  int64_t slots_;
  float* logits_;
  int thread_, threads_;
  uint8_t* own_;
  // Phases begun, those known to be over, and the pieces of the ones between, of which there are never more than q, k and v.
  static constexpr int64_t kOpenPhases = 4;
  int64_t phase_ = 0, waited_ = 0;
  int32_t totals_[kOpenPhases];
  const float* state_; // what a layer's products are added to
};

bool valid(const sparse_engine_decode_model& m) {
  if (m.layers < 1 || m.layers > kMaxLayers || m.heads < 1 || m.hidden < 1 || m.hidden % m.heads || m.embedding < 1 || m.vocabulary < 1)
    return false;
  if (m.positions < 1 || m.position_offset < 0 || !m.token_embedding || !m.position_embedding || !m.layer) return false;
  if (m.embedding_dtype < 0 || m.embedding_dtype >= kDtypes || m.cache_dtype < 0 || m.cache_dtype >= kDtypes) return false;
  if (m.embedding != m.hidden && (!valid(m.project_in, m.hidden, m.embedding) || !valid(m.project_out, m.embedding, m.hidden)))
    return false;
  if (m.embedding == m.hidden && (m.project_in.values || m.project_out.values)) return false;
  int64_t ffn = m.layer[0].fc1.rows;
  if (ffn < 1 || !valid(m.head, m.vocabulary, m.embedding)) return false;
  for (int64_t i = 0; i < m.layers; ++i) {
    const sparse_engine_decode_layer& layer = m.layer[i];
    for (const LinearSpec* spec : {&layer.q, &layer.k, &layer.v, &layer.out})
      if (!valid(*spec, m.hidden, m.hidden)) return false;
    if (!valid(layer.fc1, ffn, m.hidden) || !valid(layer.fc2, m.hidden, ffn)) return false;
  }
  return true;
}

} // namespace
} // namespace sparse_engine

int32_t sparse_engine_decoder_create(const sparse_engine_decode_model* model, int64_t max_batch, int64_t max_slots, int32_t threads,
                                     sparse_engine_decoder** decoder) {
  if (!decoder) return SPARSE_ENGINE_BAD_ARGUMENT;
  *decoder = nullptr;
  const KernelSet* set;
  if (int32_t status = current_kernels(&set)) return status;
  if (!model || max_batch < 1 || max_slots < 1 || threads < 1 || !valid(*model)) return SPARSE_ENGINE_BAD_ARGUMENT;
  auto made = new (std::nothrow) sparse_engine_decoder(*set, *model, max_batch, max_slots, threads);
  if (!made || !made->prepare()) {
    delete made;
    return SPARSE_ENGINE_OUT_OF_MEMORY;
  }
  *decoder = made;
  return SPARSE_ENGINE_OK;
}

void sparse_engine_decoder_destroy(sparse_engine_decoder* decoder) { delete decoder; }

int32_t sparse_engine_decode_step(sparse_engine_decoder* decoder, int64_t batch, const int64_t* tokens, const int64_t* starts,
                                  const int64_t* lengths, void* keys, void* values, int64_t slots, float* logits) {
  if (!decoder || batch < 0 || batch > decoder->max_batch || slots < 1 || slots > decoder->max_slots) return SPARSE_ENGINE_BAD_ARGUMENT;
  if (batch == 0) return SPARSE_ENGINE_OK;
  if (!tokens || !starts || !lengths || !keys || !values || !logits) return SPARSE_ENGINE_BAD_ARGUMENT;
  const sparse_engine_decode_model& m = decoder->model;
  for (int64_t b = 0; b < batch; ++b)
    if (tokens[b] < 0 || tokens[b] >= m.vocabulary || starts[b] < 0 || lengths[b] < starts[b] || lengths[b] >= slots ||
        lengths[b] - starts[b] + m.position_offset >= m.positions)
      return SPARSE_ENGINE_BAD_ARGUMENT;
  for (int64_t i = 0; i < decoder->counters(); ++i)
    decoder->pieces[i].store(0, std::memory_order_relaxed);
  in_parallel(decoder->threads, [&](int thread, int threads) {
    Step(*decoder, batch, tokens, starts, lengths, keys, values, slots, logits, thread, threads).run();
  });
  return SPARSE_ENGINE_OK;
}
