// A whole decode step of one row, from its token to the next one, in one kernel: as many blocks as multiprocessors, all resident.
//
// A layer is five phases: q, k and v; attention; its output; fc1; fc2. What a phase gives, all blocks of the next one need. There are no
// barriers between blocks: every word of a phase's result is published where nothing but EMPTY was before, and whoever needs it reads it
// until it is there. That costs one way through L2 and back instead of three. Results never hold EMPTY, since conversion and arithmetic
// give one NaN only, another one. Two sets of words take turns: a step empties the set of the next one.
//
// Blocks share a phase's row tiles of 16 (and an attention's heads, each in several parts) round robin, where the phase before ended, over
// the whole model, so that all have the same to do. Weights never wait for results: the last warp of a block copies all that the block
// will multiply, and the keys and values that it will attend to, through a ring of slots in shared memory, in order of use and as far
// ahead as the ring reaches, over any number of phases. Memory is read at its full rate as long as the ring holds the layers' latency.
//
//   slot: a row tile by 256 columns, as decode_nm.cu lays them out; or POSITIONS keys, then values; or a piece of the head
//
// Macros: PATTERN 24 or 48; ELEM_BF16; HIDDEN, FFN (multiples of 256), HEAD_SIZE (64 or 128); HEAD_INT8, the output head's type; SLOTS of
// the ring; POSITIONS of a slot; MAX_PARTS of a head's attention, which all find a block, of PART_POSITIONS at least where there are
// several.
#include "step/attention.cuh"
#include "step/head.cuh"
#include "step/product.cuh"
#include "step/stage.cuh"

// Rows of OPT's table before that of position 0.
#define POSITION_OFFSET 2

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_model(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char smem[];
  __shared__ u64 barriers[2 * SLOTS];
  __shared__ float2 moments[WARPS];
  __shared__ Partial partials[WARPS];
  __shared__ u64 bests[WARPS];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  // The ring, the layers' pointers, zeros and activations, sums.
  Layer* layers = (Layer*)(smem + SLOTS * SLOT_BYTES);
  unsigned char* rest = (unsigned char*)(layers + p.layer_count);
  const Ring ring = {shared_address(smem), shared_address(barriers), shared_address(barriers + SLOTS)};
  for (int i = threadIdx.x; i < SLOTS; i += THREADS) {
    barrier_init(ring.full + i * 8, 1);
    barrier_init(ring.empty + i * 8, 2);
  }
  barrier_init_fence();
  for (int i = threadIdx.x; i < p.layer_count * (int)(sizeof(Layer) / 8); i += THREADS)
    ((u64*)layers)[i] = ((const u64*)p.layers)[i];
  if (threadIdx.x == 0) *(uint4*)rest = make_uint4(0, 0, 0, 0);
  const int length = *(volatile const int*)p.state.lengths;
  __syncthreads();
  if (warp == WARPS) {
    fill(p, ring, layers, length);
    return;
  }

  Workspace w = {shared_address(rest + ZERO),
                 (u16*)(rest + ZERO),
                 (float*)(rest + ZERO + 2 * (FFN > HIDDEN ? FFN : HIDDEN)),
                 moments,
                 p.clocks ? p.clocks + (long long)blockIdx.x * (10 * p.layer_count + 4) : nullptr,
                 5 * p.layer_count + 1};
  const long long token = *(volatile const long long*)p.state.tokens;
  const int steps = *(volatile const int*)p.steps;
  u32* set = p.exchange + (steps & 1 ? p.set_words : 0);
  uint4* other = (uint4*)(p.exchange + (steps & 1 ? 0 : p.set_words));
  const Attention attention = attention_of(length, p.capacity);
  const long long entry = token < 0 ? 0 : token < p.vocabulary ? token : p.vocabulary - 1;
  Source state = {nullptr, p.token_table + entry * HIDDEN_WORDS,
                  p.position_table + (long long)min(length + POSITION_OFFSET, p.position_rows - 1) * HIDDEN_WORDS};
  for (int i = blockIdx.x * WORKERS + threadIdx.x; i < p.set_words / 4; i += gridDim.x * WORKERS)
    other[i] = make_uint4(EMPTY, EMPTY, EMPTY, EMPTY);
  note(w, 0);

  Cursor cursor = {0, 0};
  for (int l = 0; l < p.layer_count; ++l) {
    const Layer& layer = layers[l];
    u32* words = set + (size_t)l * LAYER_WORDS;
    w.phase = 5 * l;
#pragma unroll 1
    for (int product = QKV; product <= FC2; ++product, ++w.phase) {
      int count;
      if (product == OUT) {
        const int job = cursor.deal(HEADS * attention.parts, count);
        if (count) attend(p, ring, w, partials, cursor, attention, job, l, words + AT_QKV, words + AT_ATTENDED);
        ++w.phase;
      }
      const int first = cursor.deal(rows_of(product) / 16, count);
      if (count) {
        Addends add = addends(layer.bias[product], first, count);
        // The state that a LayerNorm took before this product's input was made.
        if ((product == OUT || product == FC2) && warp < count) add.residual = to_float(load_element(state, row_of(first)));
        if (product == OUT)
          stage_attended(w, words + AT_ATTENDED, attention.parts);
        else if (product == FC2)
          stage_plain(w, words + AT_FFN);
        else
          stage_normed(w, state, layer.scale[product / 2], layer.shift[product / 2], p.eps);
        const int at = product == QKV ? AT_QKV : product == OUT ? AT_MIDDLE : product == FC1 ? AT_FFN : AT_OUT;
        multiply_and_publish(ring, w, cursor, first, count, units_of(product), product == FC1, add, words + at);
      }
      if (product == OUT) state.words = words + AT_MIDDLE;
      if (product == FC2) state.words = words + AT_OUT;
    }
  }

  w.phase = 5 * p.layer_count;
  stage_normed(w, state, p.final_scale, p.final_shift, p.eps);
  const Best best = score_rows(p, ring, w, cursor);
  // Larger for a larger logit, then for a smaller index.
  if (lane == 0) bests[warp] = (u64)best.order << 32 | (0xffffffffu - best.index);
  workers_sync();
  u32* candidates = set + (size_t)p.layer_count * LAYER_WORDS;
  if (warp == 0) {
    // Its words' complements are never EMPTY, not even of a block without rows.
    const u64 mine = largest_of_warp(lane < WARPS ? larger(bests[lane], 1ull << 32 | 1) : 0);
    if (lane < 2) publish(candidates + 2 * blockIdx.x + lane, ~(u32)(lane ? mine >> 32 : mine));
  }
  note(w, 1);
  w.phase = 5 * p.layer_count + 1;
  if (blockIdx.x || warp) return note(w, 1);
  // Every block has read the step's number and the row's state when its candidate is there.
  const RowState before = read_state(p.state, 0);
  u64 found = 0;
  for (int block = lane; block < (int)gridDim.x; block += 32) {
    uint2 v = look_two(candidates + 2 * block);
    while (max(v.x, v.y) == EMPTY)
      v = look_two(candidates + 2 * block);
    found = larger(found, (u64)~v.y << 32 | ~v.x);
  }
  found = largest_of_warp(found);
  if (p.greedy) advance_row(p.state, 0, before, before.finished ? p.state.pad : (long long)(0xffffffffu - (u32)found));
  if (lane == 0) *p.steps = steps + 1;
  note(w, 1);
}
