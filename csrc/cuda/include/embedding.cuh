// The embedding of one token by one block, with the LayerNorm that may follow; see row_norm.cuh for the macros.
#pragma once
#include "row_norm.cuh"

struct Embedding {
  const uint4* token_table;    // (vocabulary, width)
  const uint4* position_table; // (position_rows, width), or null
  uint4* out;                  // (batch, width)
  const uint4* norm_weight;    // (width,), or null: no LayerNorm
  const uint4* norm_bias;      // (width,)
  uint4* norm_out;             // (batch, width)
  int vocabulary, position_rows;
  int width; // a multiple of 8, at most THREADS * PER_THREAD vectors
  float eps;
};

// OPT's table begins with two rows that belong to no position.
#define POSITION_OFFSET 2

// Reads nothing that a predecessor writes.
__device__ __forceinline__ Affine load_norm(const Embedding& e) {
  return load_affine(e.norm_weight, e.norm_bias, e.norm_weight ? e.width / VECTOR : 0);
}

// Row `row` of the outputs. Tokens and positions outside the tables, which only rows that have finished may have, are clamped to them.
__device__ __forceinline__ void embed_row(const Embedding& e, const Affine& affine, int row, long long token, int position) {
  const int vectors = e.width / VECTOR;
  const long long entry = token < 0 ? 0 : token < e.vocabulary ? token : e.vocabulary - 1;
  const uint4* token_row = e.token_table + entry * vectors;
  const uint4* position_row = e.position_table + (long long)min(position + POSITION_OFFSET, e.position_rows - 1) * vectors;
  float x[PER_THREAD][VECTOR];
#pragma unroll
  for (int j = 0; j < PER_THREAD; ++j) {
    const int v = threadIdx.x + j * THREADS;
    const bool inside = v < vectors;
    uint4 word = inside ? token_row[v] : make_uint4(0, 0, 0, 0);
    unpack<ELEMENT>(word, x[j]);
    if (e.position_table) {
      float added[VECTOR];
      unpack<ELEMENT>(inside ? position_row[v] : make_uint4(0, 0, 0, 0), added);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i)
        x[j][i] += added[i];
      word = pack<ELEMENT>(x[j]);
      unpack<ELEMENT>(word, x[j]); // LayerNorm sees the rounded row, as every later reader does
    }
    if (inside) e.out[(long long)row * vectors + v] = word;
  }
  if (e.norm_weight) normalise(x, affine, vectors, e.eps, e.norm_out + (long long)row * vectors);
}
