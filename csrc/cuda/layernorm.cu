// LayerNorm of rows, or of the sums of two rows, one block each; see row_norm.cuh for the macros.
#include "row_norm.cuh"

struct Params {
  const uint4* x; // (rows, width)
  const uint4* weight;
  const uint4* bias;  // (width,)
  const uint4* added; // (rows, width) or null: x itself is normalised
  uint4* total;       // (rows, width) x + added where there is `added`; may be either
  uint4* out;         // (rows, width), may be x
  int width;          // a multiple of 8, at most THREADS * PER_THREAD vectors
  float eps;
};

extern "C" __global__ void __launch_bounds__(THREADS) layer_norm(const __grid_constant__ Params p) {
  release_successor();
  const int vectors = p.width / VECTOR;
  const Affine affine = load_affine(p.weight, p.bias, vectors);
  wait_predecessor();
  const long long first = (long long)blockIdx.x * vectors;
  float x[PER_THREAD][VECTOR];
#pragma unroll
  for (int j = 0; j < PER_THREAD; ++j) {
    const int v = threadIdx.x + j * THREADS;
    unpack<ELEMENT>(v < vectors ? p.x[first + v] : make_uint4(0, 0, 0, 0), x[j]);
    if (p.added && v < vectors) {
      float more[VECTOR];
      unpack<ELEMENT>(p.added[first + v], more);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i)
        x[j][i] += more[i];
      const uint4 sum = pack<ELEMENT>(x[j]);
      p.total[first + v] = sum;
      unpack<ELEMENT>(sum, x[j]); // what is normalised is the rounded sum, as every later reader sees it
    }
  }
  normalise(x, affine, vectors, p.eps, p.out + first);
}
