// Activations in shared memory as operand B of wgmma: X_STAGES buffers of 64 * X_SUBTILES columns. Needs decode_common.cuh, bulk.cuh,
// wgmma.cuh, unit_products.cuh and ranges.cuh before it.
//
// A warp behind the multiplying ones copies them from the image that arrange.cu makes of x. Each block of a cluster fetches its share for
// all of them, since for many activation rows x, read by every block, is more traffic than W.
#pragma once

// The buffers of x as a consumer warp goes through them, step by step.
struct Reader {
  u32 smem, before;
  Ring ring;
  bool any;

  // Shared address of step s of the unit, once it is there.
  __device__ __forceinline__ u32 open(int s) {
    if (s % (2 * X_SUBTILES) == 0) barrier_wait(smem + BARRIERS_AT + 8 * ring.slot, ring.parity);
    return smem + ring.slot * X_STAGE_BYTES + (s / 2 % X_SUBTILES) * SUBTILE_BYTES + s % 2 * 64;
  }

  // Every block of the cluster has to know: it fetches a share of the buffer's next content.
  __device__ __forceinline__ void give_back() const { warp_arrive_in<CLUSTER>(smem + BARRIERS_AT + 8 * (X_STAGES + before), 0); }

  // After the products of step s have been committed: waits for those before it, and gives back the buffer that they were the last to read.
  __device__ __forceinline__ void close(int s) {
    wait_products<1>();
    if (s % (2 * X_SUBTILES) == 0) {
      if (any) give_back();
      before = ring.slot;
      any = true;
    }
    if (s % (2 * X_SUBTILES) == 2 * X_SUBTILES - 1) ring.advance(X_STAGES);
  }
};

__device__ __forceinline__ void init_buffers(u32 smem) {
  const u32 full = smem + BARRIERS_AT, empty = full + 8 * X_STAGES;
  for (int s = 0; s < X_STAGES; ++s) {
    barrier_init(full + 8 * s, 1);
    barrier_init(empty + 8 * s, CLUSTER * WARPS_ROW * WARP_ARRIVALS);
  }
  barrier_init_fence();
}

__device__ __forceinline__ void feed(const Params& p, u32 smem, Range rest) {
  if ((threadIdx.x & 31) != 0) return;
  constexpr u32 SHARE = X_STAGE_BYTES / CLUSTER;
  const u32 mine = block_rank() * SHARE, full = smem + BARRIERS_AT, empty = full + 8 * X_STAGES;
  const u64 keep = activation_policy();
  Ring ring = {0, 1};
  Segment segment;
  wait_predecessor();
  while (rest.next(p, segment)) {
    const unsigned char* image = (const unsigned char*)p.x + (size_t)segment.first * (UNIT / 64 * SUBTILE_BYTES) + mine;
    for (int stage = (segment.last - segment.first) * (UNIT / 64 / X_SUBTILES); stage > 0; --stage, image += X_STAGE_BYTES) {
      barrier_wait(empty + 8 * ring.slot, ring.parity);
      barrier_expect(full + 8 * ring.slot, X_STAGE_BYTES);
#if CLUSTER == 1
      bulk_copy(smem + ring.slot * X_STAGE_BYTES, image, SHARE, full + 8 * ring.slot, keep);
#else
      bulk_copy_to_all(smem + ring.slot * X_STAGE_BYTES + mine, image, SHARE, full + 8 * ring.slot, (1 << CLUSTER) - 1, keep);
#endif
      ring.advance(X_STAGES);
    }
  }
}
