#include "isa.h"

#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <initializer_list>

#include "sparse_engine.h"

#if defined(SPARSE_ENGINE_X86)
#include <cpuid.h>
#endif

namespace sparse_engine {
namespace {

struct Processor {
  bool avx2 = false;
  bool avx512 = false;
  bool amx_bf16 = false;
};

#if defined(SPARSE_ENGINE_X86)
struct Registers {
  unsigned eax, ebx, ecx, edx;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r{};
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
  return r;
}

// Register state that the operating system saves and restores (XCR0); instructions whose state it drops must not be used.
uint64_t saved_state() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

bool has(unsigned word, std::initializer_list<int> bits) {
  for (int bit : bits)
    if (!(word >> bit & 1)) return false;
  return true;
}

Processor detect() {
  Processor p;
  Registers leaf1 = cpuid(1, 0);
  if (!has(leaf1.ecx, {27})) return p; // OSXSAVE: xgetbv itself
  uint64_t state = saved_state();
  Registers leaf7 = cpuid(7, 0), leaf7_1 = cpuid(7, 1);
  bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6, tiles = (state & 0x60000) == 0x60000;
  // FMA, POPCNT, AVX, F16C; BMI1, AVX2, BMI2
  p.avx2 = ymm && has(leaf1.ecx, {12, 23, 28, 29}) && has(leaf7.ebx, {3, 5, 8});
  // AVX512F, DQ, BW, VL; VBMI, VBMI2, GFNI, VNNI; BF16
  p.avx512 = p.avx2 && zmm && has(leaf7.ebx, {16, 17, 30, 31}) && has(leaf7.ecx, {1, 6, 8, 11}) && has(leaf7_1.eax, {5});
  p.amx_bf16 = tiles && has(leaf7.edx, {22, 24});
  return p;
}
#else
Processor detect() { return {}; }
#endif

const Processor& processor() {
  static const Processor p = detect();
  return p;
}

struct Level {
  const char* name;
  bool supported;
  const KernelSet& (*kernels)();
};

constexpr int kLevels = 4;

const Level* levels() { // lowest first
  static const Level all[kLevels] = {
      {"scalar", true, scalar_kernels},
#if defined(SPARSE_ENGINE_HAVE_NEON)
      {"neon", true, neon_kernels},
#else
      {"neon", false, nullptr},
#endif
#if defined(SPARSE_ENGINE_HAVE_AVX2)
      {"avx2", processor().avx2, avx2_kernels},
#else
      {"avx2", false, nullptr},
#endif
#if defined(SPARSE_ENGINE_HAVE_AVX512)
      {"avx512", processor().avx512, avx512_kernels},
#else
      {"avx512", false, nullptr},
#endif
  };
  return all;
}

int32_t find(const char* name, const KernelSet** set) {
  for (int i = kLevels - 1; i >= 0; --i) {
    const Level& level = levels()[i];
    if (name ? strcmp(name, level.name) != 0 : !level.supported) continue;
    if (!level.supported) return SPARSE_ENGINE_UNSUPPORTED_ISA;
    *set = &level.kernels();
    return SPARSE_ENGINE_OK;
  }
  return SPARSE_ENGINE_UNKNOWN_ISA;
}

struct Choice {
  std::atomic<const KernelSet*> set{nullptr};
  std::atomic<int32_t> status{SPARSE_ENGINE_OK};
  Choice() {
    const char* name = getenv("SPARSE_ENGINE_ISA");
    const KernelSet* found = nullptr;
    status = find(name && *name ? name : nullptr, &found);
    set = found;
  }
};

Choice& choice() {
  static Choice c;
  return c;
}

} // namespace

int32_t current_kernels(const KernelSet** set) {
  Choice& c = choice();
  *set = c.set.load(std::memory_order_relaxed);
  return c.status.load(std::memory_order_relaxed);
}

int32_t choose_kernels(const char* name) {
  const KernelSet* found = nullptr;
  int32_t status = find(name, &found);
  if (status == SPARSE_ENGINE_OK) {
    choice().set = found;
    choice().status = SPARSE_ENGINE_OK;
  }
  return status;
}

const char* supported_levels() {
  struct Text {
    char text[32] = "";
    Text() {
      for (int i = 0; i < kLevels; ++i) {
        if (!levels()[i].supported) continue;
        if (text[0]) strcat(text, ",");
        strcat(text, levels()[i].name);
      }
    }
  };
  static const Text t;
  return t.text;
}

bool has_amx_bf16() { return processor().amx_bf16; }

} // namespace sparse_engine
