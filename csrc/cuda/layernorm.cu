// LayerNorm of rows, one block each; see row_norm.cuh for the macros.
#include "row_norm.cuh"

struct Params {
  const uint4* x; // (rows, width)
  const uint4* weight;
  const uint4* bias; // (width,)
  uint4* out;        // (rows, width), may be x
  int width;         // a multiple of 8, at most THREADS * PER_THREAD vectors
  float eps;
};

extern "C" __global__ void __launch_bounds__(THREADS) layer_norm(const __grid_constant__ Params p) {
  release_successor();
  const int vectors = p.width / VECTOR;
  const Affine affine = load_affine(p.weight, p.bias, vectors);
  wait_predecessor();
  const uint4* row = p.x + (long long)blockIdx.x * vectors;
  float x[PER_THREAD][VECTOR];
#pragma unroll
  for (int j = 0; j < PER_THREAD; ++j) {
    const int v = threadIdx.x + j * THREADS;
    unpack<ELEMENT>(v < vectors ? row[v] : make_uint4(0, 0, 0, 0), x[j]);
  }
  normalise(x, affine, vectors, p.eps, p.out + (long long)blockIdx.x * vectors);
}
