// Kernels that overlap with those before and behind them in a stream (sm_90 and newer; elsewhere nothing).
#pragma once

// Launched with programmatic serialisation, a kernel starts while its predecessors still run: what none of them writes may be read
// at once, everything else only after wait_predecessor, which every kernel calls so that its end means theirs.
__device__ __forceinline__ void release_successor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
