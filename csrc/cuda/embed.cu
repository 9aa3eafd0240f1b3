// Embedding of the tokens that enter a step, one block per token.
#include "embedding.cuh"

struct Params {
  const long long* tokens; // (batch,)
  const int* positions;    // (batch,)
  Embedding embedding;
};

extern "C" __global__ void __launch_bounds__(THREADS) embed(const __grid_constant__ Params p) {
  release_successor();
  const Affine affine = load_norm(p.embedding);
  wait_predecessor();
  embed_row(p.embedding, affine, blockIdx.x, p.tokens[blockIdx.x], p.positions[blockIdx.x]);
}
