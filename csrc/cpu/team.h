// Threads of one parallel region that meet at barriers.
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

// A barrier that spins for some microseconds, the length of the phases between two of them, and then gives its core up.
class Barrier {
public:
  // Every thread of the region calls this with their number; what each wrote before is seen by all behind it.
  void wait(int threads) {
    if (threads == 1) return;
    uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < kSpins)
        pause();
      else
        yield();
    }
  }

private:
  static constexpr int kSpins = 20000;

  static void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

  static void yield() {
#if defined(__unix__) || defined(__APPLE__)
    sched_yield();
#endif
  }

  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

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
