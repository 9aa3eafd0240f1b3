// A phase's input in the workspace: the LayerNorm of the state, the ReLU network's middle, or the attention's joined parts.
#pragma once
#include "values.cuh"
#include "step/words.cuh"
#include "step/workspace.cuh"
#include "softmax.cuh"

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
