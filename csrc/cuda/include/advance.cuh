// Where each row of a batch stands, and how a chosen token moves it on: history, counters, end of text.
#pragma once

struct State {
  long long* tokens;       // (batch,) the token that enters the next step
  int* lengths;            // (batch,) tokens in the cache: the position of that token
  long long* history;      // (batch, history_size)
  int* filled;             // (batch,) tokens of history in use
  const int* limits;       // (batch,) a row finishes when filled gets there
  unsigned char* finished; // (batch,)
  const long long* eos;    // (eos_count,)
  long long pad;
  int history_size, eos_count;
};

struct RowState {
  int length, filled, limit;
  bool finished;
  long long eos; // one per lane; -1 behind the last
};

__device__ __forceinline__ RowState read_state(const State& s, int row) {
  const int lane = threadIdx.x & 31;
  return {s.lengths[row], s.filled[row], s.limits[row], s.finished[row] != 0, lane < s.eos_count ? s.eos[lane] : -1};
}

// A warp calls it with what it read before; `token` is the chosen one, or the pad of a row that has finished.
__device__ __forceinline__ void advance_row(const State& s, int row, const RowState& before, long long token) {
  const int lane = threadIdx.x & 31;
  bool end = before.filled + 1 >= before.limit || before.eos == token;
#pragma unroll 1
  for (int i = lane + 32; i < s.eos_count; i += 32)
    end |= s.eos[i] == token;
  end = __any_sync(0xffffffffu, end);
  if (lane) return;
  s.tokens[row] = token;
  if (before.finished) return;
  if (before.filled < s.history_size) s.history[(long long)row * s.history_size + before.filled] = token;
  s.filled[row] = before.filled + 1;
  s.lengths[row] = before.length + 1;
  if (end) s.finished[row] = 1;
}
