// LayerNorm of a row that a block holds in registers: vector j of thread t is the row's vector t + j * THREADS of 16 bytes.
//
// Macros: ELEMENT, the type of everything; THREADS of the block; PER_THREAD vectors of a thread.
#pragma once
#include "element.cuh"
#include "warp.cuh"

#define VECTOR VECTOR_OF<ELEMENT>
#define ROW_WARPS (THREADS / 32)

struct Affine {
  uint4 weight[PER_THREAD], bias[PER_THREAD];
};

__device__ __forceinline__ Affine load_affine(const uint4* weight, const uint4* bias, int vectors) {
  Affine affine;
#pragma unroll
  for (int j = 0; j < PER_THREAD; ++j) {
    const int v = threadIdx.x + j * THREADS;
    affine.weight[j] = v < vectors ? weight[v] : make_uint4(0, 0, 0, 0);
    affine.bias[j] = v < vectors ? bias[v] : make_uint4(0, 0, 0, 0);
  }
  return affine;
}

// Elements that a warp holds of a row of `vectors`.
__device__ __forceinline__ float warp_count(int warp, int vectors) {
  int count = 0;
#pragma unroll
  for (int j = 0; j < PER_THREAD; ++j)
    count += max(0, min(32, vectors - warp * 32 - j * THREADS));
  return (float)(count * VECTOR);
}

// store(j, y) of each of a thread's vectors y = (x - mean) / sqrt(variance + eps) * weight + bias, but for what lies behind the row. Every
// thread of the block calls it, once in a kernel.
// Each warp takes its own mean and its squared distances from that; the block joins them as Chan, Golub and LeVeque (1979) do, so that
// one barrier is enough and nothing cancels.
template <class Store>
__device__ __forceinline__ void normalise(const float (&x)[PER_THREAD][VECTOR], const Affine& affine, int vectors, float eps,
                                          const Store& store) {
  __shared__ float2 moments[ROW_WARPS];
  const int warp = threadIdx.x >> 5;
  const float count = warp_count(warp, vectors);
  float sum = 0;
#pragma unroll
  for (int j = 0; j < PER_THREAD; ++j)
#pragma unroll
    for (int i = 0; i < VECTOR; ++i)
      sum += x[j][i]; // zeros behind the row
  const float own = count > 0 ? __fdividef(warp_sum(sum), count) : 0;
  float squares = 0;
#pragma unroll
  for (int j = 0; j < PER_THREAD; ++j)
    if (threadIdx.x + j * THREADS < vectors)
#pragma unroll
      for (int i = 0; i < VECTOR; ++i)
        squares += (x[j][i] - own) * (x[j][i] - own);
  squares = warp_sum(squares);
  if ((threadIdx.x & 31) == 0) moments[warp] = make_float2(own, squares);
  __syncthreads();
  const float inverse = __frcp_rn((float)(vectors * VECTOR));
  float mean = 0, total = 0;
#pragma unroll 4
  for (int w = 0; w < ROW_WARPS; ++w)
    mean += warp_count(w, vectors) * inverse * moments[w].x;
#pragma unroll 4
  for (int w = 0; w < ROW_WARPS; ++w) {
    const float distance = moments[w].x - mean;
    total += moments[w].y + warp_count(w, vectors) * distance * distance;
  }
  const float scale = rsqrtf(total * inverse + eps);
#pragma unroll
  for (int j = 0; j < PER_THREAD; ++j) {
    const int v = threadIdx.x + j * THREADS;
    if (v < vectors) {
      float weight[VECTOR], bias[VECTOR], y[VECTOR];
      unpack<ELEMENT>(affine.weight[j], weight);
      unpack<ELEMENT>(affine.bias[j], bias);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i)
        y[i] = (x[j][i] - mean) * scale * weight[i] + bias[i];
      store(j, pack<ELEMENT>(y));
    }
  }
}

// The same, to a row in memory.
__device__ __forceinline__ void normalise(const float (&x)[PER_THREAD][VECTOR], const Affine& affine, int vectors, float eps, uint4* out) {
  normalise(x, affine, vectors, eps, [&](int j, const uint4& y) { out[threadIdx.x + j * THREADS] = y; });
}
