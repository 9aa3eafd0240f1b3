// How fast sparse wgmma runs from registers and from shared memory, with operands that stay or are loaded for each step; for benches.
//
// One block per multiprocessor; each of GROUPS warpgroups multiplies the same operands again and again, m64 x n(8 * N_TILES) x k32.
//   A_FROM   0 operand A in registers, the same in each step; 1 in shared memory;
//            2 in registers that are loaded from shared memory for each step; 3 from memory (L2), three steps ahead
#define ELEM_BF16 1
#include "element.cuh"
#include "wgmma.cuh"

#define THREADS (128 * GROUPS)
#define B_BYTES (8 * N_TILES * 128)
#define A_AT (2 * B_BYTES)
#define A_BYTES (GROUPS * 8192)
#define SHARED_BYTES (A_AT + A_BYTES)

struct Params {
  const uint4* data; // `quads` uint4 (a power of two) of finite values, and one copy more, in L2
  long long* clocks; // (blocks,) of the loop
  float* sink;       // one float per thread of a block
  int quads, steps;  // steps is a multiple of 8
};

#if A_FROM == 1
#if N_TILES == 8
#define SS_AB "%32, %33"
#define SS_META "%34, %35"
#elif N_TILES == 16
#define SS_AB "%64, %65"
#define SS_META "%66, %67"
#elif N_TILES == 32
#define SS_AB "%128, %129"
#define SS_META "%130, %131"
#endif
template <int SELECTOR>
__device__ __forceinline__ void wgmma_shared(float (&d)[N_TILES][4], u64 a, u64 b, u32 meta) {
  asm volatile("wgmma.mma_async.sp.sync.aligned.m64" WGMMA_N "k32." WGMMA_TYPES " {" WGMMA_D "}, " SS_AB ", " SS_META ", 1, 1, 1, 0, 0;"
               : WGMMA_OPERANDS
               : "l"(a), "l"(b), "r"(meta), "n"(SELECTOR));
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) prefill_rate(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char dynamic[];
  const u32 smem = (u32)__cvta_generic_to_shared(dynamic), group = threadIdx.x >> 7, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int i = threadIdx.x; i < SHARED_BYTES / 16; i += THREADS)
    ((uint4*)dynamic)[i] = p.data[i & (p.quads - 1)];
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  float d[N_TILES][4] = {};
  uint4 a[4];
  const u32 meta = 0x4e4e4e4e;
  // Each warp of each block reads 512 bytes a step, one behind the other.
  const uint4* source = p.data + lane;
  u32 at = (blockIdx.x * (THREADS / 32) + warp) * 4096;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    a[i] = p.data[(at + i * 32 + lane) & (p.quads - 1)];
  const long long begun = clock64();
  for (int step = 0; step < p.steps; step += 8) {
#pragma unroll
    for (int s = 0; s < 8; ++s) {
      const u64 b = describe(smem + s / 2 % 2 * B_BYTES + s % 2 * 64);
      fence_registers();
#if A_FROM == 1
      const u64 from = describe(smem + A_AT + group * 8192 + s % 4 * 32);
      s % 2 ? wgmma_shared<1>(d, from, b, meta) : wgmma_shared<0>(d, from, b, meta);
#else
      s % 2 ? wgmma_sparse<1>(d, a[s % 4], b, meta) : wgmma_sparse<0>(d, a[s % 4], b, meta);
#endif
      commit_products();
      wait_products<1>();
#if A_FROM == 2
      uint4& v = a[(s + 1) % 4];
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "r"(smem + A_AT + warp * 2048 + s % 4 * 512 + lane * 16)
                   : "memory");
#elif A_FROM == 3
      uint4& v = a[(s + 3) % 4];
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "l"(source + ((at + (step + s) * 32) & (p.quads - 1))));
#endif
    }
  }
  wait_products<0>();
  const long long ended = clock64();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < N_TILES; ++i)
    sum += d[i][0] + d[i][1] + d[i][2] + d[i][3];
  p.sink[threadIdx.x] = sum;
  if (threadIdx.x == 0) p.clocks[blockIdx.x] = ended - begun;
}
