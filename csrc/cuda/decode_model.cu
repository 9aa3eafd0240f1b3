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
#include "fragments.cuh"
#include "expand.cuh"
#include "mma_sparse.cuh"
#include "bulk.cuh"
#include "advance.cuh"
#include "best.cuh"

#define WARPS 15
#define THREADS (32 * (WARPS + 1))
#define WORKERS (32 * WARPS)
#define SLOT_BYTES 4608
#define EMPTY 0xffffffffu
#define ALL 0xffffffffu
#define LOWEST -3.0e38f
#define POSITION_OFFSET 2
#define LOG2E 1.44269504f

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

// Lanes that waited for words of their own meet first: the barrier is the warp's.
__device__ __forceinline__ void workers_sync() {
  __syncwarp();
  asm volatile("bar.sync 1, %0;" ::"n"(WORKERS) : "memory");
}

__device__ __forceinline__ uint4 read_shared(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ void publish(u32* at, u32 v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(v) : "memory");
}

__device__ __forceinline__ uint4 look(const u32* at) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
  return v;
}

__device__ __forceinline__ uint2 look_two(const u32* at) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at) : "memory");
  return v;
}

__device__ __forceinline__ u32 look_one(const u32* at) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
  return v;
}

__device__ __forceinline__ bool lacks(const uint4& v) { return max(max(v.x, v.y), max(v.z, v.w)) == EMPTY; }

// Words that a block of an earlier phase publishes, when they are there.
__device__ __forceinline__ uint4 await(const u32* at) {
  uint4 v = look(at);
  while (lacks(v))
    v = look(at);
  return v;
}

__device__ __forceinline__ u32 await_one(const u32* at) {
  u32 v = look_one(at);
  while (v == EMPTY)
    v = look_one(at);
  return v;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void unpack(const uint4& v, float (&f)[8]) {
  const u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    f[2 * i] = to_float((u16)(word[i] & 0xffffu));
    f[2 * i + 1] = to_float((u16)(word[i] >> 16));
  }
}

__device__ __forceinline__ u32 pack_two(float low, float high) { return (u32)from_float(low) | (u32)from_float(high) << 16; }

__device__ __forceinline__ float sum_of_warp(float v) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1)
    v += __shfl_xor_sync(ALL, v, offset);
  return v;
}

__device__ __forceinline__ u32 add_words(u32 a, u32 b) {
  return pack_two(to_float((u16)(a & 0xffffu)) + to_float((u16)(b & 0xffffu)), to_float((u16)(a >> 16)) + to_float((u16)(b >> 16)));
}

// What both kinds of warps follow in step: the block's share of each phase, and how many slots it has used.
struct Cursor {
  u32 slot;
  int start; // the block that has the next phase's first tile

  // The block's first one of `tiles`, which are dealt to blocks in turn, and how many it has.
  __device__ __forceinline__ int deal(int tiles, int& count) {
    const int blocks = (int)gridDim.x;
    int first = (int)blockIdx.x - start;
    if (first < 0) first += blocks;
    count = first < tiles ? (tiles - first + blocks - 1) / blocks : 0;
    start = (start + tiles) % blocks;
    return first;
  }
};

struct Attention {
  int count, parts; // positions in use, and parts that share them
};

__device__ __forceinline__ Attention attention_of(int length, int capacity) {
  const int count = min(length, capacity);
  return {count, max(1, min(MAX_PARTS, (count + PART_POSITIONS - 1) / PART_POSITIONS))};
}

struct Range {
  int begin, end;
};

__device__ __forceinline__ Range range_of(const Attention& a, int part) {
  const int share = (a.count + a.parts - 1) / a.parts, begin = min(part * share, a.count);
  return {begin, min(begin + share, a.count)};
}

struct Ring {
  u32 data, full, empty; // shared addresses

  __device__ __forceinline__ u32 place(u32 slot) const { return data + slot % SLOTS * SLOT_BYTES; }

  // A worker's warp waits for a slot of a phase that began at slot `first`; all its lanes call release when they have read it, `share` of
  // two halves. Copies arrive in any order, and a barrier tells a turn only from the next one: where the slot has had a turn in this phase,
  // another warp may still wait for that, so that its release comes first.
  __device__ __forceinline__ u32 take(u32 slot, u32 first) const {
    if (slot - first >= SLOTS) barrier_wait(empty + slot % SLOTS * 8, (slot / SLOTS & 1) ^ 1);
    barrier_wait(full + slot % SLOTS * 8, slot / SLOTS & 1);
    __syncwarp();
    return place(slot);
  }
  __device__ __forceinline__ void release(u32 slot, int halves) const {
    __syncwarp();
    if ((int)(threadIdx.x & 31) < halves) barrier_arrive(empty + slot % SLOTS * 8);
  }

  // One thread fills slots, in order.
  __device__ __forceinline__ u32 open(u32 slot, u32 bytes) const {
    barrier_wait(empty + slot % SLOTS * 8, (slot / SLOTS & 1) ^ 1);
    barrier_expect(full + slot % SLOTS * 8, bytes);
    return full + slot % SLOTS * 8;
  }
};

__device__ __forceinline__ void prefetch_vector(const void* p, int elements) {
  for (int line = (int)blockIdx.x + (int)gridDim.x * (int)(threadIdx.x & 31); line * 64 < elements; line += 32 * (int)gridDim.x)
    asm volatile("prefetch.global.L2::evict_last [%0];" ::"l"((const char*)p + line * 128));
}

// The last warp: copies what this block will read, in order.
__device__ __forceinline__ void fill(const Params& p, const Ring& ring, const Layer* layers, int length) {
  const int lane = threadIdx.x & 31;
  const u64 policy = weight_policy();
  const Attention attention = attention_of(length, p.capacity);
  Cursor cursor = {0, 0};
  for (int l = 0; l < p.layer_count; ++l) {
    const Layer& layer = layers[l];
#pragma unroll 1
    for (int i = 0; i < 8; ++i)
      prefetch_vector(i < 4 ? layer.bias[i] : i < 6 ? layer.scale[i - 4] : layer.shift[i - 6], i < 4 ? rows_of(i) : HIDDEN);
#pragma unroll 1
    for (int product = QKV; product <= FC2; ++product) {
      int count;
      if (product == OUT) {
        const int job = cursor.deal(HEADS * attention.parts, count);
        const Range range = range_of(attention, job % attention.parts);
        const size_t base = ((size_t)l * HEADS + job / attention.parts) * p.capacity;
#pragma unroll 1
        for (int at = range.begin; count && at < range.end; at += POSITIONS, ++cursor.slot) {
          if (lane) continue;
          const u32 bytes = min(POSITIONS, range.end - at) * HEAD_SIZE * 2, target = ring.place(cursor.slot);
          const u32 barrier = ring.open(cursor.slot, 2 * bytes);
          bulk_copy(target, p.k_cache + (base + at) * HEAD_SIZE, bytes, barrier, policy);
          bulk_copy(target + POSITIONS * HEAD_SIZE * 2, p.v_cache + (base + at) * HEAD_SIZE, bytes, barrier, policy);
        }
      }
      const int first = cursor.deal(rows_of(product) / 16, count), units = units_of(product);
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        const char* source = (const char*)layer.weight[product] + (size_t)(first + i * (int)gridDim.x) * units * SLOT_BYTES;
#pragma unroll 1
        for (int u = 0; u < units; ++u, ++cursor.slot)
          if (lane == 0)
            bulk_copy(ring.place(cursor.slot), source + (size_t)u * SLOT_BYTES, SLOT_BYTES, ring.open(cursor.slot, SLOT_BYTES), policy);
      }
    }
    __syncwarp();
  }
  prefetch_vector(p.final_scale, HIDDEN);
  prefetch_vector(p.final_shift, HIDDEN);
  if (lane) return;
  const int groups = (p.vocabulary + SLOT_ROWS - 1) / SLOT_ROWS;
  const int end = (int)((long long)groups * (blockIdx.x + 1) / gridDim.x);
#pragma unroll 1
  for (int group = (int)((long long)groups * blockIdx.x / gridDim.x); group < end; ++group) {
    const u32 bytes = ROW_SLOTS > 1 ? PIECE_BYTES : min(SLOT_ROWS, p.vocabulary - group * SLOT_ROWS) * HEAD_ROW_BYTES;
    const unsigned char* source = p.head + (size_t)group * SLOT_ROWS * HEAD_ROW_BYTES;
#pragma unroll 1
    for (int piece = 0; piece < ROW_SLOTS; ++piece, ++cursor.slot)
      bulk_copy(ring.place(cursor.slot), source + (size_t)piece * PIECE_BYTES, bytes, ring.open(cursor.slot, bytes), policy);
  }
}

// Shared memory of the workers.
struct Workspace {
  u32 x;       // shared address of the activations that a phase multiplies; ZERO bytes of zeros before them
  u16* values; // the same
  float* sums; // 16 of each job
  float2* moments;
  long long* clocks; // null, or when thread 0 had what a phase waits for, and when it was done with it
  int phase;
};

#define ZERO 16

__device__ __forceinline__ void note(const Workspace& w, int which) {
  if (w.clocks && threadIdx.x == 0) w.clocks[w.phase * 2 + which] = clock64();
}

// Eight values of the state that enters layer `l`, from `at` on: the embedding, or what the layer before has published.
struct Source {
  const u32* words; // null for the embedding
  const u32 *token_row, *position_row;
};

__device__ __forceinline__ uint4 load_eight(const Source& s, int vector) {
  if (s.words) return await(s.words + vector * 4);
  const uint4 a = ((const uint4*)s.token_row)[vector], b = ((const uint4*)s.position_row)[vector];
  return make_uint4(add_words(a.x, b.x), add_words(a.y, b.y), add_words(a.z, b.z), add_words(a.w, b.w));
}

__device__ __forceinline__ u16 load_element(const Source& s, int i) {
  const u32 word = s.words ? await_one(s.words + i / 2) : add_words(s.token_row[i / 2], s.position_row[i / 2]);
  return (u16)(i & 1 ? word >> 16 : word);
}

// Puts the LayerNorm of a state of HIDDEN into the workspace. Moments are joined as in row_norm.cuh: lanes' and warps' alike.
__device__ __forceinline__ void stage_normed(Workspace& w, const Source& source, const u16* scale, const u16* shift, float eps) {
  constexpr int VECTORS = HIDDEN / 8, EACH = (VECTORS + WORKERS - 1) / WORKERS, ACTIVE = VECTORS / 32 < WARPS ? VECTORS / 32 : WARPS;
  const int warp = threadIdx.x >> 5;
  uint4 weight[EACH], bias[EACH];
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    const int v = threadIdx.x + j * WORKERS;
    if (v < VECTORS) {
      weight[j] = ((const uint4*)scale)[v];
      bias[j] = ((const uint4*)shift)[v];
    }
  }
  float x[EACH][8] = {};
  float sum = 0, count = 0;
#pragma unroll
  for (int j = 0; j < EACH; ++j)
    if ((int)threadIdx.x + j * WORKERS < VECTORS) {
      unpack(load_eight(source, threadIdx.x + j * WORKERS), x[j]);
      count += 8;
#pragma unroll
      for (int i = 0; i < 8; ++i)
        sum += x[j][i];
    }
  note(w, 0);
  if (warp < ACTIVE) {
    // All lanes of a warp have as many values.
    float mean = sum / count, squares = 0;
#pragma unroll
    for (int j = 0; j < EACH; ++j)
      if ((int)threadIdx.x + j * WORKERS < VECTORS)
#pragma unroll
        for (int i = 0; i < 8; ++i)
          squares += (x[j][i] - mean) * (x[j][i] - mean);
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
      const float other = __shfl_xor_sync(ALL, mean, offset), more = __shfl_xor_sync(ALL, squares, offset), distance = other - mean;
      squares += more + distance * distance * (0.5f * offset * count);
      mean = 0.5f * (mean + other);
    }
    if ((threadIdx.x & 31) == 0) w.moments[warp] = make_float2(mean, squares);
  }
  workers_sync();
  if (warp < ACTIVE) {
    float mean = 0, total = 0;
    auto count_of = [](int i) {
      int n = 0;
#pragma unroll
      for (int j = 0; j < EACH; ++j)
        n += i * 32 + j * WORKERS < VECTORS ? 256 : 0;
      return (float)n;
    };
#pragma unroll
    for (int i = 0; i < ACTIVE; ++i)
      mean += count_of(i) * (1.0f / HIDDEN) * w.moments[i].x;
#pragma unroll
    for (int i = 0; i < ACTIVE; ++i) {
      const float distance = w.moments[i].x - mean;
      total += w.moments[i].y + count_of(i) * distance * distance;
    }
    const float factor = rsqrtf(total * (1.0f / HIDDEN) + eps);
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      const int v = threadIdx.x + j * WORKERS;
      if (v < VECTORS) {
        float a[8], b[8], y[8];
        unpack(weight[j], a);
        unpack(bias[j], b);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          y[i] = (x[j][i] - mean) * factor * a[i] + b[i];
        ((uint4*)w.values)[v] = make_uint4(pack_two(y[0], y[1]), pack_two(y[2], y[3]), pack_two(y[4], y[5]), pack_two(y[6], y[7]));
      }
    }
  }
  workers_sync();
}

// Puts FFN published values into the workspace.
__device__ __forceinline__ void stage_plain(Workspace& w, const u32* words) {
  constexpr int VECTORS = FFN / 8, EACH = (VECTORS + WORKERS - 1) / WORKERS;
  uint4 v[EACH];
#pragma unroll
  for (int j = 0; j < EACH; ++j)
    if ((int)threadIdx.x + j * WORKERS < VECTORS) v[j] = look(words + (threadIdx.x + j * WORKERS) * 4);
  for (bool all = false; !all;) {
    all = true;
#pragma unroll
    for (int j = 0; j < EACH; ++j)
      if ((int)threadIdx.x + j * WORKERS < VECTORS && lacks(v[j])) {
        v[j] = look(words + (threadIdx.x + j * WORKERS) * 4);
        all = false;
      }
  }
#pragma unroll
  for (int j = 0; j < EACH; ++j)
    if ((int)threadIdx.x + j * WORKERS < VECTORS) ((uint4*)w.values)[threadIdx.x + j * WORKERS] = v[j];
  note(w, 0);
  workers_sync();
}

// Puts the attention's result into the workspace, from what the parts of each head have published.
__device__ __forceinline__ void stage_attended(Workspace& w, const u32* words, int parts) {
#pragma unroll 1
  for (int four = threadIdx.x; four < HIDDEN / 4; four += WORKERS) {
    const u32* at = words + four * 4 / HEAD_SIZE * (MAX_PARTS * PARTIAL_WORDS);
    uint4 values[MAX_PARTS];
    uint2 weights[MAX_PARTS];
#pragma unroll
    for (int s = 0; s < MAX_PARTS; ++s)
      if (s < parts) {
        values[s] = look(at + s * PARTIAL_WORDS + four * 4 % HEAD_SIZE);
        weights[s] = look_two(at + s * PARTIAL_WORDS + HEAD_SIZE);
      }
    // All that is missing is looked for at once: the ways through L2 overlap.
    for (bool all = false; !all;) {
      all = true;
#pragma unroll
      for (int s = 0; s < MAX_PARTS; ++s)
        if (s < parts) {
          if (lacks(values[s])) {
            values[s] = look(at + s * PARTIAL_WORDS + four * 4 % HEAD_SIZE);
            all = false;
          }
          if (max(weights[s].x, weights[s].y) == EMPTY) {
            weights[s] = look_two(at + s * PARTIAL_WORDS + HEAD_SIZE);
            all = false;
          }
        }
    }
    float highest = LOWEST;
#pragma unroll
    for (int s = 0; s < MAX_PARTS; ++s)
      if (s < parts) highest = fmaxf(highest, __uint_as_float(weights[s].y));
    float sum = 0, y[4] = {};
#pragma unroll
    for (int s = 0; s < MAX_PARTS; ++s)
      if (s < parts) {
        const float weight = exp2_fast(__uint_as_float(weights[s].y) - highest);
        sum += weight * __uint_as_float(weights[s].x);
        y[0] += weight * __uint_as_float(values[s].x);
        y[1] += weight * __uint_as_float(values[s].y);
        y[2] += weight * __uint_as_float(values[s].z);
        y[3] += weight * __uint_as_float(values[s].w);
      }
    const float inverse = __fdividef(1.0f, sum);
    ((uint2*)w.values)[four] = make_uint2(pack_two(y[0] * inverse, y[1] * inverse), pack_two(y[2] * inverse, y[3] * inverse));
  }
  note(w, 0);
  workers_sync();
}

// Sums of 16 rows over a unit's columns, or one of its halves, in column 0 of an m16n8 fragment.
template <int PARTS>
__device__ __forceinline__ void multiply_slot(u32 slot, int part, u32 x, u32 zeros, float (&sum)[4]) {
  constexpr int STEPS = 8 / PARTS;
  const int lane = threadIdx.x & 31;
  u32 positions[4 / PARTS];
  uint4 values[STEPS];
  if constexpr (PARTS == 1) {
    const uint4 v = read_shared(slot + lane * 16);
    positions[0] = v.x;
    positions[1] = v.y;
    positions[2] = v.z;
    positions[3] = v.w;
  } else {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(positions[0]), "=r"(positions[1]) : "r"(slot + lane * 16 + part * 8) : "memory");
  }
#pragma unroll
  for (int s = 0; s < STEPS; ++s)
    values[s] = read_shared(slot + (1 + part * STEPS + s) * 512 + lane * 16);
  float other[4] = {};
#if PATTERN == 24
  const bool live = (lane & 7) == 0;
  const u32 first = live ? x + part * STEPS * 64 + (lane >> 3) * 16 : zeros, step = live ? 64 : 0;
#else
  const Tables tables = make_tables(lane);
  const bool live = lane < 4;
  const u32 first = live ? x + part * STEPS * 64 + lane * 16 : zeros, step = live ? 64 : 0;
#endif
#pragma unroll
  for (int begin = 0; begin < STEPS; begin += 4) {
    u32 b[4][4];
#pragma unroll
    for (int s = 0; s < 4; ++s)
#if PATTERN == 24
      ldmatrix_x4(first + (begin + s) * step, b[s]);
#else
      load_shared_x4(first + (begin + s) * step, b[s]);
#endif
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      float (&acc)[4] = s % 2 ? other : sum;
      const uint4& v = values[begin + s];
      const u32 at = positions[(begin + s) / 2];
#if PATTERN == 24
      if (s % 2 == 0)
        mma_sparse<0>(acc, v, b[s], at);
      else
        mma_sparse<1>(acc, v, b[s], at);
#else
      u32 a[8];
      expand_step(v, at, s % 2 * 16, tables, a);
      mma_dense(acc, a[0], a[1], a[2], a[3], b[s][0], b[s][1]);
      mma_dense(acc, a[4], a[5], a[6], a[7], b[s][2], b[s][3]);
#endif
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    sum[i] += other[i];
}

template <int PARTS>
__device__ __forceinline__ void multiply(const Ring& ring, Workspace& w, u32 first, int slots, int units) {
  const int lane = threadIdx.x & 31;
#pragma unroll 1
  for (int job = threadIdx.x >> 5; job < slots * PARTS; job += WARPS) {
    const u32 slot = first + job / PARTS;
    float sum[4] = {};
    multiply_slot<PARTS>(ring.take(slot, first), job % PARTS, w.x + job / PARTS % units * 512, w.x - ZERO, sum);
    ring.release(slot, 2 / PARTS);
    if (lane % 4 == 0) {
      w.sums[job * 16 + lane / 4] = sum[0];
      w.sums[job * 16 + 8 + lane / 4] = sum[2];
    }
  }
}

// What a product adds to the sums of its row `lane % 16`.
struct Addends {
  float bias, residual;
};

// Multiplies the workspace's activations by the block's tiles and publishes the rows. Warp i calls it
// with the addends of the block's i-th tile.
__device__ __forceinline__ void multiply_and_publish(const Ring& ring, Workspace& w, Cursor& cursor, int first, int count, int units,
                                                     bool relu, const Addends& add, u32* target) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, slots = count * units;
  const int halves = 2 * slots <= WARPS ? 2 : 1;
  if (halves == 2)
    multiply<2>(ring, w, cursor.slot, slots, units);
  else
    multiply<1>(ring, w, cursor.slot, slots, units);
  cursor.slot += slots;
  workers_sync();
  if (warp < count) {
    const int jobs = units * halves;
    const float* sums = w.sums + warp * jobs * 16 + (lane & 15);
    float sum = 0;
#pragma unroll 4
    for (int j = lane >> 4; j < jobs; j += 2)
      sum += sums[j * 16];
    sum += __shfl_xor_sync(ALL, sum, 16);
    sum += add.bias;
    if (relu) sum = fmaxf(sum, 0.0f);
    sum += add.residual;
    const u32 pair = pack_two(sum, __shfl_down_sync(ALL, sum, 1));
    const u32 word = __shfl_sync(ALL, pair, (lane & 7) * 2);
    if (lane < 8) publish(target + (first + warp * (int)gridDim.x) * 8 + lane, word);
  }
  note(w, 1);
}

// Row that a lane of warp i finishes in the block's i-th tile.
__device__ __forceinline__ int row_of(int first) { return (first + (int)(threadIdx.x >> 5) * (int)gridDim.x) * 16 + (threadIdx.x & 15); }

__device__ __forceinline__ Addends addends(const u16* bias, int first, int count) {
  return {(int)(threadIdx.x >> 5) < count ? to_float(bias[row_of(first)]) : 0.0f, 0.0f};
}

struct Partial {
  float values[HEAD_SIZE], sum, maximum;
};

// One part of a head's attention; as attention_decode.cu, with keys and values from the ring.
__device__ __forceinline__ void attend(const Params& p, const Ring& ring, Workspace& w, Partial* partials, Cursor& cursor,
                                       const Attention& a, int job, int layer, const u32* qkv, u32* target) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, in_group = lane % LANES, group = lane / LANES;
  const int head = job / a.parts, part = job % a.parts;
  const Range range = range_of(a, part);
  const int slots = (range.end - range.begin + POSITIONS - 1) / POSITIONS;
  const bool own = part == a.parts - 1 && a.count < p.capacity;
  float acc[8] = {}, sum = 0, maximum = LOWEST;
  if (warp < slots || (own && warp == WARPS - 1)) {
    const u32* mine = qkv + head * (HEAD_SIZE / 2) + in_group * 4;
    const bool mine_too = own && warp == WARPS - 1;
    uint4 own_q = look(mine), own_k = make_uint4(0, 0, 0, 0), own_v = own_k;
    if (mine_too) {
      own_k = look(mine + HIDDEN_WORDS);
      own_v = look(mine + 2 * HIDDEN_WORDS);
    }
    while (lacks(own_q) || lacks(own_k) || lacks(own_v)) {
      own_q = look(mine);
      if (mine_too) {
        own_k = look(mine + HIDDEN_WORDS);
        own_v = look(mine + 2 * HIDDEN_WORDS);
      }
    }
    float q[8];
    unpack(own_q, q);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      q[i] *= p.scale * LOG2E;
    note(w, 0);
    auto score_of = [&](const uint4& k) {
      float f[8], score = 0;
      unpack(k, f);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        score += q[i] * f[i];
#pragma unroll
      for (int offset = LANES / 2; offset; offset >>= 1)
        score += __shfl_xor_sync(ALL, score, offset);
      return score;
    };
    for (int s = warp; s < slots; s += WARPS) {
      constexpr int EACH = POSITIONS / GROUPS;
      const int count = min(POSITIONS, range.end - range.begin - s * POSITIONS);
      const u32 at = ring.take(cursor.slot + s, cursor.slot) + group * HEAD_SIZE * 2 + in_group * 16;
      uint4 k[EACH];
#pragma unroll
      for (int u = 0; u < EACH; ++u) {
        const bool inside = u * GROUPS + group < count;
        k[u] = inside ? read_shared(at + u * GROUPS * HEAD_SIZE * 2) : make_uint4(0, 0, 0, 0);
      }
      float score[EACH], highest = maximum;
#pragma unroll
      for (int u = 0; u < EACH; ++u) {
        score[u] = score_of(k[u]);
        if (u * GROUPS + group >= count) score[u] = -__int_as_float(0x7f800000);
        highest = fmaxf(highest, score[u]);
      }
      const float shrink = exp2_fast(maximum - highest);
      maximum = highest;
      sum *= shrink;
#pragma unroll
      for (int i = 0; i < 8; ++i)
        acc[i] *= shrink;
#pragma unroll
      for (int u = 0; u < EACH; ++u) {
        const float weight = exp2_fast(score[u] - maximum);
        float f[8];
        // What lies behind the last position may be no number.
        const bool inside = u * GROUPS + group < count;
        unpack(inside ? read_shared(at + (POSITIONS + u * GROUPS) * HEAD_SIZE * 2) : make_uint4(0, 0, 0, 0), f);
        sum += weight;
#pragma unroll
        for (int i = 0; i < 8; ++i)
          acc[i] += weight * f[i];
      }
      ring.release(cursor.slot + s, 2);
    }
    if (mine_too) {
      const float score = score_of(own_k);
      if (group == 0) {
        const float highest = fmaxf(maximum, score), shrink = exp2_fast(maximum - highest), weight = exp2_fast(score - highest);
        float f[8];
        unpack(own_v, f);
        maximum = highest;
        sum = sum * shrink + weight;
#pragma unroll
        for (int i = 0; i < 8; ++i)
          acc[i] = acc[i] * shrink + weight * f[i];
        const size_t at = (((size_t)layer * HEADS + head) * p.capacity + a.count) * LANES + in_group;
        ((uint4*)p.k_cache)[at] = own_k;
        ((uint4*)p.v_cache)[at] = own_v;
      }
    }
    float highest = maximum;
#pragma unroll
    for (int offset = LANES; offset < 32; offset <<= 1)
      highest = fmaxf(highest, __shfl_xor_sync(ALL, highest, offset));
    const float shrink = exp2_fast(maximum - highest);
    sum *= shrink;
#pragma unroll
    for (int offset = LANES; offset < 32; offset <<= 1)
      sum += __shfl_xor_sync(ALL, sum, offset);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      acc[i] *= shrink;
#pragma unroll
      for (int offset = LANES; offset < 32; offset <<= 1)
        acc[i] += __shfl_xor_sync(ALL, acc[i], offset);
      if (group == 0) partials[warp].values[in_group * 8 + i] = acc[i];
    }
    if (lane == 0) {
      partials[warp].sum = sum;
      partials[warp].maximum = highest;
    }
  }
  cursor.slot += slots;
  workers_sync();
  if (threadIdx.x < HEAD_SIZE) {
    // Warps between the last slot's and the last one have attended to nothing.
    const int some = min(slots, WARPS), last = own && some < WARPS ? WARPS - 1 : -1;
    const bool valid = lane < some || lane == last;
    float highest = valid ? partials[lane].maximum : LOWEST;
    const float mine = highest;
#pragma unroll
    for (int offset = 16; offset; offset >>= 1)
      highest = fmaxf(highest, __shfl_xor_sync(ALL, highest, offset));
    const float weight = valid ? exp2_fast(mine - highest) : 0.0f;
    const float total = sum_of_warp(valid ? weight * partials[lane].sum : 0.0f);
    float value = 0;
#pragma unroll 4
    for (int i = 0; i < some; ++i)
      value += __shfl_sync(ALL, weight, i) * partials[i].values[threadIdx.x];
    if (last >= 0) value += __shfl_sync(ALL, weight, last) * partials[last].values[threadIdx.x];
    u32* at = target + (head * MAX_PARTS + part) * PARTIAL_WORDS;
    publish(at + threadIdx.x, __float_as_uint(value));
    if (threadIdx.x == 0) {
      publish(at + HEAD_SIZE, __float_as_uint(total));
      publish(at + HEAD_SIZE + 1, __float_as_uint(highest));
    }
  }
  note(w, 1);
}

// Logits of the block's rows, and the best of those that the warp has had.
__device__ __forceinline__ Best score_rows(const Params& p, const Ring& ring, Workspace& w, Cursor& cursor) {
  const int lane = threadIdx.x & 31;
  const int groups = (p.vocabulary + SLOT_ROWS - 1) / SLOT_ROWS;
  const int begin = (int)((long long)groups * blockIdx.x / gridDim.x), end = (int)((long long)groups * (blockIdx.x + 1) / gridDim.x);
  Best best = {0, 0xffffffffu};
  if ((threadIdx.x >> 5) >= HEAD_WARPS) return best;
  for (int group = begin + (threadIdx.x >> 5); group < end; group += HEAD_WARPS) {
    float sum[SLOT_ROWS] = {};
    float factor = 1.0f;
#if HEAD_INT8
    if (lane < SLOT_ROWS && group * SLOT_ROWS + lane < p.vocabulary) factor = p.head_scales[group * SLOT_ROWS + lane];
#endif
#pragma unroll
    for (int piece = 0; piece < ROW_SLOTS; ++piece) {
      const u32 slot = cursor.slot + (group - begin) * ROW_SLOTS + piece, at = ring.take(slot, cursor.slot);
      constexpr int EIGHTS = HIDDEN / 8 / ROW_SLOTS;
#pragma unroll 4
      for (int v = lane; v < EIGHTS; v += 32) {
        float x[8];
        unpack(read_shared(w.x + (piece * EIGHTS + v) * 16), x);
#pragma unroll
        for (int r = 0; r < SLOT_ROWS; ++r) {
#if HEAD_INT8
          u32 word[2];
          asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "r"(at + r * PIECE_BYTES + v * 8) : "memory");
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            // A byte below the exponent of 2^23 is a number once the offset is taken off again.
            const u32 bits = __byte_perm(word[i / 4] ^ 0x80808080u, 0x4b000000u, 0x7540 + i % 4);
            sum[r] += (__uint_as_float(bits) - 8388736.0f) * x[i];
          }
#else
          float f[8];
          unpack(read_shared(at + r * PIECE_BYTES + v * 16), f);
#pragma unroll
          for (int i = 0; i < 8; ++i)
            sum[r] += f[i] * x[i];
#endif
        }
      }
      ring.release(slot, 2);
    }
#pragma unroll
    for (int r = 0; r < SLOT_ROWS; ++r) {
      const int row = group * SLOT_ROWS + r;
      const float total = sum_of_warp(sum[r]) * (HEAD_INT8 ? __shfl_sync(ALL, factor, r) : 1.0f);
      const u16 logit = from_float(total);
      if (row < p.vocabulary) {
        take(best, to_float(logit), row);
        if (lane == 0) p.logits[row] = logit;
      }
    }
  }
  return best;
}

__device__ __forceinline__ u64 larger(u64 a, u64 b) { return a > b ? a : b; }

__device__ __forceinline__ u64 largest_of_warp(u64 v) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1)
    v = larger(v, __shfl_xor_sync(ALL, v, offset));
  return v;
}

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
