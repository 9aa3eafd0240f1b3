// Which instruction-set levels this build, processor and operating system have, and which one is in use.
#pragma once

#include <stdint.h>

#include "kernels.h"

namespace sparse_engine {

// The kernels in use. A status other than SPARSE_ENGINE_OK means that SPARSE_ENGINE_ISA names a level that cannot be used.
int32_t current_kernels(const KernelSet** set);

int32_t choose_kernels(const char* name);
const char* supported_levels();
bool has_amx_bf16();

} // namespace sparse_engine
