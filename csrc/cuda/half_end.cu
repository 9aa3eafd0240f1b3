// The LayerNorm behind the last layer, of what that left in parts: one cluster.
//
// Macros: those of half/block.cuh and half/input.cuh.
#include "half/input.cuh"

#define AT_JOINED (2 * HIDDEN)
#define AT_MOMENTS (AT_JOINED + JOINED_BYTES)

#if SHARED_BYTES < AT_MOMENTS + 8 * WARPS
#error "the host gives too little shared memory"
#endif

struct Params {
  Input in;
  uint4* out; // (HIDDEN,)
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) half_end(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char smem[];
  release_successor();
  arrive_together();
  const Constants constants = load_constants(p.in);
  wait_predecessor();
  join(p.in, constants, (float4*)(smem + AT_JOINED), shared_address(smem));
  normalise(p.in, constants, shared_address(smem), (float2*)(smem + AT_MOMENTS), [&](u32 vector, const uint4& v) {
    if (cluster_rank() == 0) p.out[vector] = v;
  });
}
