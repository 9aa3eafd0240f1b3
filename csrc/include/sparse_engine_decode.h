/* C ABI of the decode step: one new token per sequence through a whole OPT decoder (Zhang et al. 2022) and its output head.
 *
 * A decoder is made once from a description of the model, of which it copies the structs and keeps the pointers: the arrays
 * must outlive it. A step then runs every layer in one parallel region, whose threads meet at barriers between the products:
 *
 *   embed ─▶ [ norm ─▶ q k v │ append, attend │ out + residual │ norm ─▶ fc1, ReLU │ fc2 + residual │ ] × layers ─▶ norm ─▶ head
 *                            └───────────────┴── barriers ────┴───────────────────┴────────────────┘
 *
 * Weights are packed or dense as in sparse_engine.h, activations fp32 between the products, and keys and values are appended
 * to a cache of fixed size:
 *
 *   keys, values  (layers, batch, heads, slots, head_dim) of cache_dtype, contiguous
 *
 *        slot   0 1 2 3 4 5 6 7          sequence 0: starts[0] = 2 (left padding), lengths[0] = 6
 *        seq 0  . . a b c d N _          N: where this step writes, position lengths - starts; _ : not looked at
 *        seq 1  e f g h i j N _
 */
#ifndef SPARSE_ENGINE_DECODE_H
#define SPARSE_ENGINE_DECODE_H

#include <stdint.h>

#include "sparse_engine.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y = x Wᵀ + bias; the fields are those of sparse_engine.h's functions. No rows: there is no such product. */
typedef struct {
  int32_t type; /* sparse_engine_dtype of the values; int4 only packed */
  const void* values;
  int64_t values_count;       /* elements as they are stored: of int4 bytes */
  const uint8_t* bitmask;     /* NULL: dense, row-major */
  const int64_t* row_offsets; /* NULL: N:M, or dense */
  int64_t row_values;
  int64_t group;
  const void* scales; /* of int8 and int4 values, else NULL */
  int64_t rows;
  int64_t columns;
  const float* bias; /* (rows,), or NULL */
} sparse_engine_decode_linear;

typedef struct {
  int32_t present;
  const float* weight; /* (hidden,), or NULL: ones */
  const float* bias;   /* (hidden,), or NULL: zeros */
} sparse_engine_decode_norm;

typedef struct {
  sparse_engine_decode_norm attention_norm;
  sparse_engine_decode_linear q, k, v, out;
  sparse_engine_decode_norm ffn_norm;
  sparse_engine_decode_linear fc1, fc2;
} sparse_engine_decode_layer;

typedef struct {
  int64_t layers;
  int64_t heads;
  int64_t hidden;    /* heads * head_dim */
  int64_t embedding; /* width of token embeddings; another one than hidden needs project_in and project_out */
  int64_t vocabulary;
  int64_t positions;              /* rows of position_embedding */
  int64_t position_offset;        /* row of a sequence's first token */
  float epsilon;                  /* of the norms */
  int32_t norm_first;             /* 1: norms before the products; 0: behind the residuals, as OPT-350m */
  int32_t embedding_dtype;        /* of both embeddings: BF16, FP16 or FP32 */
  int32_t cache_dtype;            /* BF16, FP16 or FP32 */
  const void* token_embedding;    /* (vocabulary, embedding) */
  const void* position_embedding; /* (positions, hidden) */
  sparse_engine_decode_linear project_in;
  const sparse_engine_decode_layer* layer; /* (layers,) */
  sparse_engine_decode_norm final_norm;
  sparse_engine_decode_linear project_out;
  sparse_engine_decode_linear head; /* (vocabulary, embedding) */
} sparse_engine_decode_model;

typedef struct sparse_engine_decoder sparse_engine_decoder;

/* Makes a decoder for batches of up to max_batch sequences, caches of up to max_slots and up to `threads` OpenMP threads,
 * with the kernels of the level in use now. On any status but OK `*decoder` is NULL. */
SPARSE_ENGINE_API int32_t sparse_engine_decoder_create(const sparse_engine_decode_model* model, int64_t max_batch, int64_t max_slots,
                                                       int32_t threads, sparse_engine_decoder** decoder);

SPARSE_ENGINE_API void sparse_engine_decoder_destroy(sparse_engine_decoder* decoder);

/* One step. Not to be called on one decoder from several threads at once.
 *
 *   tokens   int64 (batch,), in [0, vocabulary)
 *   starts   int64 (batch,), first slot of each sequence
 *   lengths  int64 (batch,), where this step's keys and values go: starts <= lengths < slots
 *   keys, values, slots  the cache
 *   logits   fp32 (batch, vocabulary); every element is written
 *
 * BAD_ARGUMENT, with nothing written, where one of these does not hold or a position is beyond the position embedding. */
SPARSE_ENGINE_API int32_t sparse_engine_decode_step(sparse_engine_decoder* decoder, int64_t batch, const int64_t* tokens,
                                                    const int64_t* starts, const int64_t* lengths, void* keys, void* values, int64_t slots,
                                                    float* logits);

#ifdef __cplusplus
}
#endif
#endif
