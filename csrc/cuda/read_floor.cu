// Reads `count` 16-byte words and does nothing else: the least time that any kernel over these bytes can take, which benches hold
// their times against. Launched as the decode kernels are: programmatic overlap, weights evicted first.
//
//   thread t of T:  words t, t + T, t + 2T, ... ; UNROLL of them in flight at once
//
// Macro: UNROLL, loads that a thread issues before it uses the first.

typedef unsigned int u32;
typedef unsigned long long u64;

struct Params {
  const uint4* data; // count words, 16-byte aligned
  u32* sink;         // one word, written only if every word read so far happens to combine to a fixed value
  u64 count;
};

extern "C" __global__ void read_floor(const __grid_constant__ Params p) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  const u64 stride = (u64)gridDim.x * blockDim.x;
  u32 sum = 0;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < p.count; i += UNROLL * stride) {
    uint4 v[UNROLL];
#pragma unroll
    for (int j = 0; j < UNROLL; ++j) {
      v[j] = make_uint4(0, 0, 0, 0);
      if (i + j * stride < p.count)
        asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                     : "=r"(v[j].x), "=r"(v[j].y), "=r"(v[j].z), "=r"(v[j].w)
                     : "l"(p.data + i + j * stride), "l"(policy));
    }
#pragma unroll
    for (int j = 0; j < UNROLL; ++j)
      sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  if (sum == 0x9e3779b9u) *p.sink = sum;
}
