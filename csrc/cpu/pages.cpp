// Huge pages for weights: under nested paging each 4 KiB page that a stream enters costs a long walk of two page tables.
#include "sparse_engine.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

void sparse_engine_advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
#ifndef MADV_COLLAPSE
  constexpr int MADV_COLLAPSE = 25; // Linux 6.1; older kernels answer EINVAL, and the advice below still holds for later
#endif
  if (!data || bytes <= 0) return;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) & ~(kHugePage - 1);
  if (begin >= end) return;
  auto first = reinterpret_cast<void*>(begin);
  // The memory has been written already, so the advice alone would wait for the kernel's background thread.
  if (madvise(first, end - begin, MADV_HUGEPAGE) == 0) madvise(first, end - begin, MADV_COLLAPSE);
#else
  (void)data;
  (void)bytes;
#endif
}
