// What the AVX-512 kernels share. In an unnamed namespace for the reason given in kernels.h.
#pragma once

#include <immintrin.h>

#include <utility>

#include "kernels.h"
#include "numeric.h"
#include "sparse_engine.h"

namespace sparse_engine {
namespace {

// The compiler's popcount of a half-word may be a call without -mpopcnt; here it is one instruction.
inline int count(uint64_t bits) { return int(_mm_popcnt_u64(bits)); }

inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

// Kept in a register: several rows use it, and as an operand in memory it would take a load slot for each of them.
template <class Register>
inline Register held(Register x) {
  __asm__("" : "+v"(x));
  return x;
}

// The n lowest bits, all of them from 64 on.
inline uint64_t first(int64_t n) { return n >= 64 ? ~uint64_t(0) : n <= 0 ? 0 : (uint64_t(1) << n) - 1; }

// The first n (all of them from 16 on) of 16 elements as fp32, zeros behind; no byte of the others is touched.
inline __m512 load_fp32(Bf16, const uint8_t* p, int64_t n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16(first(n)), p)), 16));
}
inline __m512 load_fp32(Fp16, const uint8_t* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16(first(n)), p)); }
inline __m512 load_fp32(Fp32, const uint8_t* p, int64_t n) { return _mm512_maskz_loadu_ps(__mmask16(first(n)), p); }

// Sums of the lanes of M <= 8 registers, side by side: halves, then quarters of all of them are added at once.
template <int M>
inline __m256 add_lanes(const __m512* sum) {
  __m512 t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    t[i] = i < M ? sum[i < M ? i : 0] : _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(t[2 * i], t[2 * i + 1]), _mm512_unpackhi_ps(t[2 * i], t[2 * i + 1]));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
    t[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  // Each 128-bit lane of t[0] holds a quarter of the sums 0 .. 3, of t[1] of 4 .. 7.
  __m512 four = _mm512_add_ps(_mm512_shuffle_f32x4(t[0], t[1], 0x88), _mm512_shuffle_f32x4(t[0], t[1], 0xdd));
  __m512 swapped = _mm512_shuffle_f32x4(four, four, 0xb1);
  __m512 sums = _mm512_add_ps(four, swapped);
  return _mm512_castps512_ps256(_mm512_shuffle_f32x4(sums, sums, 0x08));
}

// The sums of the lanes of each of R x M registers to `out`, R runs of M, times what scale(run) says, or of M == 1
// times scale(0) all. Whole registers are stored, each over what the one before left behind its own: masked stores would have the
// loads that follow wait. `out` has room for kMaxRows * kMaxActivations.
template <int R, int M, class Scale>
inline void add_all(const __m512 (&sum)[R][M], float* out, Scale scale) {
  if constexpr (M == 1) {
    __m512 column[R];
    for (int r = 0; r < R; ++r)
      column[r] = sum[r][0];
    _mm256_storeu_ps(out, _mm256_mul_ps(add_lanes<R>(column), scale(0)));
  } else {
    for (int r = 0; r < R; ++r)
      _mm256_storeu_ps(out + r * M, _mm256_mul_ps(add_lanes<M>(sum[r]), scale(r)));
  }
}

} // namespace
} // namespace sparse_engine
