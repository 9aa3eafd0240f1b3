// The choice of the next token of every row and what follows from it: history, counters, end of text, the next step's embedding.
//
//   greedy    blocks (row, part), a cluster along the parts: each takes the best of its part of the logits, block 0 the best of all,
//             then advances the row and embeds the token
//   advance   block (row): the same for tokens that were chosen elsewhere
//   penalise  block (row, chunk of CHUNK logits): repetition penalty and n-gram ban, into float32 scores
//
// Macros: those of row_norm.cuh for the embedding; LOGITS, the type of the logits; CHUNK.
#include "embedding.cuh"
#include "gather.cuh"

#define MAX_PARTS 16
#define LOGITS_VECTOR VECTOR_OF<LOGITS>

struct Params {
  const void* logits;      // greedy: (batch, vocabulary)
  const long long* chosen; // advance: (batch,)
  long long* tokens;       // (batch,) the token that enters the next step
  int* lengths;            // (batch,) tokens in the cache: the position of that token
  long long* history;      // (batch, capacity)
  int* filled;             // (batch,) tokens of history in use
  const int* limits;       // (batch,) a row finishes when filled gets there
  unsigned char* finished; // (batch,)
  const long long* eos;    // (eos_count,)
  long long pad;
  int vocabulary, capacity, eos_count, has_embedding;
  Embedding embedding;
};

struct RowState {
  int length, filled, limit;
  bool finished;
  long long eos; // one per lane; -1 behind the last
};

__device__ __forceinline__ RowState read_state(const Params& p, int row) {
  const int lane = threadIdx.x & 31;
  return {p.lengths[row], p.filled[row], p.limits[row], p.finished[row] != 0, lane < p.eos_count ? p.eos[lane] : -1};
}

// Every thread of the block calls it with what it read before a barrier; the first warp writes.
__device__ __forceinline__ void advance_row(const Params& p, const Affine& affine, int row, const RowState& state, long long chosen) {
  const long long token = state.finished ? p.pad : chosen;
  const int length = state.length + !state.finished;
  if (threadIdx.x < 32) {
    bool end = state.filled + 1 >= state.limit || state.eos == token;
#pragma unroll 1
    for (int i = threadIdx.x + 32; i < p.eos_count; i += 32)
      end |= p.eos[i] == token;
    end = __any_sync(0xffffffffu, end);
    if (threadIdx.x == 0) {
      p.tokens[row] = token;
      if (!state.finished) {
        if (state.filled < p.capacity) p.history[(long long)row * p.capacity + state.filled] = token;
        p.filled[row] = state.filled + 1;
        p.lengths[row] = length;
        if (end) p.finished[row] = 1;
      }
    }
  }
  if (p.has_embedding) embed_row(p.embedding, affine, row, token, length);
}

extern "C" __global__ void __launch_bounds__(THREADS) advance(const __grid_constant__ Params p) {
  release_successor();
  const Affine affine = load_norm(p.embedding);
  wait_predecessor();
  const RowState state = read_state(p, blockIdx.x);
  const long long chosen = p.chosen[blockIdx.x];
  __syncthreads();
  advance_row(p, affine, blockIdx.x, state, chosen);
}

// A value's order among all, as an integer above 0: equal for both zeros, NaN above all.
__device__ __forceinline__ u32 order_of(float v) {
  const u32 bits = __float_as_uint(v + 0.0f);
  return bits ^ (bits & 0x80000000u ? 0xffffffffu : 0x80000000u);
}

// The largest order and the first index that has it.
struct Best {
  u32 order, index;
};

__device__ __forceinline__ void take(Best& best, float v, u32 index) {
  const u32 order = order_of(v);
  if (order > best.order) best = {order, index};
}

__device__ __forceinline__ Best warp_best(const Best& b) {
  const u32 order = __reduce_max_sync(0xffffffffu, b.order);
  return {order, __reduce_min_sync(0xffffffffu, b.order == order ? b.index : 0xffffffffu)};
}

__device__ __forceinline__ Best best_of(const Best* shared, int count) {
  const int lane = threadIdx.x & 31;
  return warp_best(lane < count ? shared[lane] : Best{0, 0xffffffffu});
}

extern "C" __global__ void __launch_bounds__(THREADS) greedy(const __grid_constant__ Params p) {
  __shared__ Best of_warps[ROW_WARPS], of_parts[MAX_PARTS];
  __shared__ u64 gathered;
  const int row = blockIdx.x, part = blockIdx.y, parts = gridDim.y;
  release_successor();
  if (parts > 1) gather_open(&gathered, parts * (int)sizeof(Best));
  const Affine affine = load_norm(p.embedding);
  wait_predecessor();
  const RowState state = read_state(p, row);
  const char* logits = (const char*)p.logits + (long long)row * p.vocabulary * BYTES_OF<LOGITS>;
  Best best = {0, 0xffffffffu};
  if (p.vocabulary % LOGITS_VECTOR == 0 && (u64)p.logits % 16 == 0) {
    const int vectors = p.vocabulary / LOGITS_VECTOR;
    const int end = (int)((long long)vectors * (part + 1) / parts);
    // Thread by thread in rising order, so that the first of equals stays.
#pragma unroll 4
    for (int v = (int)((long long)vectors * part / parts) + threadIdx.x; v < end; v += THREADS) {
      float f[LOGITS_VECTOR];
      unpack<LOGITS>(((const uint4*)logits)[v], f);
#pragma unroll
      for (int i = 0; i < LOGITS_VECTOR; ++i)
        take(best, f[i], v * LOGITS_VECTOR + i);
    }
  } else {
    const int end = (int)((long long)p.vocabulary * (part + 1) / parts);
#pragma unroll 4
    for (int i = (int)((long long)p.vocabulary * part / parts) + threadIdx.x; i < end; i += THREADS)
      take(best, load_element<LOGITS>(logits, i), i);
  }
  best = warp_best(best);
  if ((threadIdx.x & 31) == 0) of_warps[threadIdx.x >> 5] = best;
  __syncthreads();
  best = best_of(of_warps, ROW_WARPS);
  if (parts > 1) {
    gather_ready();
    if (threadIdx.x == 0) {
      gather_store(&gathered, &of_parts[part].order, best.order);
      gather_store(&gathered, &of_parts[part].index, best.index);
    }
    if (part) return;
    gather_wait(&gathered);
    best = best_of(of_parts, parts);
  }
  advance_row(p, affine, row, state, best.index);
}

#ifdef CHUNK
struct PenaltyParams {
  const void* logits;       // (batch, vocabulary)
  const long long* history; // (batch, capacity)
  const int* filled;        // (batch,)
  float* scores;            // (batch, vocabulary)
  int vocabulary, capacity;
  int ngram; // 0: no ban
  float penalty;
};

extern "C" __global__ void __launch_bounds__(THREADS) penalise(const __grid_constant__ PenaltyParams p) {
  const int row = blockIdx.x, first = blockIdx.y * CHUNK, end = min(first + CHUNK, p.vocabulary);
  release_successor();
  wait_predecessor();
  const char* logits = (const char*)p.logits + (long long)row * p.vocabulary * BYTES_OF<LOGITS>;
  float* scores = p.scores + (long long)row * p.vocabulary;
  const long long* history = p.history + (long long)row * p.capacity;
  const int count = min(p.filled[row], p.capacity);
#pragma unroll 4
  for (int i = first + threadIdx.x; i < end; i += THREADS)
    scores[i] = load_element<LOGITS>(logits, i);
  __syncthreads();
  if (p.penalty != 1.0f) {
    // Torch divides by a number in this way on a GPU.
    const float inverse = 1.0f / p.penalty;
    // A token that occurs twice is computed twice from its logit: the same value.
    for (int i = threadIdx.x; i < count; i += THREADS) {
      const long long token = history[i];
      if (token >= first && token < end) {
        const float score = load_element<LOGITS>(logits, token);
        scores[token] = score * (score < 0 ? p.penalty : inverse);
      }
    }
    __syncthreads();
  }
  if (p.ngram == 0) return;
  const long long* prefix = history + count - (p.ngram - 1);
  for (int i = threadIdx.x; i + p.ngram <= count; i += THREADS) {
    const long long token = history[i + p.ngram - 1];
    bool same = token >= first && token < end;
    for (int j = 0; same && j < p.ngram - 1; ++j)
      same = history[i + j] == prefix[j];
    if (same) scores[token] = -__int_as_float(0x7f800000);
  }
}
#endif
