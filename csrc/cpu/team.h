// Threads of one parallel region that wait for each other's work.
#pragma once

#include <stdint.h>

#include <atomic>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif

namespace sparse_engine {

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

inline void yield() {
#if defined(__unix__) || defined(__APPLE__)
  sched_yield();
#endif
}

// Waits until a counter has reached `target`, and sees what was written before its increments. It spins for some microseconds, the
// length of a piece of work, and then gives its core up: who is waited for may need it.
inline void wait_until(const std::atomic<int32_t>& counter, int32_t target) {
  constexpr int kSpins = 4000;
  for (int spins = 0; counter.load(std::memory_order_acquire) < target; ++spins) {
    if (spins < kSpins)
      pause();
    else
      yield();
  }
}

// Calls work(thread, threads) in up to `threads` threads at once, the caller's among them.
template <class Work>
void in_parallel(int threads, Work work) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  work(omp_get_thread_num(), omp_get_num_threads());
#else
  (void)threads;
  work(0, 1);
#endif
}

} // namespace sparse_engine
