// The model that decode_model.cu is compiled for, see there for the macros; what a step publishes of each layer; and what a launch gives.
#pragma once
#include "fragments.cuh"
#include "advance.cuh"

#define WARPS 15
#define THREADS (32 * (WARPS + 1))
#define WORKERS (32 * WARPS)
#define SLOT_BYTES 4608

#define HEADS (HIDDEN / HEAD_SIZE)
#define UNITS_HIDDEN (HIDDEN / 256)
#define UNITS_FFN (FFN / 256)
#define LANES (HEAD_SIZE / 8)
#define GROUPS (32 / LANES)

// Words of a layer in a set: its results one behind the other.
#define QKV_WORDS (3 * HIDDEN / 2)
#define PARTIAL_WORDS (HEAD_SIZE + 4) // weighted values, their weights' sum, the maximum that both are relative to
#define ATTENDED_WORDS (HEADS * MAX_PARTS * PARTIAL_WORDS)
#define HIDDEN_WORDS (HIDDEN / 2)
#define FFN_WORDS (FFN / 2)
#define AT_QKV 0
#define AT_ATTENDED (AT_QKV + QKV_WORDS)
#define AT_MIDDLE (AT_ATTENDED + ATTENDED_WORDS)
#define AT_FFN (AT_MIDDLE + HIDDEN_WORDS)
#define AT_OUT (AT_FFN + FFN_WORDS)
#define LAYER_WORDS (AT_OUT + HIDDEN_WORDS)

// The head's rows in slots: several in one, or one in several.
#define HEAD_ROW_BYTES (HIDDEN * (HEAD_INT8 ? 1 : 2))
#define ROW_SLOTS ((HEAD_ROW_BYTES + SLOT_BYTES - 1) / SLOT_BYTES <= 1 ? 1 : HEAD_ROW_BYTES <= 2 * SLOT_BYTES ? 2 : 4)
#define SLOT_ROWS (ROW_SLOTS > 1 ? 1 : SLOT_BYTES / HEAD_ROW_BYTES > 4 ? 4 : SLOT_BYTES / HEAD_ROW_BYTES)
#define PIECE_BYTES (HEAD_ROW_BYTES / ROW_SLOTS)
// As many warps as there is a turn of the ring for: take counts on it.
#define HEAD_WARPS (WARPS * ROW_SLOTS <= SLOTS ? WARPS : SLOTS / ROW_SLOTS)

// A layer's products in the order of their phases.
#define QKV 0
#define OUT 1
#define FC1 2
#define FC2 3

struct Layer {
  const uint4* weight[4]; // as decode_nm.cu lays them out
  const u16* bias[4];
  const u16* scale[2]; // LayerNorms before QKV and FC1
  const u16* shift[2];
};

__device__ __forceinline__ int rows_of(int product) { return product == QKV ? 3 * HIDDEN : product == FC1 ? FFN : HIDDEN; }
__device__ __forceinline__ int units_of(int product) { return product == FC2 ? UNITS_FFN : UNITS_HIDDEN; }

struct Params {
  const Layer* layers;
  const u32* token_table;    // (vocabulary, HIDDEN)
  const u32* position_table; // (position_rows, HIDDEN)
  const u16* final_scale;
  const u16* final_shift;
  const unsigned char* head; // (vocabulary, HIDDEN)
  const float* head_scales;  // (vocabulary,) of an int8 head
  u16* k_cache;              // (layers, HEADS, capacity, HEAD_SIZE)
  u16* v_cache;
  u16* logits;       // (vocabulary,)
  u32* exchange;     // two sets of set_words
  int* steps;        // made so far
  long long* clocks; // null, or (blocks, 2 + 10 * layers): when this block's phases began to compute and ended
  State state;
  int layer_count, vocabulary, position_rows, capacity;
  int set_words; // layer_count * LAYER_WORDS, then two words of each block
  int greedy;    // take the argmax and advance the row
  float eps, scale;
};
