// Keys and values of a prompt's tokens into their places of a layer's caches, one block for each token. Nothing is computed: 16 bytes move.
#include "dependent.cuh"

struct Params {
  const uint4* qkv;       // (tokens, 3, heads, D)
  const long long* row;   // (tokens,) of the caches
  const long long* place; // (tokens,) the position in its row
  uint4* k;               // (rows, heads, S, D)
  uint4* v;
  int heads, positions; // positions is S
  int vectors;          // 16 bytes of a head
};

extern "C" __global__ void append_prompts(const __grid_constant__ Params p) {
  release_successor();
  wait_predecessor();
  const int width = p.heads * p.vectors;
  const uint4* source = p.qkv + (long long)blockIdx.x * 3 * width;
  const long long first = (p.row[blockIdx.x] * p.heads * p.positions + p.place[blockIdx.x]) * p.vectors;
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    const long long target = first + (long long)(i / p.vectors) * p.positions * p.vectors + i % p.vectors;
    p.k[target] = source[width + i];
    p.v[target] = source[2 * width + i];
  }
}
