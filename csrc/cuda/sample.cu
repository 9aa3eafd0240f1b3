// The choice of the next token of every row and what follows from it: history, counters, end of text, the next step's embedding.
//
//   greedy    blocks (row, part), a cluster along the parts: each takes the best of its part of the logits, block 0 the best of all,
//             then advances the row and embeds the token
//   advance   block (row): the same for tokens that were chosen elsewhere
//   penalise  block (row, chunk of CHUNK logits): repetition penalty and n-gram ban, into float32 scores
//
// Macros: those of row_norm.cuh for the embedding; LOGITS, the type of the logits; CHUNK.
#include "advance.cuh"
#include "best.cuh"
#include "embedding.cuh"
#include "gather.cuh"

#define MAX_PARTS 16
#define LOGITS_VECTOR VECTOR_OF<LOGITS>

struct Params {
  const void* logits;      // greedy: (batch, vocabulary)
  const long long* chosen; // advance: (batch,)
  State state;
  int vocabulary, has_embedding;
  Embedding embedding;
};

// Every thread of the block calls it with what it read before a barrier.
__device__ __forceinline__ void follow(const Params& p, const Affine& affine, int row, const RowState& before, long long chosen) {
  const long long token = before.finished ? p.state.pad : chosen;
  if (threadIdx.x < 32) advance_row(p.state, row, before, token);
  if (p.has_embedding) embed_row(p.embedding, affine, row, token, before.length + !before.finished);
}

extern "C" __global__ void __launch_bounds__(THREADS) advance(const __grid_constant__ Params p) {
  release_successor();
  const Affine affine = load_norm(p.embedding);
  wait_predecessor();
  const RowState before = read_state(p.state, blockIdx.x);
  const long long chosen = p.chosen[blockIdx.x];
  __syncthreads();
  follow(p, affine, blockIdx.x, before, chosen);
}

extern "C" __global__ void __launch_bounds__(THREADS) greedy(const __grid_constant__ Params p) {
  __shared__ Best of_warps[ROW_WARPS], of_parts[MAX_PARTS];
  __shared__ u64 gathered;
  const int row = blockIdx.x, part = blockIdx.y, parts = gridDim.y;
  release_successor();
  if (parts > 1) gather_open(&gathered, parts * (int)sizeof(Best));
  const Affine affine = load_norm(p.embedding);
  wait_predecessor();
  const RowState before = read_state(p.state, row);
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
  follow(p, affine, row, before, best.index);
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
